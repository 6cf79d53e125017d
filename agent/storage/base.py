"""What the agent asks of a storage system: a `Root` (one configured folder tree) and `Directory` handles below it.

Every operation is confined to its root. Operations of a directory take one component (bytes) and never follow a
symlink unless stated. Files are handed out as file descriptors, so that bulk data moves with `os.preadv`,
`os.pwrite` and `recv_into` and nothing in between; the same calls are attributes of the root (`root.pwrite(fd, …)`),
where a fault-injecting wrapper can reach them.

All calls block and belong in worker threads or processes. They raise `OSError`, which `agent.storage.faults` turns
into the project's errors at the one place where the path and the side are known. Handles may be used from
several threads at a time, but closed only when no call is under way; closing twice is harmless.
"""

from __future__ import annotations

import errno
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeAlias

from agent.storage import access_lists, attributes, clone
from agent.storage.node import Node, checked_time
from agent.storage.reach import Reach
from protocol.names import RESERVED_PREFIX, SLASH, CollectionPath

Bytes: TypeAlias = bytes | bytearray | memoryview
# Inode (0 where its number does not outlive a mount) and size of a file that is being written.
PartMark: TypeAlias = tuple[int, int]

# Links that one path may lead through; the kernel's own limit.
MAX_LINKS = 40

# Of a link that leads nowhere, out of the collection, in circles, or where this account may not look.
NOWHERE = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ELOOP,
        errno.EXDEV,
        errno.EACCES,
        errno.EPERM,
        errno.ENAMETOOLONG,
        errno.EINVAL,
    }
)

# setuid, setgid and sticky bits are never taken over from a peer.
PERMISSION_BITS = 0o777


class NotRegularFile(OSError):
    """A device, pipe or socket where a file was asked for, or a temporary that is not ours alone."""

    def __init__(self, sentence: str = "is not a regular file") -> None:
        super().__init__(errno.EINVAL, sentence)


class IllegalName(OSError):
    """A name that cannot be one component of a path reached the storage."""

    def __init__(self, sentence: str = "is no name of a file or folder") -> None:
        super().__init__(errno.EINVAL, sentence)


def component(name: bytes) -> bytes:
    """The name itself if it may be handed to the system as one component, else `IllegalName`.

    The last line of defence behind `protocol.names.check_component_untrusted`.
    """
    # Called for every operation on every file: numbers are found in bytes ten times as fast as bytes are.
    if SLASH in name or 0 in name or not name or name == b"." or name == b"..":
        raise IllegalName
    return name


@dataclass(frozen=True, slots=True)
class Features:
    """What a root can do. ``local``: on a disk of this machine. ``rename_no_replace``: atomic also for folders."""

    file_system: str = ""
    local: bool = False
    rename_no_replace: bool = False

    @property
    def in_memory(self) -> bool:
        """Whether the root lives in memory alone: there is nothing behind the page cache."""
        return self.file_system in ("ramfs", "tmpfs")


