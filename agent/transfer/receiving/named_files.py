"""Large files that had their names when everything was killed, a moment before the journal was told.

The journal then has a part whose temporary is gone. Whether what has the name now is that file is found out by nothing
but its content: an inode's number may be another file's by now, and so may a time. The source says the digests of all
blocks, as `agent.transfer.receiving.reuse` asks for them, and what is here is read past the page cache where that is
possible. Attributes or an access list that it has not, as when the file system refused them, it is given once more.
"""

from __future__ import annotations

from stat import S_IMODE

import trio

from agent.storage import page_cache
from agent.storage.node import mtime_of
from agent.transfer.asking.source_session import SessionLost
from agent.transfer.basis.checksum import block_digests, file_digest
from agent.transfer.basis.compare import missing_ranges
from agent.transfer.basis.jobs import FileJob, LargeFile, NameFound, count_done
from agent.transfer.basis.journal_rows import PartialRow, bytes_done
from agent.transfer.basis.kept_attributes import give_access_list, give_attributes
from agent.transfer.course.run import Run
from agent.transfer.receiving.common_holes import common_holes
from agent.transfer.receiving.reuse import DIGESTS_AT_ONCE
from agent.transfer.settling.small_files import OWNER_ACCESS
from protocol.errors import TowpathError
from protocol.session import BLOCK_DIGESTS, DigestBlocks


async def named_file(run: Run, job: FileJob, known: PartialRow) -> NameFound | None:
    """The file of a part whose temporary is gone, if it has its name and is in everything what would be put there;
    durable, but for the name. None if it is not, or that cannot be told: an older version, something of somebody else.

    Raises OSError of the destination, and `SessionLost`.
    """
    if BLOCK_DIGESTS not in run.session.abilities:
        return None
    return await _Look(run, job, known).result()


class _Look:
    """One look at one file."""

    def __init__(self, run: Run, job: FileJob, known: PartialRow) -> None:
        self._run, self._root = run, run.context.root
        self._job, self._known = job, known
        self._descriptor = -1
        # Whether it has not all attributes that it is to have, or not its access list.
        self._lacks = False

    async def result(self) -> NameFound | None:
        job, known = self._job, self._known
        # As a temporary is opened: a regular file of our own which has no other name.
        self._descriptor = await trio.to_thread.run_sync(job.group.handle.open_temporary, job.name)
        try:
            if not await trio.to_thread.run_sync(self._could_be) or not await self._has_all_blocks():
                return None
            checksum = await trio.to_thread.run_sync(self._published_digest)
            if job.external_checksum is not None and checksum != job.external_checksum.lower():
                return None
            if self._lacks:
                await trio.to_thread.run_sync(self._give_again)
            if job.shared:
                status = await trio.to_thread.run_sync(self._root.fstat, self._descriptor)
                job.place = (status.st_dev, status.st_ino, status.st_size, mtime_of(status))
        except SessionLost:
            raise
        except TowpathError:
            # Whatever is wrong with the source or its file, reading it says so, and whether it passes.
            return None
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._root.close_file, self._descriptor)
        settled = bytes_done(known)
        file = LargeFile(job, known.temporary, -1, known.block, known.done, count_done(known.done), settled)
        # What arrived after the journal's last word.
        file.last_check = job.row.size - settled
        return NameFound(file, checksum)

    def _could_be(self) -> bool:
        """Whether all but the content is as sealing leaves a file, which is done before it gets its name; refusals
        counted in."""
        row, options, root = self._job.row, self._run.options, self._root
        status = root.fstat(self._descriptor)
        # To the nanosecond, but for file systems that keep whole seconds.
        times = (row.mtime_ns, row.mtime_ns // 10**9 * 10**9)
        if status.st_size != row.size or not self._has_rights(S_IMODE(status.st_mode)):
            return False
        if options.preserve_timestamp and mtime_of(status) not in times:
            return False
        if self._job.attributes:
            found = root.get_attributes(self._descriptor).attributes
            self._lacks |= not set(found) >= set(self._job.attributes)
        return True

    def _has_rights(self, mode: int) -> bool:
        """Whether its mode is right, and its access list; or as it is where a list was refused."""
        job, mode_mask, wanted = self._job, self._run.context.mode_mask, self._job.access
        found = b"" if wanted is None else self._root.get_access_lists(self._descriptor).access
        if mode == job.mode(mode_mask) and found == (wanted.packed if wanted is not None and wanted.extended else b""):
            return True
        self._lacks = wanted is not None and not found and mode == job.row.mode & mode_mask
        return self._lacks

    def _give_again(self) -> None:
        """What it lacks, in the order of sealing; what is refused now is told and counted. Raises OSError."""
        root, job, mode_mask = self._root, self._job, self._run.context.mode_mask
        if job.attributes:
            root.fchmod(self._descriptor, OWNER_ACCESS)
            give_attributes(root, job, self._descriptor, self._run.attribute_refused)
        if job.access is None:
            root.fchmod(self._descriptor, job.mode(mode_mask))
        else:
            give_access_list(root, job, self._descriptor, mode_mask, self._run.attribute_refused)
        root.fsync(self._descriptor)

    async def _has_all_blocks(self) -> bool:
        """Whether every block is on the disk as the source has it."""
        job, block = self._job, self._known.block
        await trio.to_thread.run_sync(self._make_durable)
        holes = await common_holes(self._run, job, self._descriptor, block)
        for offset, length in missing_ranges(holes, job.row.size, block, DIGESTS_AT_ONCE * block):
            first, count = offset // block, -(-length // block)
            theirs = await self._run.session.block_digests(
                job.source_path, job.row.version, block, first, count, follow=job.follow
            )
            request = DigestBlocks(0, b"", job.row.version, block, first, count)
            if theirs != await trio.to_thread.run_sync(block_digests, self._root, self._descriptor, request):
                return False
        return True

    def _make_durable(self) -> None:
        self._root.fsync(self._descriptor)
        if self._run.options.verify_checksum:
            page_cache.forget(self._descriptor)

    def _published_digest(self) -> str | None:
        job = self._job
        if job.external_checksum is None and job.algorithm is None:
            return None
        return file_digest(self._root, self._descriptor, job.algorithm or "MD5")
