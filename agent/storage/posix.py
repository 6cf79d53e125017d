"""POSIX storage, confined to one root: every path goes through `agent.storage.walk`, every other operation takes one
component relative to an open folder."""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import stat as stat_bits
from collections.abc import Callable, Collection, Iterable, Iterator

from agent.storage import attributes, folding, handles, libc, mounts
from agent.storage.base import PERMISSION_BITS, Directory, Features, IllegalName, PartMark, Root, component
from agent.storage.disks import Disk, DiskAway, Disks, look
from agent.storage.enclosing import components_in_place
from agent.storage.handles import os_error
from agent.storage.node import Node, node_from_stat
from agent.storage.own_files import Around, OwnFiles
from agent.storage.reach import Reach
from agent.storage.rename import rename_no_replace
from agent.storage.unavailable import changed, unavailable
from agent.storage.walk import Walker, components, read_link
from protocol.names import RESERVED_PREFIX, CollectionPath


def open_root(path: str, expected: mounts.Mark | None = None, disks: Iterable[Disk] = ()) -> PosixRoot:
    """Open the folder of a collection. Symlinks in ``path`` are followed: it comes from the owner's configuration.
    Folders where ``disks`` were mounted are entered only while those are there (`DiskAway`).

    Raises `NeedsPerson` (COLLECTION_UNAVAILABLE) if it is no folder, cannot be opened, or is not on the disk that
    ``expected`` (kept from set-up, see `PosixRoot.mark`) describes. Whether it is also the very folder,
    `Root.check_original` says.
    """
    if not handles.USABLE:
        raise unavailable(path, "cannot be offered from this operating system, which does not open files safely")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise unavailable(path, f"cannot be opened ({error.strerror})") from error
    root = PosixRoot(fd, path, expected)
    found = root.mark()
    if expected is not None and mounts.difference(expected, found, strict=False):
        root.close()
        raise changed(path, expected, found, strict=False)
    root.walker.disks = Disks(disks)
    return root


