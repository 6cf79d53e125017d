"""What a source finds out about one file for its destination, beside its content. All calls block, and raise OSError or
`TowpathError`; that a destination may ask is checked before (`agent.transfer.source.serve`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agent.storage.base import Root
from agent.storage.node import version_of
from agent.transfer.basis.checksum import block_digests, file_digest
from agent.transfer.basis.holes import data_extents
from agent.transfer.source.send import let_rest
from agent.transfer.source.source_rows import looked_at, row_of
from protocol import session
from protocol.errors import RetryLater
from protocol.names import CollectionPath


def row_at(root: Root, path: CollectionPath, *, follow: bool) -> session.Row:
    """What lies at a path, itself or (``follow``) what it leads to."""
    if not path:
        return row_of(root.stat(path))
    parent, name = root.open_parent(path)
    with parent:
        node = parent.stat(name) if follow else parent.lstat(name)
        target = parent.readlink(name) if node.kind == "symlink" else None
        return looked_at(parent, node, target, follow=follow)


def digest(root: Root, path: CollectionPath, request: session.DigestFile) -> str:
    """The digest of a whole file, of one version where the request names one, else `RetryLater` (FILE_CHANGED)."""
    with _opened(root, path, follow=request.follow) as descriptor:
        if request.version is not None:
            let_rest(request.version)
        value = file_digest(root, descriptor, request.algorithm)
        if request.version is not None:
            _check_version(root, descriptor, request.version)
        return value


def extents(root: Root, path: CollectionPath, request: session.FindExtents) -> list[session.Extent] | None:
    """Where a file has data, None if it is of another version by now, or where that cannot be told."""
    with _opened(root, path, follow=request.follow) as descriptor:
        let_rest(request.version)
        found = data_extents(descriptor, request.version[2], root.features.file_system)
        # Looked at afterwards: what was found belongs to this version and no other.
        return found if version_of(root.fstat(descriptor)) == tuple(request.version) else None


def digests_of_blocks(root: Root, path: CollectionPath, request: session.DigestBlocks) -> list[bytes]:
    """The digests of some blocks of a file of this version, else `RetryLater` (FILE_CHANGED)."""
    with _opened(root, path, follow=request.follow) as descriptor:
        let_rest(request.version)
        digests = block_digests(root, descriptor, request)
        _check_version(root, descriptor, request.version)
        return digests


@contextmanager
def _opened(root: Root, path: CollectionPath, *, follow: bool) -> Iterator[int]:
    parent, name = root.open_parent(path)
    with parent:
        descriptor = parent.open_read(name, follow=follow)
    try:
        yield descriptor
    finally:
        root.close_file(descriptor)


def _check_version(root: Root, descriptor: int, version: session.Version) -> None:
    if version_of(root.fstat(descriptor)) != tuple(version):
        raise RetryLater("The file changed while it was compared.", code="FILE_CHANGED", who="source owner")
