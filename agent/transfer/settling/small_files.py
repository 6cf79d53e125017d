"""Small files on their way to a final name: written to temporaries, read back after they were synced.

The descriptor of a temporary stays open from its creation until it was read back, as far as the process's limit
allows, so that nothing is opened twice. The settler's thread calls everything here but `SmallFiles.sync`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable

import msgspec

from agent.storage import page_cache
from agent.storage.base import Root
from agent.storage.faults import fault
from agent.storage.handles import os_error
from agent.system.limits import open_files, raise_open_files
from agent.transfer.basis.jobs import FileJob, Group, PackArrived
from agent.transfer.basis.kept_attributes import Refused, give_access_list, give_attributes
from agent.transfer.basis.patience import PART_LOST, VERIFY_CHECKSUM
from agent.transfer.books.journal import Journal
from agent.transfer.settling.held import Holder
from protocol.errors import RetryLater, TowpathError
from protocol.lane import digest as content_digest
from protocol.names import escape
from protocol.session import MAX_BLOCK, join_path

# What the owner needs to write a temporary that is opened anew, or to set its attributes.
OWNER_ACCESS = 0o600
# A temporary must be readable for its check; a mode without this bit is set, and synced, just before the rename.
OWNER_READS = 0o400
# Descriptors left to everything else in the process (directories being worked on, large files, sockets).
_OTHER_DESCRIPTORS = 512


class Temporary(msgspec.Struct, eq=False):
    """A small file that lies whole in a temporary. ``descriptor`` is -1 when it could not be kept open, or another
    process (``holder``) holds it, as the file of this index in request ``r``."""

    job: FileJob
    name: bytes
    digest: bytes
    descriptor: int
    holder: Holder | None = None
    r: int = 0
    index: int = 0


def raise_descriptor_limit() -> None:
    """Let this process keep as many files open as the system's hard limit allows, within reason."""
    raise_open_files(65536)


class Remover:
    """Removes temporaries. What cannot be removed now stays in the journal and is tried again at the end of the run.
    Any thread may call."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def remove(self, group: Group, temporary: bytes) -> None:
        """Remove a temporary of a group if it is there."""
        try:
            group.handle.unlink(temporary)
        except FileNotFoundError:
            return
        except OSError:
            # Before the group can be marked done, after which nobody sweeps its folder.
            self._journal.add_left_behind(group.destination, temporary)

    def remove_part(self, group: Group, temporary: bytes) -> None:
        """The same for what is left of a large file of a group that is done. The handle of one that could not be opened
        is another folder's: then it is tried in the end."""
        if join_path(group.handle.path) == group.destination:
            self.remove(group, temporary)
        else:
            self._journal.add_left_behind(group.destination, temporary)


