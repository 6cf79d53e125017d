"""Extended attributes on their way: read at the source with the version of their file, asked for by the destination in
batches, and set on temporaries before anything of these is durable. Only when the task asks for it.

What cannot be taken over is counted (`Counters.xattrs_left_out`), and told once for each reason; no file fails by it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import trio

from agent.storage.attributes import LONGEST_NAME, MOST_ATTRIBUTES, MOST_BYTES, is_attribute
from agent.storage.base import Root, version_of
from agent.storage.faults import fault
from agent.transfer.jobs import FileJob, Group
from agent.transfer.run import Run
from protocol import session
from protocol.errors import ItemFailed, ProtocolError, TowpathError, Who
from protocol.names import CollectionPath

CODE = "ATTRIBUTES_LEFT_OUT"
# With less room than this (bytes) a refusal for want of space is the disk's, not that of one file's attributes.
_ROOM = 1024 * 1024
# What says that a file system does not take this attribute, or none; everything else is the file's own trouble.
_REFUSED = frozenset(
    {
        errno.ENOTSUP,
        errno.ENOSYS,
        errno.EPERM,
        errno.EACCES,
        errno.E2BIG,
        errno.ERANGE,
        errno.EINVAL,
        errno.ENAMETOOLONG,
        errno.ENOSPC,
    }
)


# --- at the source -------------------------------------------------------------------------------------------


def read_attributes(
    root: Root, request: session.ReadAttributes, allowed: Callable[[bytes], CollectionPath]
) -> session.Attributes:
    """The answer to a request, or its beginning. ``allowed`` checks a path (`TowpathError`). Blocks.

    What cannot be read, or is another version by now, has its attributes left out: reading the content says why.
    """
    if not 0 < len(request.files) <= session.MAX_ATTRIBUTE_FILES:
        raise ProtocolError("Attributes of an impossible number of files were asked for.")
    found = []
    size = 0
    for asked in request.files:
        try:
            file = _attributes_of(root, asked, allowed(asked.path), follow=request.follow)
        except ProtocolError:
            raise
        except (TowpathError, OSError):
            file = session.FileAttributes([], 1)
        found.append(file)
        size += sum(len(name) + len(value) for name, value in file.attributes)
        if size >= session.ATTRIBUTE_BYTES:
            break
    return session.Attributes(request.r, found)


def _attributes_of(
    root: Root, asked: session.AttributesOf, path: CollectionPath, *, follow: bool
) -> session.FileAttributes:
    with ExitStack() as stack:
        if asked.version is None:
            handle = stack.enter_context(root.open_directory(path)).fileno()
            if handle is None:
                return session.FileAttributes([])
        else:
            parent, name = root.open_parent(path)
            with parent:
                handle = parent.open_read(name, follow=follow)
            stack.callback(root.close_file, handle)
        found = root.get_attributes(handle)
        if asked.version is not None and version_of(root.fstat(handle)) != tuple(asked.version):
            return session.FileAttributes([], 1)
    return session.FileAttributes(found.attributes, found.left_out, found.rights)


# --- at the destination --------------------------------------------------------------------------------------


def check_attributes_untrusted(files: Sequence[session.FileAttributes], asked: int) -> None:
    """Refuse what no honest source answers. Raises only `ProtocolError`."""
    if not 0 < len(files) <= asked:
        raise ProtocolError("The source sends extended attributes of other files than it was asked about.")
    for file in files:
        names = {name for name, _ in file.attributes}
        size = sum(len(name) + len(value) for name, value in file.attributes)
        if len(names) < len(file.attributes) or len(names) > MOST_ATTRIBUTES or size > MOST_BYTES:
            raise ProtocolError("The source sends more extended attributes than a file may have.")
        if not all(0 < len(name) <= LONGEST_NAME and b"\0" not in name for name in names):
            raise ProtocolError("The source sends an extended attribute with an impossible name.")
        if not (0 <= file.left_out < 2**31 and 0 <= file.rights < 2**31):
            raise ProtocolError("The source left out an impossible number of extended attributes.")


def write_attributes(root: Root, fd: int, attributes: Sequence[tuple[bytes, bytes]]) -> list[OSError]:
    """Set attributes of an open file or folder: why some cannot be set. Raises OSError for a fault that may pass, or
    needs a person. Blocks."""
    refusals: list[OSError] = []
    for name, value in attributes:
        if not is_attribute(name):
            # What the agent keeps for itself.
            refusals.append(OSError(errno.EPERM, os.strerror(errno.EPERM)))
            continue
        try:
            root.set_attribute(fd, name, value)
        except OSError as error:
            if error.errno not in _REFUSED or (error.errno == errno.ENOSPC and root.free_bytes() < _ROOM):
                raise
            refusals.append(error)
    return refusals


def attributes_size(job: FileJob) -> int:
    """Bytes that a job's attributes hold until it is settled."""
    return sum(len(name) + len(value) for name, value in job.attributes or ())