class PosixRoot(Root):
    """A folder of this machine. Made by `open_root`; owns the handle it is given."""

    def __init__(self, fd: int, path: str, expected: mounts.Mark | None = None) -> None:
        self._fd = fd
        self._expected = expected
        self._configured = path
        self.walker = Walker(fd, sorted({os.path.abspath(path), os.path.realpath(path)}))
        status = os.fstat(fd)
        self._identity = (status.st_dev, status.st_ino)
        self._mount = mounts.mount_of(fd, path)
        self._folds: dict[int, bool] = {}
        self._guarded: Callable[[PosixRoot, int, CollectionPath, Around], PosixDirectory] | None = None
        local = mounts.is_local(self._mount.file_system)
        # By device, the handle by which a file system is made durable as a whole, None where it is not: syncfs tells a
        # handle of write errors since it was opened, also of those that another one was told of meanwhile.
        self._syncs: dict[int, int | None] = {status.st_dev: fd if local and libc.has_syncfs() else None}
        self.features = Features(
            file_system=self._mount.file_system,
            local=local,
            rename_no_replace=libc.has_rename_no_replace(),
        )

    def open_directory(self, path: CollectionPath) -> PosixDirectory:
        return self.readable(*self.walker.walk(_checked(path)))

    def open_parent(self, path: CollectionPath) -> tuple[PosixDirectory, bytes]:
        if not path:
            raise IllegalName("is the collection itself")
        _checked(path)
        return self.readable(*self.walker.walk(path[:-1])), path[-1]

    def stat(self, path: CollectionPath) -> Node:
        if not path:
            return node_from_stat(b"", os.fstat(self._fd))
        component(path[-1])
        with self.directory(*self.walker.walk(_checked(path[:-1]))) as parent:
            return parent.stat(path[-1])

    def make_directories(self, path: CollectionPath, *, durable: bool = True) -> PosixDirectory:
        return self.readable(*self.walker.walk(_checked(path), make=True, durable=durable))

    def narrowed(self, reach: Reach) -> PosixRoot:
        # What was found out about the folder holds for both; only the way of links differs.
        root = copy.copy(self)
        root._fd = os.dup(self._fd)
        own = self._identity[0]
        root._syncs = {own: None if self._syncs[own] is None else root._fd}
        root.walker = self.walker.narrowed(root._fd, reach)
        return root

    def guard(
        self, own: OwnFiles, directory: Callable[[PosixRoot, int, CollectionPath, Around], PosixDirectory]
    ) -> None:
        """Enter none of the agent's own folders, and have folders that hold some of its own made by ``directory``."""
        self.walker.own, self._guarded = own, directory

    def identity(self) -> tuple[int, int]:
        return self._identity

    def place(self) -> CollectionPath:
        """As the interface says."""
        return tuple(components(os.fsencode(os.path.realpath(self._configured))))

    def mark(self) -> mounts.Mark:
        """What to keep at set-up, so that `open_root` knows this folder again."""
        return mounts.look(self._fd, self._mount)

    def place_marker(self) -> mounts.Mark:
        """Give the folder a marker by which it is known again, where it can hold one. Its mark from now on."""
        mounts.place_marker(self._fd)
        return self.mark()

    def look_below(self, known: Collection[CollectionPath], *, place: bool) -> list[Disk]:
        """The disks mounted below, but for the known ones (see `agent.storage.disks.look`)."""
        return look(self._fd, os.path.realpath(self._configured), known, place=place)

    def token(self) -> str:
        mark = self.mark()
        return f"{mark.inode} {mark.marker}" if mark.inode or mark.marker else ""

    def disk_tokens(self) -> dict[CollectionPath, str]:
        return self.walker.disks.tokens()

    def check_original(self) -> None:
        self.check_present()
        found = self.mark()
        if self._expected is not None and mounts.difference(self._expected, found):
            raise changed(self._configured, self._expected, found, strict=True, code="ROOT_CHANGED")

    def check_present(self) -> None:
        try:
            status = os.stat(self._configured)
        except OSError as error:
            raise unavailable(self._configured, f"cannot be found ({error.strerror})") from error
        if (status.st_dev, status.st_ino) != self._identity:
            raise unavailable(self._configured, "is not the folder that was opened; its disk may have been unmounted")

    def free_bytes(self) -> int:
        status = os.fstatvfs(self._fd)
        return status.f_bavail * status.f_frsize

    def found_at(self, path: CollectionPath) -> tuple[int, int]:
        """Device and inode of what a way without links leads to, for comparison with folders that the agent has open
        and nothing else: the system walks it, by whatever links somebody has put there. Raises OSError."""
        status = os.stat(b"/".join(path) or b".", dir_fd=self._fd, follow_symlinks=False)
        return (status.st_dev, status.st_ino)

    def disk_of(self, fd: int) -> int | None:
        """`Directory.disk` of an open folder."""
        device = os.fstat(fd).st_dev
        if device not in self._syncs:
            local = mounts.is_local(mounts.mount_of(fd, self._configured).file_system) and libc.has_syncfs()
            try:
                handle = os.open(b".", handles.FOLDER, dir_fd=fd) if local else None
            except PermissionError:
                # Another folder of it may be readable.
                return None
            if self._syncs.setdefault(device, handle) != handle and handle is not None:
                # Another thread was faster.
                os.close(handle)
        return device if self._syncs[device] is not None else None

    def sync_disk_of(self, fd: int) -> None:
        """`Directory.sync_disk` of an open folder."""
        device = self.disk_of(fd)
        handle = None if device is None else self._syncs[device]
        if handle is None:
            raise os_error(errno.ENOTSUP)
        libc.syncfs(handle)

    def folds(self, fd: int, prefix: bytes) -> bool:
        """`Directory.folds` of an open folder."""
        device = os.fstat(fd).st_dev
        # Another file system may be mounted below.
        file_system = self._mount.file_system if device == self._identity[0] else ""
        return folding.folds(file_system, fd, prefix, self._folds, device)

    def fsync(self, fd: int) -> None:
        handles.sync_handle(fd)

    def part_mark(self, fd: int) -> PartMark:
        status = os.fstat(fd)
        # Of a disk that is mounted below, the file system is not known here.
        lasting = status.st_dev == self._identity[0] and mounts.keeps_inodes(self._mount.file_system)
        return (status.st_ino if lasting else 0, status.st_size)

    def read_whole(
        self, directory: Directory, name: bytes, into: memoryview, *, follow: bool = False
    ) -> tuple[int, os.stat_result]:
        if not isinstance(directory, PosixDirectory):
            return super().read_whole(directory, name, into, follow=follow)
        fd = directory.open_anything(name, follow=follow)
        try:
            # One byte more costs no call: a read that ends before it has met the end of the file.
            done, size, more = 0, len(into), bytearray(1)
            while done <= size:
                count = os.preadv(fd, (into[done:] if done else into, more), done)
                done += count
                if not count or done == size:
                    break
            status = os.fstat(fd)
        except OSError:
            # A folder or a pipe refuses to be read; what it is comes first.
            handles.check_regular(os.fstat(fd))
            raise
        finally:
            os.close(fd)
        handles.check_regular(status)
        if status.st_nlink > 1:
            self.walker.own.check_links(status)
        return done, status

    def write_whole(
        self, directory: Directory, name: bytes, mode: int, content: memoryview, mtime_ns: int | None
    ) -> int:
        if not isinstance(directory, PosixDirectory):
            return super().write_whole(directory, name, mode, content, mtime_ns)
        return handles.fill_temporary(directory.create_temporary(name, mode), content, mtime_ns, os.pwrite)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self.walker.retire()
            for handle in self._syncs.values():
                if handle is not None and handle != fd:
                    os.close(handle)
            self._syncs = {}
            os.close(fd)

    def readable(self, fd: int, where: CollectionPath) -> PosixDirectory:
        """A directory from a lookup handle, opened for reading where permissions allow."""
        try:
            readable = os.open(b".", handles.FOLDER, dir_fd=fd)
        except PermissionError:
            return self.directory(fd, where)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return self.directory(readable, where)

    def directory(self, fd: int, where: CollectionPath) -> PosixDirectory:
        """The directory of a handle, which is closed with it."""
        around = None if self._guarded is None else self.walker.own.around(fd, where)
        if around is None or self._guarded is None:
            return PosixDirectory(self, fd, where)
        return self._guarded(self, fd, where, around)


