"""What a disk may hold after the power failed: a recorded trace of system calls, and the states that follow from it.

`read_trace` turns what strace wrote into operations on a small model of a file system. A *crash state* is what is there
when the power fails after so many of them: all that a sync has promised, and of the rest whatever the disk likes:

- of each file any of its writes since its last sync, the last of them perhaps torn;
- of each folder its changes (names made, renamed, removed) since its last sync up to any of them, in order;
- names and contents independently of each other, so that a name may be there without the content.

The model promises less than file systems do. Making a file durable does not make its name durable, and syncfs covers
the tree it was called on and not another one, as if each were a disk of its own. Times and modes are left out.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

CALLS = (
    "openat,creat,write,pwrite64,writev,pwritev,pwritev2,ftruncate,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,"
    "rmdir,symlink,symlinkat,link,linkat,fsync,fdatasync,syncfs,fallocate,copy_file_range,sendfile,splice"
)
# A page: what a disk writes whole.
SECTOR = 4096


@dataclass(eq=False)
class Inode:
    """A file, a folder or a link. ``content`` and ``entries`` are what was there before the trace began."""

    kind: str
    content: bytes = b""
    entries: dict[bytes, Inode] = field(default_factory=dict)
    target: bytes = b""


@dataclass(eq=False)
class Write:
    inode: Inode
    offset: int
    data: bytes


@dataclass(eq=False)
class Cut:
    """A file gets another length."""

    inode: Inode
    size: int


@dataclass(eq=False)
class Change:
    """Names of a folder change together: made (an inode) or gone (None)."""

    inode: Inode
    names: dict[bytes, Inode | None]


@dataclass(eq=False)
class Sync:
    """Everything of a file, of a folder, or (``tree``) below a folder that was done before operation ``covers``."""

    call: str
    inode: Inode
    covers: int
    tree: bool = False


Operation = Write | Cut | Change | Sync
Tree = dict[bytes, tuple[str, bytes]]


class Unknown(Exception):
    """The trace holds a call that the model does not know; a state made from it would be a guess."""


# --- reading -----------------------------------------------------------------------------------------------

_LINE = re.compile(rb"^(\d+) +(?:(\d+\.\d+) )?(.*)$")
_RESUMED = re.compile(rb"^<\.\.\. (\w+) resumed>(.*)$")
_CALL = re.compile(rb"^(\w+)\((.*)\) += (-?\d+)(?:<([^>]*)>)?.*$", re.DOTALL)
_ESCAPED = re.compile(rb"\\x([0-9a-f]{2})")
_STRING = rb'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?'
_FD = rb"(?:AT_FDCWD|-?\d+)<([^>]*)>"


def _plain(text: bytes) -> bytes:
    return bytes.fromhex(b"".join(_ESCAPED.findall(text)).decode())


class _Reader:
    """Builds the model as it was at the beginning, follows it through the trace, and notes the operations."""

    def __init__(self, trees: Iterable[Path], only: bytes) -> None:
        self.trees = [os.fsencode(tree) for tree in trees]
        self.only = only
        # When the call of each operation began, where the trace tells.
        self.times: list[float] = []
        self.live: dict[bytes, Inode] = {}
        self.operations: list[Operation] = []
        for tree in self.trees:
            self._begin(tree)
        self.roots = {tree: self.live[tree] for tree in self.trees}
        self.now = {id(inode): dict(inode.entries) for inode in self.live.values()}

    def _begin(self, path: bytes) -> Inode:
        if os.path.islink(path):
            inode = Inode("link", target=os.readlink(path))
        elif os.path.isdir(path):
            inode = Inode("folder")
            for name in os.listdir(path):
                if path in self.trees and not name.startswith(self.only):
                    continue
                inode.entries[name] = self._begin(os.path.join(path, name))
        else:
            with open(path, "rb") as file:
                inode = Inode("file", file.read())
        self.live[path] = inode
        return inode

    def lines(self, trace: Path) -> Iterator[tuple[bytes, int, float]]:
        """Whole calls in the order in which they ended, with the number of operations and the time when they began."""
        begun: dict[bytes, tuple[bytes, int, float]] = {}
        with trace.open("rb") as file:
            for line in file:
                matched = _LINE.match(line.rstrip(b"\n"))
                if matched is None:
                    continue
                thread, stamp, text = matched.groups()
                began = float(stamp or 0)
                if text.endswith(b"<unfinished ...>"):
                    begun[thread] = (text.removesuffix(b"<unfinished ...>"), len(self.operations), began)
                elif (resumed := _RESUMED.match(text)) is not None:
                    # One that was under way when the tracing began is not known to its end.
                    start, count, began = begun.pop(thread, (b"", 0, began))
                    yield start + resumed.group(2), count, began
                else:
                    yield text, len(self.operations), began

    def call(self, text: bytes, covers: int) -> None:
        matched = _CALL.match(text)
        if matched is None:
            return
        name, arguments, result, opened = matched.groups()
        arguments = arguments.rstrip()
        if int(result) < 0:
            return
        handler = getattr(self, "_" + name.decode(), None)
        places = [_plain(place) for place in re.findall(_FD, arguments)]
        if name == b"openat":
            self._opened(arguments, _plain(opened or b""))
        elif handler is not None:
            handler(arguments, int(result), covers)
        elif any(self._ours(place) for place in places):
            raise Unknown(text[:200].decode(errors="replace"))

    # --- names ---------------------------------------------------------------------------------------------

    def _ours(self, path: bytes) -> bool:
        return any(path == tree or path.startswith(tree + b"/" + self.only) for tree in self.trees)

    def _paths(self, arguments: bytes) -> list[bytes]:
        """The paths in the arguments: a name belongs to the folder before it, if there is one."""
        found = []
        for folder, name in re.findall(rb"(?:%s, )?%s" % (_FD, rb'"((?:\\x[0-9a-f]{2})*)"'), arguments):
            path = os.path.join(_plain(folder), _plain(name))
            # What is reached through a descriptor's own link in /proc is that descriptor's file.
            found.append(os.path.normpath(path))
        return found

    def _change(self, *changes: tuple[bytes, Inode | None]) -> None:
        (parent,) = {os.path.dirname(path) for path, _ in changes}
        folder = self.live[parent]
        self.operations.append(Change(folder, {os.path.basename(path): inode for path, inode in changes}))
        for path, inode in changes:
            if inode is None:
                self.live.pop(path, None)
            else:
                self.live[path] = inode

    def _opened(self, arguments: bytes, path: bytes) -> None:
        if not self._ours(path):
            return
        if b"O_CREAT" in arguments and path not in self.live:
            self._change((path, Inode("file")))
        elif b"O_TRUNC" in arguments:
            self.operations.append(Cut(self.live[path], 0))

    def _mkdirat(self, arguments: bytes, _result: int, _covers: int) -> None:
        (path,) = self._paths(arguments)
        if self._ours(path):
            self._change((path, Inode("folder")))

    _mkdir = _mkdirat

    def _renameat(self, arguments: bytes, _result: int, _covers: int) -> None:
        old, new = self._paths(arguments)
        if self._ours(old):
            self._change((old, None), (new, self.live[old]))

    _rename = _renameat2 = _renameat

    def _unlinkat(self, arguments: bytes, _result: int, _covers: int) -> None:
        (path,) = self._paths(arguments)
        if self._ours(path):
            self._change((path, None))

    _unlink = _rmdir = _unlinkat

    def _symlinkat(self, arguments: bytes, _result: int, _covers: int) -> None:
        matched = re.match(rb"%s, (.*)" % _STRING, arguments)
        assert matched is not None
        (path,) = self._paths(matched.group(3))
        if self._ours(path):
            self._change((path, Inode("link", target=_plain(matched.group(1)))))

    _symlink = _symlinkat

    # --- content -------------------------------------------------------------------------------------------

    def _file(self, arguments: bytes) -> Inode | None:
        matched = re.match(_FD, arguments)
        assert matched is not None, arguments[:100]
        path = _plain(matched.group(1))
        return self.live[path] if self._ours(path) else None

    def _pwrite64(self, arguments: bytes, result: int, _covers: int) -> None:
        inode = self._file(arguments)
        if inode is None:
            return
        matched = re.search(rb", %s, \d+, (\d+)$" % _STRING, arguments)
        assert matched is not None
        data, shortened, offset = matched.groups()
        assert not shortened
        self.operations.append(Write(inode, int(offset), _plain(data)[:result]))

    def _write(self, arguments: bytes, _result: int, _covers: int) -> None:
        matched = re.match(_FD, arguments)
        if matched is not None and self._ours(_plain(matched.group(1))):
            raise Unknown(arguments[:200].decode(errors="replace"))

    _writev = _write

    def _ftruncate(self, arguments: bytes, _result: int, _covers: int) -> None:
        inode = self._file(arguments)
        if inode is not None:
            self.operations.append(Cut(inode, int(arguments.rpartition(b", ")[2])))

    # --- promises ------------------------------------------------------------------------------------------

    def _fsync(self, arguments: bytes, _result: int, covers: int) -> None:
        inode = self._file(arguments)
        if inode is not None:
            self.operations.append(
                Sync("sync of a folder" if inode.kind == "folder" else "sync of a file", inode, covers)
            )

    _fdatasync = _fsync

    def _syncfs(self, arguments: bytes, _result: int, covers: int) -> None:
        matched = re.match(_FD, arguments)
        assert matched is not None
        path = _plain(matched.group(1))
        for tree in self.trees:
            if path == tree or path.startswith(tree + b"/"):
                self.operations.append(Sync("syncfs", self.live[tree], covers, tree=True))


@dataclass
class Trace:
    """The trees as they were, by name, and what was done to them; when, where the trace was recorded with ``-ttt``."""

    roots: dict[str, Inode]
    operations: list[Operation]
    times: list[float] = field(default_factory=list)

    def without(self, forgotten: Iterable[Sync]) -> Trace:
        """The same calls, had some syncs been forgotten by whoever wrote the program."""
        gone = {id(sync) for sync in forgotten}
        # Every sync covers what it did: places stay as they are.
        kept: list[Operation] = [
            Sync(one.call, one.inode, 0) if isinstance(one, Sync) and id(one) in gone else one
            for one in self.operations
        ]
        return Trace(self.roots, kept, self.times)

    def is_below(self, inode: Inode, name: str) -> bool:
        """Whether a file or folder is, or was at some time, in this tree."""
        found: set[int] = set()
        _below(self, len(self.operations), self.roots[name], found)
        return id(inode) in found

    @property
    def syncs(self) -> list[Sync]:
        return [one for one in self.operations if isinstance(one, Sync)]


def read_trace(trace: Path, reader: _Reader, names: dict[str, Path]) -> Trace:
    """The operations in a file that strace wrote (``-f -y -xx``). Raises `Unknown`."""
    for text, covers, began in reader.lines(trace):
        reader.call(text, covers)
        reader.times += [began] * (len(reader.operations) - len(reader.times))
    roots = {name: reader.roots[os.fsencode(path)] for name, path in names.items()}
    return Trace(roots, reader.operations, reader.times)


def before(trees: Iterable[Path], only: bytes = b"") -> _Reader:
    """Look at the trees before the traced program runs. ``only``: at what in them has a name that begins so."""
    return _Reader(trees, only)


# --- states ------------------------------------------------------------------------------------------------


def promised(trace: Trace, count: int) -> set[int]:
    """Which of the first ``count`` operations the disk may not forget."""
    members: dict[int, set[int]] = {}
    kept: set[int] = set()
    for number, one in enumerate(trace.operations[:count]):
        if not isinstance(one, Sync):
            continue
        inodes = members.setdefault(id(one.inode), set())
        inodes.clear()
        inodes.add(id(one.inode))
        if one.tree:
            _below(trace, number, one.inode, inodes)
        kept.update(
            index
            for index, other in enumerate(trace.operations[: one.covers])
            if not isinstance(other, Sync) and id(other.inode) in inodes
        )
    return kept


def _below(trace: Trace, count: int, root: Inode, into: set[int]) -> None:
    """Everything that is or was below a folder."""
    waiting = [root]
    while waiting:
        inode = waiting.pop()
        into.add(id(inode))
        found = list(inode.entries.values())
        for one in trace.operations[:count]:
            if isinstance(one, Change) and one.inode is inode:
                found += [entry for entry in one.names.values() if entry is not None]
        waiting += [entry for entry in found if id(entry) not in into]


@dataclass(frozen=True)
class CrashState:
    """One thing a disk may hold: how it came about, and each tree by its name."""

    how: str
    trees: dict[str, Tree]
    # Operations that were done.
    count: int = 0

    def digest(self) -> bytes:
        """The same for equal trees."""
        digest = hashlib.blake2b()
        for name in sorted(self.trees):
            for path, (kind, value) in sorted(self.trees[name].items()):
                for part in (name.encode(), path, kind.encode(), value):
                    digest.update(len(part).to_bytes(8, "big") + part)
        return digest.digest()


def built(trace: Trace, chosen: Iterable[Operation]) -> dict[str, Tree]:
    """The trees with these operations, in their order, and no others."""
    content: dict[int, bytearray] = {}
    entries: dict[int, dict[bytes, Inode]] = {}
    for one in chosen:
        if isinstance(one, Write):
            data = content.setdefault(id(one.inode), bytearray(one.inode.content))
            data.extend(bytes(max(0, one.offset - len(data))))
            data[one.offset : one.offset + len(one.data)] = one.data
        elif isinstance(one, Cut):
            data = content.setdefault(id(one.inode), bytearray(one.inode.content))
            del data[one.size :]
            data.extend(bytes(one.size - len(data)))
        elif isinstance(one, Change):
            names = entries.setdefault(id(one.inode), dict(one.inode.entries))
            for name, inode in one.names.items():
                if inode is None:
                    names.pop(name, None)
                else:
                    names[name] = inode

    def walk(inode: Inode, path: bytes, found: Tree) -> Tree:
        for name, entry in entries.get(id(inode), inode.entries).items():
            below = path + b"/" + name if path else name
            if entry.kind == "file":
                found[below] = ("file", bytes(content.get(id(entry), entry.content)))
            elif entry.kind == "link":
                found[below] = ("link", entry.target)
            else:
                found[below] = ("folder", b"")
                walk(entry, below, found)
        return found

    return {name: walk(inode, b"", {}) for name, inode in trace.roots.items()}


def crash_states(trace: Trace, random: Random, *, at_random: int, every: int = 1) -> Iterator[CrashState]:
    """States after each ``every``-th operation: those that go wrong first, and ``at_random`` others."""
    for count in [*range(0, len(trace.operations), every), len(trace.operations)]:
        done = trace.operations[:count]
        kept = promised(trace, count)
        loose = [number for number, one in enumerate(done) if number not in kept and not isinstance(one, Sync)]
        names = {number for number in loose if isinstance(done[number], Change)}

        def state(how: str, extra: dict[int, Operation], count: int = count, kept: set[int] = kept) -> CrashState:
            chosen = {**{number: trace.operations[number] for number in kept}, **extra}
            return CrashState(
                f"after {count}: {how}", built(trace, [chosen[number] for number in sorted(chosen)]), count
            )

        yield state("all that was not synced is lost", {})
        if not loose:
            continue
        yield state("everything arrived", {number: done[number] for number in loose})
        yield state("names without content", {number: done[number] for number in names})
        zeroed = {number: _zeroed(done[number]) for number in loose}
        yield state("names with zeros for content", zeroed)
        yield state("content without names", {number: done[number] for number in loose if number not in names})
        for turn in range(at_random):
            yield state(f"at random, {turn}", _some(done, loose, random))


def _zeroed(one: Operation) -> Operation:
    return Write(one.inode, one.offset, bytes(len(one.data))) if isinstance(one, Write) else one


def _some(done: list[Operation], loose: list[int], random: Random) -> dict[int, Operation]:
    """Of each folder its first changes, of each file some of its writes, of which one is perhaps torn."""
    chosen: dict[int, Operation] = {}
    by_inode: dict[int, list[int]] = {}
    for number in loose:
        by_inode.setdefault(id(done[number].inode), []).append(number)
    for numbers in by_inode.values():
        if isinstance(done[numbers[0]], Change):
            chosen.update({number: done[number] for number in numbers[: random.randint(0, len(numbers))]})
            continue
        some = [number for number in numbers if random.random() < 0.6]
        chosen.update({number: done[number] for number in some})
        last = done[some[-1]] if some else None
        if isinstance(last, Write) and len(last.data) > SECTOR and random.random() < 0.5:
            whole = random.randrange(0, len(last.data), SECTOR)
            chosen[some[-1]] = Write(last.inode, last.offset, last.data[:whole])
    return chosen


def put(tree: Tree, root: Path) -> None:
    """Make a state real, in a folder that is empty or does not exist."""
    root.mkdir(parents=True, exist_ok=True)
    for path, (kind, value) in tree.items():
        place = os.path.join(os.fsencode(root), path)
        if kind == "folder":
            os.mkdir(place)
        elif kind == "link":
            os.symlink(value, place)
        else:
            with open(place, "wb") as file:
                file.write(value)