class SmallFiles:
    """Writes and reads back. Failures are reported one by one and end nothing else."""

    def __init__(
        self,
        root: Root,
        *,
        mode_mask: int,
        preserve_timestamp: bool,
        temporary_name: Callable[[], bytes],
        failed: Callable[[FileJob, TowpathError], None],
        refused: Refused,
        remover: Remover,
    ) -> None:
        self._root = root
        self._remover = remover
        self._mode_mask = mode_mask
        self._preserve_timestamp = preserve_timestamp
        self._temporary_name = temporary_name
        self._failed = failed
        self._refused = refused
        self._kept = 0
        self._keep = max(0, open_files() - _OTHER_DESCRIPTORS)
        # Made when the first file is read back: filling it with zeros takes half a millisecond of a task's beginning.
        self._buffer = memoryview(bytearray())
        self._in_memory = root.features.in_memory

    def write(self, pack: PackArrived, into: list[Temporary]) -> int:
        """Write every file of a pack to a temporary; those that could be written are added to ``into``. Their bytes."""
        size = 0
        write_whole, temporary_name, mask = self._root.write_whole, self._temporary_name, self._mode_mask
        dated, keep = self._preserve_timestamp, self._keep
        for job, content, digest in zip(pack.jobs, pack.contents, pack.digests, strict=True):
            name, row, handle = temporary_name(), job.row, job.group.handle
            mtime_ns = row.mtime_ns if dated else None
            try:
                mode = row.mode & mask | OWNER_READS
                if job.attributes or job.access is not None:
                    # With a list to come, nobody else reads it before by the list that its folder gives.
                    first = OWNER_ACCESS if job.access is not None else mode | OWNER_ACCESS
                    descriptor = write_whole(handle, name, first, content, mtime_ns)
                    self._give_attributes(job, descriptor, mode)
                else:
                    descriptor = write_whole(handle, name, mode, content, mtime_ns)
                if self._kept < keep:
                    self._kept += 1
                else:
                    held, descriptor = descriptor, -1
                    self._root.close_file(held)
            except OSError as error:
                self._remover.remove(job.group, name)
                self._failed(job, fault(error, "destination", job.destination_path))
                continue
            size += row.size
            into.append(Temporary(job, name, digest, descriptor))
        return size

    def _give_attributes(self, job: FileJob, descriptor: int, mode: int) -> None:
        try:
            give_attributes(self._root, job, descriptor, self._refused)
            if job.access is not None:
                give_access_list(self._root, job, descriptor, self._mode_mask, self._refused, owner=OWNER_READS >> 6)
            elif mode & OWNER_ACCESS != OWNER_ACCESS:
                self._root.fchmod(descriptor, mode)
        except BaseException:
            self._root.close_file(descriptor)
            raise

    def sync(self, item: Temporary) -> None:
        """Make one temporary durable. Raises OSError; may be called from any one thread while its content rests."""
        if item.descriptor >= 0:
            self._root.fsync(item.descriptor)
            return
        descriptor = item.job.group.handle.open_temporary(item.name)
        try:
            self._root.fsync(descriptor)
        finally:
            self._root.close_file(descriptor)

    def read_back(self, items: list[Temporary]) -> list[Temporary]:
        """Those that read back as they were sent, past the page cache where the system allows; the others fail."""
        # All are dropped from the cache and asked for before the first is waited for, so that the disk sees a queue.
        on_disk = [item for in_memory, some in self.by_place(items) if not in_memory for item in some]
        descriptors = [item.descriptor for item in on_disk if item.descriptor >= 0 and item.job.row.size]
        for step in (page_cache.forget, page_cache.want):
            for descriptor in descriptors:
                step(descriptor)
        return [item for item in items if self._reads_back(item)]

    def by_place(self, items: list[Temporary]) -> list[tuple[bool, list[Temporary]]]:
        """Those that live in memory alone (True), where no other copy is to be read, and those on a disk, which may be
        mounted below a root in memory."""
        if not self._in_memory or not items:
            return [(False, items)] if items else []
        device = self._root.identity()[0]
        groups = {id(item.job.group): item.job.group.handle for item in items}
        here = {key for key, handle in groups.items() if handle.disk() == device}
        places: dict[bool, list[Temporary]] = {}
        for item in items:
            places.setdefault(id(item.job.group) in here, []).append(item)
        return list(places.items())

    def _reads_back(self, item: Temporary) -> bool:
        try:
            if item.descriptor < 0:
                item.descriptor = item.job.group.handle.open_temporary(item.name)
                self._kept += 1
                page_cache.forget(item.descriptor)
            size = item.job.row.size
            if len(self._buffer) <= size:
                self._buffer = memoryview(bytearray(max(size + 1, MAX_BLOCK // 8)))
            # One byte more than there should be, so that a file that grew is noticed.
            view = self._buffer[: size + 1]
            read = self._root.preadv(item.descriptor, (view,), 0)
            while 0 < read < size:
                more = self._root.preadv(item.descriptor, (view[read:],), read)
                if not more:
                    break
                read += more
        except OSError as error:
            self.drop(item, temporary_fault(error, item.job))
            return False
        if read == size and content_digest(self._buffer[:size]) == item.digest:
            return True
        self.drop(item, _differs(item.job))
        return False

    def not_read_back(self, item: Temporary, number: int) -> None:
        """Fail what another process could not read back: for the system's number, or 0 for another content."""
        error = OSError(number, os.strerror(number))
        self.drop(item, temporary_fault(error, item.job) if number else _differs(item.job))

    def let_go(self, item: Temporary) -> None:
        """Give the descriptor of a temporary back that was checked and gets its name now. Raises OSError, also for a
        delayed write error."""
        job = item.job
        mode = job.row.mode & self._mode_mask if job.access is None else job.access.mode
        if not mode & OWNER_READS:
            self._keep_owner_out(item, mode)
        descriptor = item.descriptor
        if descriptor >= 0:
            item.descriptor = -1
            self._kept -= 1
            self._root.close_file(descriptor)

    def _keep_owner_out(self, item: Temporary, mode: int) -> None:
        """Give it the mode that lets its owner not read it: durably, because what is under its final name is taken for
        finished."""
        if item.descriptor < 0:
            item.descriptor = item.job.group.handle.open_temporary(item.name)
            self._kept += 1
        self._root.fchmod(item.descriptor, mode)
        self._root.fsync(item.descriptor)

    def close(self, item: Temporary) -> None:
        """Give the descriptor of a temporary back. Raises OSError for a delayed write error."""
        if item.descriptor >= 0:
            descriptor, item.descriptor = item.descriptor, -1
            self._kept -= 1
            self._root.close_file(descriptor)

    def drop(self, item: Temporary, error: TowpathError) -> None:
        """Remove a temporary that is no good and fail its job."""
        with contextlib.suppress(OSError):
            self.close(item)
        self._remover.remove(item.job.group, item.name)
        self._failed(item.job, error)


def temporary_fault(error: OSError, job: FileJob, renamed: bytes = b"") -> TowpathError:
    """What it means that something cannot be done to the temporary of a file. One that is gone was removed by somebody,
    and the file is fetched anew; where its folder is gone, making another one says so. Where it was to be ``renamed``
    and is there, its final name is one that cannot be: so exfat-fuse refuses those."""
    if isinstance(error, FileNotFoundError):
        if not renamed or not _is_there(job, renamed):
            return part_lost(job)
        error = os_error(errno.EILSEQ)
    return fault(error, "destination", job.destination_path)


def _is_there(job: FileJob, temporary: bytes) -> bool:
    try:
        job.group.handle.lstat(temporary)
    except OSError:
        return False
    return True


def part_lost(job: FileJob) -> RetryLater:
    """Somebody has removed or changed what had arrived of a file."""
    name = escape(job.destination_path)
    sentence = (
        f"What had arrived of {name[:1000]} was removed or changed at the destination before it had its name; it is "
        "transferred again."
    )
    return RetryLater(sentence, code=PART_LOST, who="destination owner", subject=name)


def _differs(job: FileJob) -> RetryLater:
    name = escape(job.destination_path)
    return RetryLater(
        f"{name} reads back from the destination's storage other than it was written; it is transferred again.",
        code=VERIFY_CHECKSUM,
        who="destination owner",
        subject=name,
    )