class PosixDirectory(Directory):
    """An open folder below a `PosixRoot`; owns the handle it is given."""

    __slots__ = ("_fd", "_path", "_root")

    def __init__(self, root: PosixRoot, fd: int, path: CollectionPath) -> None:
        self._root = root
        self._fd = fd
        self._path = path

    @property
    def path(self) -> CollectionPath:
        return self._path

    def scan(self, *, reserved: bool = False) -> Iterator[Node]:
        # A handle of its own: the reading position belongs to the open file, and scans may overlap.
        fd = os.open(b".", handles.FOLDER, dir_fd=self._fd)
        own = self._root.walker.own
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    if not reserved and name.startswith(RESERVED_PREFIX):
                        continue
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if status.st_nlink > 1 and own.are(status):
                        continue
                    yield node_from_stat(name, status)
        finally:
            os.close(fd)

    def reserved_names(self) -> list[bytes]:
        # Names alone: looking at every file of a large folder would cost as much as planning it. And one after the
        # other, since it may have more than memory should hold.
        fd = os.open(b".", handles.FOLDER, dir_fd=self._fd)
        try:
            with os.scandir(fd) as entries:
                return [name for each in entries if (name := os.fsencode(each.name)).startswith(RESERVED_PREFIX)]
        finally:
            os.close(fd)

    def folds(self, prefix: bytes) -> bool:
        return self._root.folds(self._fd, prefix)

    def check_disks(self) -> None:
        for name, disk in self._root.walker.disks.ways(self._path):
            try:
                os.stat(name, dir_fd=self._fd, follow_symlinks=False)
            except FileNotFoundError:
                raise DiskAway(disk) from None

    def components_in_place(self, probe: bytes) -> int:
        return components_in_place(self, self._root.found_at, probe)

    def lstat(self, name: bytes) -> Node:
        return self._node(name, os.stat(component(name), dir_fd=self._fd, follow_symlinks=False))

    def _node(self, name: bytes, status: os.stat_result) -> Node:
        self._root.walker.own.check_links(status)
        return node_from_stat(name, status)

    def stat(self, name: bytes) -> Node:
        node = self.lstat(name)
        if node.kind != "symlink":
            return node
        with self._follow(name) as (folder, last):
            if not last:
                return node_from_stat(name, os.fstat(folder))
            return self._node(name, os.stat(last, dir_fd=folder, follow_symlinks=False))

    def mode_without_list(self, node: Node, *, follow: bool = False) -> int:
        if not attributes.needs_look(node.kind, node.mode):
            return node.mode
        if not follow:
            return attributes.mode_without_list((self._fd, component(node.name)), node.mode)
        fd = self.open_read(node.name, follow=True)
        try:
            return attributes.mode_without_list(fd, node.mode)
        finally:
            os.close(fd)

    def open_read(self, name: bytes, *, follow: bool = False) -> int:
        return self.open_read_status(name, follow=follow)[0]

    def open_read_status(self, name: bytes, *, follow: bool = False) -> tuple[int, os.stat_result]:
        fd = self.open_anything(name, follow=follow)
        status = handles.regular(fd)
        try:
            self._root.walker.own.check_links(status)
        except OSError:
            os.close(fd)
            raise
        return fd, status

    def open_anything(self, name: bytes, *, follow: bool) -> int:
        """`open_read` of what may be no regular file: the caller looks before anything of it counts. Reading at an
        offset takes nothing out of pipes and terminals: they refuse it."""
        try:
            return os.open(component(name), handles.READ, dir_fd=self._fd)
        except OSError as error:
            if not follow or error.errno not in handles.LINK:
                raise handles.opening(error) from error
            with self._follow(name) as (folder, last):
                try:
                    return os.open(last or b".", handles.READ, dir_fd=folder)
                except OSError as inner:
                    raise handles.opening(inner) from inner

    def open_directory(self, name: bytes, *, follow: bool = False) -> PosixDirectory:
        try:
            return self._entered(os.open(component(name), handles.FOLDER, dir_fd=self._fd), name)
        except PermissionError:
            return self._entered(os.open(name, handles.LOOKUP, dir_fd=self._fd), name)
        except OSError as error:
            if error.errno not in handles.PERHAPS_LINK:
                raise
            if not follow:
                raise os_error(errno.ENOTDIR) from error
            walker = self._root.walker
            way = walker.expand(self._path, read_link(self._fd, name, error))
            return self._root.readable(*walker.walk(way, followed=True))

    def _entered(self, fd: int, name: bytes) -> PosixDirectory:
        where = (*self._path, name)
        walker = self._root.walker
        try:
            walker.disks.check(fd, where)
            if walker.own:
                walker.own.entered(fd, where)
        except BaseException:
            os.close(fd)
            raise
        return self._root.directory(fd, where)

    def create_temporary(self, name: bytes, mode: int = 0o600) -> int:
        return handles.create_temporary(self._fd, name, mode)

    def open_temporary(self, name: bytes) -> int:
        return handles.open_temporary(self._fd, name)

    def rename(self, old: bytes, new: bytes, target: Directory | None = None, *, replace_symlink: bool = True) -> None:
        fd = self._fd_of(target, new)
        if not replace_symlink and _is_link(fd, component(new)):
            raise os_error(errno.EEXIST)
        os.rename(component(old), component(new), src_dir_fd=self._fd, dst_dir_fd=fd)

    def link(self, old: bytes, new: bytes, target: Directory | None = None) -> None:
        fd = self._fd_of(target, new)
        os.link(component(old), component(new), src_dir_fd=self._fd, dst_dir_fd=fd, follow_symlinks=False)

    def rename_no_replace(self, old: bytes, new: bytes, target: Directory | None = None) -> None:
        rename_no_replace(self._fd, component(old), self._fd_of(target, new), component(new))

    def mkdir(self, name: bytes, mode: int = 0o777) -> None:
        os.mkdir(component(name), mode & PERMISSION_BITS, dir_fd=self._fd)

    def unlink(self, name: bytes) -> None:
        os.unlink(component(name), dir_fd=self._fd)

    def rmdir(self, name: bytes) -> None:
        os.rmdir(component(name), dir_fd=self._fd)

    def symlink(self, name: bytes, target: bytes) -> None:
        if b"\0" in target:
            raise IllegalName("has a target with a null byte")
        os.symlink(target, component(name), dir_fd=self._fd)

    def readlink(self, name: bytes) -> bytes:
        return os.readlink(component(name), dir_fd=self._fd)

    def set_times(self, name: bytes, mtime_ns: int, *, follow: bool = False) -> None:
        if follow and _is_link(self._fd, component(name)):
            with self._follow(name) as (folder, last):
                handles.set_times(folder, last or b".", mtime_ns)
        else:
            handles.set_times(self._fd, component(name), mtime_ns)

    def set_mode(self, name: bytes, mode: int, *, special: bool = False) -> None:
        handles.set_mode(self._fd, component(name), mode & (0o7777 if special else PERMISSION_BITS))

    def status(self) -> Node:
        return node_from_stat(self._path[-1] if self._path else b"", os.fstat(self._fd))

    def sync(self) -> None:
        handles.sync_folder(self._fd)

    def disk(self) -> int | None:
        return self._root.disk_of(self._fd)

    def sync_disk(self) -> None:
        self._root.sync_disk_of(self._fd)

    def fileno(self) -> int | None:
        return self._fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def arrival(self, name: bytes) -> int:
        """The handle of this folder for a name that is to be made in it."""
        return self._fd

    def _fd_of(self, target: Directory | None, name: bytes) -> int:
        if target is None:
            return self._fd
        if not isinstance(target, PosixDirectory) or target._root is not self._root:
            raise os_error(errno.EXDEV)
        return target.arrival(name)

    @contextlib.contextmanager
    def _follow(self, name: bytes) -> Iterator[tuple[int, bytes]]:
        """What the symlink ``name`` finally leads to: the handle of a folder and the name in it (empty: the folder)."""
        walker = self._root.walker
        fd, _, last = walker.resolve(walker.expand(self._path, os.readlink(component(name), dir_fd=self._fd)))
        try:
            yield fd, last
        finally:
            os.close(fd)


def _checked(path: CollectionPath) -> CollectionPath:
    for name in path:
        component(name)
    return path


def _is_link(fd: int, name: bytes) -> bool:
    try:
        return stat_bits.S_ISLNK(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False