class Directory(ABC):
    """An open folder. A context manager; names are single components.

    A folder that is renamed while it is open stays this folder.
    """

    @property
    @abstractmethod
    def path(self) -> CollectionPath:
        """Where it was when it was opened, links resolved."""

    @abstractmethod
    def scan(self, *, reserved: bool = False) -> Iterator[Node]:
        """Stream the entries, unsorted, as `lstat` sees them. Temporaries only with ``reserved``.

        Entries that vanish meanwhile are left out. Several scans may run at once.
        """

    def reserved_names(self) -> list[bytes]:
        """The names of temporaries in this folder, whoever's they are."""
        return [node.name for node in self.scan(reserved=True) if node.name.startswith(RESERVED_PREFIX)]

    def folds(self, prefix: bytes) -> bool:
        """Whether names that differ in case or Unicode form only are one name in this folder. Where the system does not
        say so, it is found out with a temporary whose name begins with ``prefix``."""
        del prefix
        return False

    def check_disks(self) -> None:
        """Raise `agent.storage.disks.DiskAway` where a folder is missing in this one that leads to a disk remembered
        below the root: its listing is not the whole one then. Storage without disks below has nothing to look at."""
        return

    def components_in_place(self, probe: bytes) -> int:
        """How many components of `path` lead where they did when this was opened: all of them, unless it, or a folder
        above it, was renamed, removed or replaced. Where numbers of inodes say so, a temporary called ``probe`` is made
        here and looked for there: some file systems give one folder several. All where it cannot be told."""
        del probe
        return len(self.path)

    @abstractmethod
    def lstat(self, name: bytes) -> Node:
        """The entry itself, a symlink as a symlink."""

    @abstractmethod
    def stat(self, name: bytes) -> Node:
        """What the entry leads to, through symlinks inside the root (`LeavesCollection` otherwise)."""

    def mode_without_list(self, node: Node, *, follow: bool = False) -> int:
        """The mode a file of this folder has without its access list, which is never taken over: where there is one,
        `Node.mode` shows the list's mask instead of what the group may do. ``follow``: the node is what a link leads
        to. Raises OSError where the list cannot be looked at."""
        del follow
        return node.mode

    @abstractmethod
    def open_read(self, name: bytes, *, follow: bool = False) -> int:
        """Open a regular file for reading; never waits for a pipe or device. ``follow``: through links in the root.

        Raises EISDIR for a folder, ELOOP for a symlink without ``follow``, `NotRegularFile` for anything else.
        """

    @abstractmethod
    def open_read_status(self, name: bytes, *, follow: bool = False) -> tuple[int, os.stat_result]:
        """`open_read`, with the status it has looked at anyway; see `version_of`."""

    @abstractmethod
    def open_directory(self, name: bytes, *, follow: bool = False) -> Directory:
        """Open a folder in this one. A symlink raises ENOTDIR without ``follow``."""

    @abstractmethod
    def create_temporary(self, name: bytes, mode: int = 0o600) -> int:
        """Create a file that must not exist (EEXIST) for reading and writing."""

    @abstractmethod
    def open_temporary(self, name: bytes) -> int:
        """Open an existing temporary for reading and writing: regular, ours, no second hard link, else
        `NotRegularFile`. One that has its final, unwritable mode already is opened for reading and syncing only."""

    @abstractmethod
    def rename(self, old: bytes, new: bytes, target: Directory | None = None, *, replace_symlink: bool = True) -> None:
        """Give ``old`` the name ``new`` (in ``target``, a folder of the same root), replacing a file there.

        A symlink there is itself replaced, never followed; EEXIST instead without ``replace_symlink``.
        A folder in the way of a file raises EISDIR.
        """

    @abstractmethod
    def link(self, old: bytes, new: bytes, target: Directory | None = None) -> None:
        """Give the file ``old`` one more name, ``new`` (in ``target``, a folder of the same root), which must not exist
        (EEXIST). A symlink ``old`` is never followed. EPERM or ENOTSUP where files have one name only."""

    @abstractmethod
    def rename_no_replace(self, old: bytes, new: bytes, target: Directory | None = None) -> None:
        """Like `rename`, but EEXIST if there is anything called ``new``."""

    @abstractmethod
    def mkdir(self, name: bytes, mode: int = 0o777) -> None:
        """Make a folder; the process's umask applies. EEXIST if there is anything of that name."""

    @abstractmethod
    def unlink(self, name: bytes) -> None:
        """Remove a file or symlink (EISDIR for a folder)."""

    @abstractmethod
    def rmdir(self, name: bytes) -> None:
        """Remove an empty folder (ENOTEMPTY otherwise)."""

    @abstractmethod
    def symlink(self, name: bytes, target: bytes) -> None:
        """Make a symlink with this text. It is stored as given; following it is confined, whatever it says."""

    @abstractmethod
    def readlink(self, name: bytes) -> bytes:
        """The text of a symlink (EINVAL for anything else)."""

    @abstractmethod
    def set_times(self, name: bytes, mtime_ns: int, *, follow: bool = False) -> None:
        """Set the modification time; the access time becomes now."""

    @abstractmethod
    def set_mode(self, name: bytes, mode: int, *, special: bool = False) -> None:
        """Set the permission bits of a file or folder; setuid, setgid and sticky only with ``special``."""

    @abstractmethod
    def status(self) -> Node:
        """The folder itself; its name is the last component of `path`, empty for the root."""

    @abstractmethod
    def sync(self) -> None:
        """Make the entries of this folder durable."""

    def disk(self) -> int | None:
        """A number for the file system that this folder is on, which may be another one than the root's, mounted below
        it, if `sync_disk` can make all of it durable at once. None where everything is to be synced alone."""
        return None

    def sync_disk(self) -> None:
        """Make everything written before to this folder's file system durable, where it has a `disk`; ENOTSUP
        elsewhere."""
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    @abstractmethod
    def fileno(self) -> int | None:
        """The handle of the system, where there is one. It may be open for lookups only (no read permission)."""

    @abstractmethod
    def close(self) -> None:
        """Give the handle back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Root(ABC):
    """One collection's folder tree."""

    features: Features
    # Whether names that begin with a dot are not shown, although they may be there.
    hides = False

    @abstractmethod
    def open_directory(self, path: CollectionPath) -> Directory:
        """Open a folder, through symlinks inside the root only."""

    @abstractmethod
    def open_parent(self, path: CollectionPath) -> tuple[Directory, bytes]:
        """Open the folder that holds ``path`` and give the last component, which need not exist and is not followed.

        Raises `IllegalName` for the root itself.
        """

    @abstractmethod
    def stat(self, path: CollectionPath) -> Node:
        """What a path leads to, through symlinks inside the root. The name is the one asked for."""

    @abstractmethod
    def make_directories(self, path: CollectionPath, *, durable: bool = True) -> Directory:
        """Open a folder, making the missing ones on the way, confined like everything.

        With ``durable`` every new entry is synced before this returns.
        """

    @abstractmethod
    def identity(self) -> tuple[int, int]:
        """Device and inode of the root."""

    def place(self) -> CollectionPath | None:
        """Where it is on this machine, from the root of the file system, links resolved; None where nobody but it comes
        to its folders."""
        return None

    @abstractmethod
    def check_present(self) -> None:
        """Raise `NeedsPerson` (COLLECTION_UNAVAILABLE) unless the root is the folder it was when it was opened: a
        disk that is not mounted is not an empty folder."""

    def check_original(self) -> None:
        """`check_present`, and the root must be the very folder that was set up: asked before anything is deleted
        because a source does not have it. Raises `NeedsPerson` (ROOT_CHANGED). Storage without marks has nothing
        more to look at."""
        self.check_present()

    def token(self) -> str:
        """What tells this folder from another one in its place, the same after every start of the machine; empty where
        nothing does."""
        return ""

    def disk_tokens(self) -> dict[CollectionPath, str]:
        """As `token`, of each disk that is remembered below the root, by its folder."""
        return {}

    @abstractmethod
    def narrowed(self, reach: Reach) -> Root:
        """The same tree for somebody who may come to some folders only: symlinks that lead elsewhere are refused
        (`LeavesReach`). Paths that are asked for by name are not looked at; whoever asks has checked those.

        The new root is closed by itself; both may be used side by side.
        """

    @abstractmethod
    def free_bytes(self) -> int:
        """Bytes this user can still write."""

    @abstractmethod
    def close(self) -> None:
        """Give the root's handle back; directories opened from it stay usable for plain lookups."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- bytes of open files: exactly the system's calls, replaceable by a wrapper ---------------------------

    def preadv(self, fd: int, buffers: Sequence[bytearray | memoryview], offset: int) -> int:
        """`os.preadv`: may read less than asked for; 0 at the end of the file."""
        return os.preadv(fd, buffers, offset)

    def pwrite(self, fd: int, data: Bytes, offset: int) -> int:
        """`os.pwrite`: may write less than asked for."""
        return os.pwrite(fd, data, offset)

    def clone_range(self, source: int, target: int, offset: int, length: int) -> None:
        """Have a part of one open file share its blocks with the same part of another (see `agent.storage.clone`)."""
        clone.clone_range(source, target, offset, length)

    def copy_range(self, source: int, target: int, offset: int, length: int) -> int:
        """Copy a part of one open file to the same part of another inside the system; may copy less than asked for."""
        return clone.copy_range(source, target, offset, length)

    def ftruncate(self, fd: int, size: int) -> None:
        """`os.ftruncate`."""
        os.ftruncate(fd, size)

    def fsync(self, fd: int) -> None:
        """Make a file's content and size durable (`F_FULLFSYNC` on macOS, where fsync alone is not enough)."""
        os.fsync(fd)

    def fstat(self, fd: int) -> os.stat_result:
        """`os.fstat`."""
        return os.fstat(fd)

    def part_mark(self, fd: int) -> PartMark:
        """What a file that is being written can be known by later on (see `is_part`). Raises OSError."""
        return (0, self.fstat(fd).st_size)

    def is_part(self, fd: int, mark: PartMark) -> bool:
        """Whether an open file may be the one of that mark, which has grown since, perhaps: no other one that has its
        name, and not cut short. Raises OSError."""
        (inode, size), (inode_then, size_then) = self.part_mark(fd), mark
        return size >= size_then and (inode == inode_then or not inode or not inode_then)

    def fchmod(self, fd: int, mode: int) -> None:
        """Set the permission bits of an open file; never setuid, setgid or sticky."""
        os.fchmod(fd, mode & PERMISSION_BITS)

    def futimes(self, fd: int, mtime_ns: int) -> None:
        """Set the modification time of an open file. The access time becomes now and not the file's old time, since
        scratch file systems purge by it."""
        os.utime(fd, ns=(time.time_ns(), checked_time(mtime_ns)))

    def get_attributes(self, fd: int) -> attributes.Found:
        """Extended attributes of an open file or folder, and how many are left out (see `agent.storage.attributes`)."""
        return attributes.read(fd)

    def set_attribute(self, fd: int, name: bytes, value: bytes) -> None:
        """Set an extended attribute of an open file or folder; durable with its next sync."""
        attributes.write(fd, name, value)

    def get_access_lists(self, fd: int) -> access_lists.FoundLists:
        """The access lists of an open file or folder (see `agent.storage.access_lists`)."""
        return access_lists.read(fd)

    def set_access_list(self, fd: int, packed: bytes, *, default: bool = False) -> None:
        """Give an open file or folder an access list, and with it a mode, or a folder a default list; empty takes a
        default list away. Durable with its next sync."""
        access_lists.write(fd, packed, default=default)

    def close_file(self, fd: int) -> None:
        """`os.close`; a delayed write error (NFS, quota) may surface here."""
        os.close(fd)

    # --- small files whole: the same calls one after the other, in one step ----------------------------------

    def read_whole(
        self, directory: Directory, name: bytes, into: memoryview, *, follow: bool = False
    ) -> tuple[int, os.stat_result]:
        """Fill ``into`` from the beginning of a regular file: how many bytes there were (one more than it holds: the
        file goes on), and its status after the last was read. Raises what `Directory.open_read` does."""
        fd, _ = directory.open_read_status(name, follow=follow)
        try:
            done, size, more = 0, len(into), bytearray(1)
            while done <= size:
                count = self.preadv(fd, [into[done:], more], done)
                done += count
                if not count or done == size:
                    break
            return done, self.fstat(fd)
        finally:
            self.close_file(fd)

    def write_whole(
        self, directory: Directory, name: bytes, mode: int, content: memoryview, mtime_ns: int | None
    ) -> int:
        """Make a temporary with a mode, a content and a modification time (None: now). Its descriptor, which is the
        caller's; after an error there is none, but the temporary may be there."""
        fd = directory.create_temporary(name, mode)
        try:
            written = 0
            while written < len(content):
                written += self.pwrite(fd, content[written:], written)
            if mtime_ns is not None:
                self.futimes(fd, mtime_ns)
        except BaseException:
            self.close_file(fd)
            raise
        return fd
