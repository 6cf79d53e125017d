"""Unpacks a bundle without trusting the names, links, sizes and modes in it.

Tarfile's own filters (PEP 706) came with Python 3.11.4 only, and look where a link leads when it is made, which what is
made later may change. Here nothing is ever written through a link, nothing is made twice, and where the links lead is
looked at when all are there.
"""

from __future__ import annotations

import os
import posixpath
import shutil
import tarfile
import zlib
from pathlib import Path

from agent.update.offer import UpdateRefused

try:
    from lzma import LZMAError
except ImportError:
    # A Python that was built without it reads no such archives either.
    _DAMAGED: tuple[type[Exception], ...] = (tarfile.TarError, EOFError, zlib.error)
else:
    _DAMAGED = (tarfile.TarError, EOFError, zlib.error, LZMAError)

MAX_UNPACKED = 4 * 1024 * 1024 * 1024
MAX_MEMBERS = 200_000
# Folders in one another.
MAX_DEPTH = 100


def unpack_untrusted(bundle: Path, target: Path) -> None:
    """Unpack a tar archive, compressed or not, into the folder ``target``, which must not be there yet. Owners and
    times of the archive do not count; of modes it counts who may run a file. Raises `UpdateRefused` or OSError."""
    target.mkdir(mode=0o700)
    unpacking = _Unpacking(target)
    total = 0
    try:
        with tarfile.open(bundle, "r:*") as archive:
            for count, member in enumerate(archive):
                # Sizes below zero can be written down, too.
                total += abs(member.size)
                if count >= MAX_MEMBERS or total > MAX_UNPACKED:
                    raise UpdateRefused("The bundle holds too much.")
                unpacking.take(archive, member)
    except _DAMAGED as error:
        raise UpdateRefused(f"The bundle cannot be unpacked: {error}.") from error
    unpacking.check_links()


class _Unpacking:
    def __init__(self, target: Path) -> None:
        self._target = target
        # Real folders below the target: nothing is removed or replaced, so that what is one stays one.
        self._folders: set[tuple[str, ...]] = {()}
        self._links: list[Path] = []

    def take(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        parts = _parts(member.name)
        if member.isdir():
            self._folder(parts)
            return
        if not parts:
            raise UpdateRefused("The bundle holds something without a name.")
        self._folder(parts[:-1])
        path = self._target.joinpath(*parts)
        try:
            if member.issym():
                self._link(member, path)
            elif member.islnk():
                self._second_name(member, path)
            elif member.isreg():
                _write(archive, member, path)
            else:
                raise UpdateRefused(f"The bundle holds a special file ({member.name!r:.100}).")
        except FileExistsError as error:
            raise UpdateRefused(f"The bundle holds {member.name!r:.100} twice.") from error

    def _folder(self, parts: tuple[str, ...]) -> None:
        if parts in self._folders:
            return
        self._folder(parts[:-1])
        try:
            self._target.joinpath(*parts).mkdir(mode=0o755)
        except FileExistsError as error:
            # Also on a disk that takes two names for one: a folder is only what was made as one, by that name.
            raise UpdateRefused(f"The bundle holds {'/'.join(parts)!r:.100} twice.") from error
        self._folders.add(parts)

    def _link(self, member: tarfile.TarInfo, path: Path) -> None:
        leads = member.linkname
        if posixpath.isabs(leads) or os.path.isabs(leads) or "\0" in leads:
            raise UpdateRefused(f"A link of the bundle leads out of it ({member.name!r:.100}).")
        os.symlink(leads, path)
        self._links.append(path)

    def _second_name(self, member: tarfile.TarInfo, path: Path) -> None:
        parts = _parts(member.linkname)
        first = self._target.joinpath(*parts)
        if parts[:-1] not in self._folders or first.is_symlink() or not first.is_file():
            raise UpdateRefused(f"A hard link of the bundle leads to no file of it ({member.name!r:.100}).")
        os.link(first, path)

    def check_links(self) -> None:
        """When all of them are there, as one may lead through another."""
        inside = os.path.realpath(self._target)
        for link in self._links:
            if os.path.commonpath([inside, os.path.realpath(link)]) != inside:
                raise UpdateRefused(f"A link of the bundle leads out of it ({link.name!r:.100}).")


def _parts(name: str) -> tuple[str, ...]:
    """The components of a name that stays where it is unpacked."""
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if name.startswith("/") or len(parts) > MAX_DEPTH or not all(_is_name(part) for part in parts):
        raise UpdateRefused(f"The bundle holds a name that leads out of it ({name!r:.100}).")
    return parts


def _is_name(part: str) -> bool:
    # One may be a path of its own where backslashes and drives are known.
    return part != ".." and "\0" not in part and os.path.split(os.path.splitdrive(part)[1])[1] == part


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    content = archive.extractfile(member)
    assert content is not None
    with content, path.open("xb") as file:
        shutil.copyfileobj(content, file, 1024 * 1024)
    path.chmod(0o755 if member.mode & 0o100 else 0o644)