def give_attributes(root: Root, job: FileJob, fd: int, refused: Callable[[FileJob, OSError], None]) -> None:
    """Set the attributes of a job's temporary, as far as they can be. Raises OSError as `write_attributes` does."""
    for error in write_attributes(root, fd, job.attributes or ()):
        job.attributes_left_out += 1
        refused(job, error)


class Attributes:
    """Asks the source. Methods are called in the trio thread."""

    def __init__(self, run: Run, *, wanted: bool) -> None:
        self._run = run
        self._wanted = wanted
        self._told: set[str] = set()

    @property
    def asked_for(self) -> bool:
        """Whether the task wants attributes and the source can give them. Says so when it cannot."""
        if not self._wanted:
            return False
        if session.ATTRIBUTES in self._run.session.abilities:
            return True
        self._tell(
            "The agent of the source, or its operating system, cannot read extended attributes; none are taken over.",
            who="source owner",
        )
        return False

    async def read(self, jobs: Sequence[FileJob]) -> int:
        """Ask for the attributes of some jobs that are followed alike; the source answers for the first few of them,
        and this says for how many. All of them when there is nothing to ask."""
        if not jobs or not self.asked_for:
            return len(jobs)
        jobs = jobs[: session.MAX_ATTRIBUTE_FILES]
        asked = [session.AttributesOf(job.source_path, job.row.version) for job in jobs]
        files = await self._run.session.attributes(asked, follow=jobs[0].follow)
        check_attributes_untrusted(files, len(asked))
        for job, file in zip(jobs, files, strict=False):
            job.attributes, job.attributes_left_out = file.attributes, self._left_out(job.source_path, file)
        return len(files)

    async def folder(self, group: Group) -> None:
        """Take over the attributes of a folder that is being worked on. Raises what is no folder's own trouble."""
        if not self.asked_for:
            return
        files = await self._run.session.attributes([session.AttributesOf(group.source)], follow=False)
        check_attributes_untrusted(files, 1)
        handle = group.handle.fileno()
        left_out = self._left_out(group.source, files[0])
        if handle is not None and files[0].attributes:
            # Synced with the folder's entries.
            group.made_folders = True
            root = self._run.context.root
            refusals = await trio.to_thread.run_sync(write_attributes, root, handle, files[0].attributes)
            for error in refusals:
                self.refused(group.destination, error)
            left_out += len(refusals)
        group.attributes_left_out = bool(left_out)

    def refused(self, path: bytes, error: OSError) -> None:
        """The destination did not take an attribute."""
        reason = fault(error, "destination", path).sentence
        if error.errno in (errno.ENOTSUP, errno.ENOSYS):
            reason = "The destination's file system keeps no extended attributes."
        elif error.errno in (errno.ENOSPC, errno.E2BIG, errno.ERANGE):
            reason = f"Extended attributes of {fault(error, 'destination', path).subject} are larger than the "
            reason += "destination's file system allows."
        self._tell(f"{reason} They are left out and counted.", who="destination owner", kind=str(error.errno))

    def _left_out(self, path: bytes, file: session.FileAttributes) -> int:
        """How many the source keeps back, which is said."""
        subject = fault(OSError(errno.EIO, ""), "source", path).subject
        if file.left_out:
            self._tell(
                f"Not all extended attributes of {subject} could be read at the source, or they are too many or too "
                "large. They are left out and counted.",
                who="source owner",
                kind="source",
            )
        if file.rights:
            self._tell(
                f"The access list or the capabilities of {subject} are not taken over: they name accounts of the "
                "source's machine, who are others elsewhere. Such files and folders are counted.",
                who="",
                kind="rights",
            )
        return file.left_out + file.rights

    def _tell(self, sentence: str, *, who: Who, kind: str = "") -> None:
        if kind not in self._told:
            self._told.add(kind)
            self._run.context.on_fault(ItemFailed(sentence, code=CODE, who=who))
