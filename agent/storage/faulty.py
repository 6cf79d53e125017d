"""Any storage with faults on purpose: a wrapper that asks a plan before every call, and may write or read short.

    FaultyRoot(root, fail_nth(7, errno.ENOSPC))          the seventh call of all fails
    FaultyRoot(root, fail_nth(1, errno.EIO, "fsync"))    the first fsync fails
    FaultyRoot(root, short=3)                            no call moves more than three bytes

A plan is any callable; it may also change the tree behind the program's back, or end the process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from agent.storage import attributes
from agent.storage.access_lists import FoundLists
from agent.storage.attributes import Found
from agent.storage.base import Bytes, Directory, PartMark, Root
from agent.storage.node import Node
from agent.storage.reach import Reach
from protocol.names import CollectionPath


class Call(NamedTuple):
    """One call about to be made: its number among all calls and among those of this operation (both from 1)."""

    number: int
    operation: str
    nth: int
    name: bytes


# The errno to fail with, or None to let the call happen.
Plan: TypeAlias = Callable[[Call], int | None]


def no_faults(call: Call) -> int | None:
    """Let everything happen; `Script.calls` then says what there is to fail."""
    return None


def fail_nth(nth: int, code: int, operation: str = "", *, times: int = 1) -> Plan:
    """Fail the n-th call (of one operation, if named) and the ones after it, ``times`` in all (0: for ever)."""

    def plan(call: Call) -> int | None:
        if operation and call.operation != operation:
            return None
        count = call.nth if operation else call.number
        return code if count >= nth and (not times or count < nth + times) else None

    return plan


@dataclass
class Script:
    """Counts the calls of one root and everything opened from it, and asks the plan."""

    plan: Plan
    short: int = 0

    def __post_init__(self) -> None:
        self.calls: list[Call] = []
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def before(self, operation: str, name: bytes = b"") -> None:
        """Note the call; raise `OSError` if the plan says so."""
        with self._lock:
            nth = self._counts.get(operation, 0) + 1
            self._counts[operation] = nth
            call = Call(len(self.calls) + 1, operation, nth, name)
            self.calls.append(call)
        code = self.plan(call)
        if code is not None:
            raise OSError(code, os.strerror(code))

    def cut(self, data: Bytes) -> Bytes:
        """As much of the data as one call may move."""
        return memoryview(data)[: self.short] if self.short else data


class FaultyRoot(Root):
    """A root that fails by plan. ``script.calls`` lists what was called."""

    def __init__(self, inner: Root, plan: Plan = no_faults, *, short: int = 0) -> None:
        self.inner = inner
        self.script = Script(plan, short)
        self.features = inner.features
        self.hides = inner.hides

    def open_directory(self, path: CollectionPath) -> FaultyDirectory:
        self.script.before("open_directory", b"/".join(path))
        return FaultyDirectory(self.inner.open_directory(path), self.script)

    def open_parent(self, path: CollectionPath) -> tuple[FaultyDirectory, bytes]:
        self.script.before("open_parent", b"/".join(path))
        directory, name = self.inner.open_parent(path)
        return FaultyDirectory(directory, self.script), name

    def stat(self, path: CollectionPath) -> Node:
        self.script.before("stat", b"/".join(path))
        return self.inner.stat(path)

    def make_directories(self, path: CollectionPath, *, durable: bool = True) -> FaultyDirectory:
        self.script.before("make_directories", b"/".join(path))
        return FaultyDirectory(self.inner.make_directories(path, durable=durable), self.script)

    def identity(self) -> tuple[int, int]:
        return self.inner.identity()

    def place(self) -> CollectionPath | None:
        return self.inner.place()

    def narrowed(self, reach: Reach) -> FaultyRoot:
        narrow = FaultyRoot(self.inner.narrowed(reach))
        narrow.script = self.script
        return narrow

    def check_present(self) -> None:
        self.script.before("check_present")
        self.inner.check_present()

    def token(self) -> str:
        return self.inner.token()

    def disk_tokens(self) -> dict[CollectionPath, str]:
        return self.inner.disk_tokens()

    def check_original(self) -> None:
        self.script.before("check_original")
        self.inner.check_original()

    def free_bytes(self) -> int:
        self.script.before("free_bytes")
        return self.inner.free_bytes()

    def close(self) -> None:
        self.inner.close()

    def preadv(self, fd: int, buffers: Sequence[bytearray | memoryview], offset: int) -> int:
        self.script.before("preadv")
        if self.script.short:
            buffers = [memoryview(buffers[0])[: self.script.short]]
        return self.inner.preadv(fd, buffers, offset)

    def pwrite(self, fd: int, data: Bytes, offset: int) -> int:
        self.script.before("pwrite")
        return self.inner.pwrite(fd, self.script.cut(data), offset)

    def clone_range(self, source: int, target: int, offset: int, length: int) -> None:
        self.script.before("clone_range")
        self.inner.clone_range(source, target, offset, length)

    def copy_range(self, source: int, target: int, offset: int, length: int) -> int:
        self.script.before("copy_range")
        return self.inner.copy_range(source, target, offset, min(length, self.script.short or length))

    def ftruncate(self, fd: int, size: int) -> None:
        self.script.before("ftruncate")
        self.inner.ftruncate(fd, size)

    def fsync(self, fd: int) -> None:
        self.script.before("fsync")
        self.inner.fsync(fd)

    def fstat(self, fd: int) -> os.stat_result:
        self.script.before("fstat")
        return self.inner.fstat(fd)

    def part_mark(self, fd: int) -> PartMark:
        self.script.before("part_mark")
        return self.inner.part_mark(fd)

    def fchmod(self, fd: int, mode: int) -> None:
        self.script.before("fchmod")
        self.inner.fchmod(fd, mode)

    def futimes(self, fd: int, mtime_ns: int) -> None:
        self.script.before("futimes")
        self.inner.futimes(fd, mtime_ns)

    def get_attributes(self, fd: int) -> Found:
        self.script.before("get_attributes")
        return self.inner.get_attributes(fd)

    def set_attribute(self, fd: int, name: bytes, value: bytes) -> None:
        self.script.before("set_attribute", name)
        self.inner.set_attribute(fd, name, value)

    def get_access_lists(self, fd: int) -> FoundLists:
        self.script.before("get_access_lists")
        return self.inner.get_access_lists(fd)

    def set_access_list(self, fd: int, packed: bytes, *, default: bool = False) -> None:
        self.script.before("set_access_list")
        self.inner.set_access_list(fd, packed, default=default)

    def close_file(self, fd: int) -> None:
        # As in the kernel, the descriptor is gone even if closing reports an error.
        self.inner.close_file(fd)
        self.script.before("close_file")


class FaultyDirectory(Directory):
    """A directory of a `FaultyRoot`."""

    def __init__(self, inner: Directory, script: Script) -> None:
        self.inner = inner
        self.script = script

    @property
    def path(self) -> CollectionPath:
        return self.inner.path

    def scan(self, *, reserved: bool = False) -> Iterator[Node]:
        self.script.before("scan")
        for node in self.inner.scan(reserved=reserved):
            self.script.before("scan_entry", node.name)
            yield node

    def open_directory(self, name: bytes, *, follow: bool = False) -> FaultyDirectory:
        self.script.before("open_directory", name)
        return FaultyDirectory(self.inner.open_directory(name, follow=follow), self.script)

    def rename(self, old: bytes, new: bytes, target: Directory | None = None, *, replace_symlink: bool = True) -> None:
        self.script.before("rename", new)
        self.inner.rename(old, new, _unwrapped(target), replace_symlink=replace_symlink)

    def link(self, old: bytes, new: bytes, target: Directory | None = None) -> None:
        self.script.before("link", new)
        self.inner.link(old, new, _unwrapped(target))

    def rename_no_replace(self, old: bytes, new: bytes, target: Directory | None = None) -> None:
        self.script.before("rename_no_replace", new)
        self.inner.rename_no_replace(old, new, _unwrapped(target))

    def reserved_names(self) -> list[bytes]:
        self.script.before("reserved_names")
        return self.inner.reserved_names()

    def folds(self, prefix: bytes) -> bool:
        return self.inner.folds(prefix)

    def check_disks(self) -> None:
        self.script.before("check_disks")
        self.inner.check_disks()

    def lstat(self, name: bytes) -> Node:
        self.script.before("lstat", name)
        return self.inner.lstat(name)

    def stat(self, name: bytes) -> Node:
        self.script.before("stat", name)
        return self.inner.stat(name)

    def mode_without_list(self, node: Node, *, follow: bool = False) -> int:
        if attributes.needs_look(node.kind, node.mode):
            self.script.before("mode_without_list", node.name)
        return self.inner.mode_without_list(node, follow=follow)

    def open_read(self, name: bytes, *, follow: bool = False) -> int:
        self.script.before("open_read", name)
        return self.inner.open_read(name, follow=follow)

    def open_read_status(self, name: bytes, *, follow: bool = False) -> tuple[int, os.stat_result]:
        self.script.before("open_read", name)
        return self.inner.open_read_status(name, follow=follow)

    def create_temporary(self, name: bytes, mode: int = 0o600) -> int:
        self.script.before("create_temporary", name)
        return self.inner.create_temporary(name, mode)

    def open_temporary(self, name: bytes) -> int:
        self.script.before("open_temporary", name)
        return self.inner.open_temporary(name)

    def mkdir(self, name: bytes, mode: int = 0o777) -> None:
        self.script.before("mkdir", name)
        self.inner.mkdir(name, mode)

    def unlink(self, name: bytes) -> None:
        self.script.before("unlink", name)
        self.inner.unlink(name)

    def rmdir(self, name: bytes) -> None:
        self.script.before("rmdir", name)
        self.inner.rmdir(name)

    def symlink(self, name: bytes, target: bytes) -> None:
        self.script.before("symlink", name)
        self.inner.symlink(name, target)

    def readlink(self, name: bytes) -> bytes:
        self.script.before("readlink", name)
        return self.inner.readlink(name)

    def set_times(self, name: bytes, mtime_ns: int, *, follow: bool = False) -> None:
        self.script.before("set_times", name)
        self.inner.set_times(name, mtime_ns, follow=follow)

    def set_mode(self, name: bytes, mode: int, *, special: bool = False) -> None:
        self.script.before("set_mode", name)
        self.inner.set_mode(name, mode, special=special)

    def status(self) -> Node:
        self.script.before("status")
        return self.inner.status()

    def sync(self) -> None:
        self.script.before("sync")
        self.inner.sync()

    def disk(self) -> int | None:
        return self.inner.disk()

    def components_in_place(self, probe: bytes) -> int:
        return self.inner.components_in_place(probe)

    def sync_disk(self) -> None:
        self.script.before("sync_disk")
        self.inner.sync_disk()

    def fileno(self) -> int | None:
        return self.inner.fileno()

    def close(self) -> None:
        self.inner.close()


def _unwrapped(directory: Directory | None) -> Directory | None:
    return directory.inner if isinstance(directory, FaultyDirectory) else directory
