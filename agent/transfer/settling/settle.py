"""Settling: small files are written, and temporaries turned into final names, in the only safe order.

sync the temporaries → read them back (when asked to verify) → rename → sync the directories → manifest → journal.

One thread does it, and only that one: several would hand the interpreter's lock to one another at every system call.

Small files go through it in batches. While a batch is being synced in a side thread the next one is written, and one
sync serves two batches: it makes the temporaries of one durable and the names of the one before, which the same thread
then enters in the books while the settler reads the temporaries back. Large files are synced and read back in two
further ones (`agent.transfer.settling.block_check`).
"""

from __future__ import annotations

import contextlib
import itertools
import queue
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeAlias

from agent.storage.base import Root
from agent.storage.faults import fault
from agent.transfer.basis.checksum import published_digest
from agent.transfer.basis.jobs import (
    Abandoned,
    AllArrived,
    AllThere,
    BlocksChecked,
    BlocksWritten,
    FileJob,
    FileSealed,
    Group,
    GroupListed,
    HardLinkWanted,
    LargeFile,
    LinkWanted,
    NameFound,
    Outcome,
    PackArrived,
    PartDropped,
    ToSettle,
)
from agent.transfer.basis.patience import PART_LOST, VERIFY_CHECKSUM
from agent.transfer.books.journal import Journal
from agent.transfer.books.manifest import ManifestWriter
from agent.transfer.books.record import Record
from agent.transfer.settling.batch import (
    FSYNCS_AT_ONCE,
    Batch,
    Closed,
    Discarded,
    Recorded,
    Settled,
    sync_disks,
    sync_each,
)
from agent.transfer.settling.block_check import BlockChecker, CheckLine
from agent.transfer.settling.held import HeldChecked, HolderLost, PackHeld
from agent.transfer.settling.held_batches import HeldBatches
from agent.transfer.settling.links import add_name, make_link, place_of
from agent.transfer.settling.side_thread import AnswersFirst, Broken, LookAgain, SideThread
from agent.transfer.settling.small_files import Remover, SmallFiles, Temporary, temporary_fault
from protocol.errors import ItemFailed, TowpathError

# A batch is synced when it holds this much, or when nothing more has come for a moment (seconds).
BATCH_BYTES = 12 * 1024 * 1024
BATCH_FILES = 4096
LINGER = 0.01
# Jobs without content that wait for the next commit.
OUTCOMES_AT_ONCE = 4096


class SettleReports(Protocol):
    """What the settler tells the trio thread; every method may be called from any thread and returns at once."""

    def settled(self, jobs: list[FileJob], released: int) -> None: ...
    def blocks_settled(self, size: int) -> None: ...
    def job_failed(self, job: FileJob, error: TowpathError) -> None: ...
    def attribute_refused(self, job: FileJob, error: OSError, code: str) -> None: ...
    def hard_link_failed(self, job: FileJob, error: OSError) -> None: ...
    def file_failed(self, file: LargeFile, error: TowpathError) -> None: ...
    def refetch(self, file: LargeFile, index: int) -> None: ...
    def abandoned(self, file: LargeFile, error: TowpathError) -> None: ...
    def groups_done(self, groups: list[Group]) -> None: ...


_Answer: TypeAlias = ToSettle | Batch | Recorded | Discarded | Closed | PackHeld | HeldChecked | HolderLost
_Item: TypeAlias = _Answer | LookAgain | Broken


class Settler:
    """`run` blocks until `stop`; an error it raises ends the run of the task."""

    def __init__(
        self,
        root: Root,
        journal: Journal,
        manifests: tuple[ManifestWriter, ManifestWriter],
        *,
        verify: bool,
        preserve_timestamp: bool,
        mode_mask: int,
        reports: SettleReports,
        temporary_name: Callable[[], bytes],
        now: Callable[[], str],
    ) -> None:
        self.queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        # The disk must not wait until everything that has arrived is written.
        self._first = AnswersFirst[_Item](self.queue)
        self.remover = Remover(journal)
        self.record = Record(
            journal,
            manifests,
            verify=verify,
            now=now,
            remove=self.remover.remove_part,
            probe=temporary_name,
        )
        self._root = root
        self._verify = verify
        self._preserve_timestamp = preserve_timestamp
        self._reports = reports
        self._temporary_name = temporary_name
        self._small = SmallFiles(
            root,
            mode_mask=mode_mask,
            preserve_timestamp=preserve_timestamp,
            temporary_name=temporary_name,
            failed=reports.job_failed,
            refused=reports.attribute_refused,
            remover=self.remover,
        )
        self._checker = BlockChecker(
            root,
            journal,
            verify=verify,
            mode_mask=mode_mask,
            preserve_timestamp=preserve_timestamp,
            refused=reports.attribute_refused,
            remover=self.remover,
        )
        self._written: list[Temporary] = []
        self._written_bytes = 0
        self._names = Settled()
        self._syncing = False
        # Batches whose names are not in the books yet.
        self._records = 0
        # How long what is here waits for more (seconds).
        self._linger = LINGER
        # Being synced or read back.
        self._batches: list[list[Temporary]] = []
        # Being read back by the processes that hold them.
        self._held = HeldBatches()

    def stop(self) -> None:
        """Let `run` settle what is queued and return."""
        self.queue.put(None)

    def run(self) -> None:
        """Settle until stopped. Raises `TowpathError` when nothing can be settled any more (a full disk)."""
        try:
            with (
                # No thread of it is started before there are several to sync.
                ThreadPoolExecutor(FSYNCS_AT_ONCE, "fsync") as self._fsyncs,
                SideThread[_Answer]("sync", self._first) as syncs,
                CheckLine[_Answer](self._checker, self.queue) as checks,
            ):
                self._syncs, self._checks = syncs, checks
                self._loop()
        except OSError as error:
            raise fault(error, "destination", b"") from error
        finally:
            for item in itertools.chain(self._written, *self._batches):
                with contextlib.suppress(OSError):
                    # Only after an error: what is not settled is swept and transferred again.
                    self._small.close(item)

    def _loop(self) -> None:
        stopping = False
        while not stopping or self._busy:
            try:
                linger = 0 if stopping else self._linger
                item = self.queue.get(timeout=linger if self._lingering else None)
            except queue.Empty:
                self._settle_now()
                continue
            while self._first.waiting:
                self._take(self._first.waiting.popleft())
            if item is None:
                stopping = True
            else:
                self._take(item)
            self._look()

    @property
    def _lingering(self) -> bool:
        """Something waits for more to come."""
        return not self._syncing and bool(self._written or self._names)

    @property
    def _busy(self) -> bool:
        asked = self._syncing or self._records or self._held or self._checks.asked
        return bool(asked or self._written or self._names or not self.queue.empty())

    def _look(self) -> None:
        """Settle when enough has come together."""
        names = self._names
        full = not self._syncing and (self._written_bytes >= BATCH_BYTES or len(self._written) >= BATCH_FILES)
        if full or names.checked_bytes >= BATCH_BYTES or len(names.outcomes) >= OUTCOMES_AT_ONCE:
            self._settle_now()

    def _settle_now(self) -> None:
        """Sync what waits for it, in the side thread; what needs no sync is recorded at once."""
        if self._written or self._names.folders:
            if self._syncing:
                return
            batch = Batch(self._written, self._names)
            self._written, self._written_bytes, self._names = [], 0, Settled()
            self._syncing = True
            self._batches.append(batch.files)
            self._syncs.ask(partial(self._sync, batch))
            self._records += 1
            self._syncs.ask(partial(self._record_synced, batch))
        elif self._names:
            names, self._names = self._names, Settled()
            self._record(names)

    def _take(self, item: _Item) -> None:
        if isinstance(item, PackArrived):
            self._written_bytes += self._small.write(item, self._written)
        elif isinstance(item, PackHeld):
            self._pack_held(item)
        elif isinstance(item, HeldChecked):
            self._held_checked(item)
        elif isinstance(item, HolderLost):
            self._holder_lost(item)
        elif isinstance(item, Batch):
            self._synced(item)
        elif isinstance(item, BlocksWritten):
            self._checks.check(item.file)
        elif isinstance(item, BlocksChecked):
            self._blocks_checked(item)
        elif isinstance(item, AllThere):
            self._checks.finish(partial(self._checker.seal, item.file))
        elif isinstance(item, FileSealed):
            self._file_sealed(item)
        elif isinstance(item, NameFound):
            self._has_name(item.file, item.checksum)
        elif isinstance(item, LinkWanted):
            self._link(item)
        elif isinstance(item, HardLinkWanted):
            self._hard_link(item)
        elif isinstance(item, Abandoned):
            self._checks.ask(partial(self._abandon, item))
        elif isinstance(item, PartDropped):
            self.record.known_part_dropped(item.job, item.temporary)
        elif isinstance(item, Closed):
            self._checks.asked -= 1
            self._checker.keep(item.item.file)
            self._reports.abandoned(item.item.file, item.item.error)
        elif isinstance(item, Outcome):
            self._outcome(item)
        elif isinstance(item, Discarded):
            self._checks.asked -= 1
            self.record.part_dropped(item.file)
            self._names.outcomes.append(item.outcome)
        elif isinstance(item, GroupListed):
            self._names.listed.append(item.group)
            if item.group.made_folders:
                self._names.touch(item.group)
        elif isinstance(item, Recorded):
            self._records -= 1
        elif isinstance(item, LookAgain):
            return
        elif isinstance(item, AllArrived):
            # What is fetched again from now on are single files.
            self._linger = 0.0
        elif isinstance(item, Broken):
            raise item.__cause__ or item

    # --- small files -----------------------------------------------------------------------------------

    def _sync(self, batch: Batch) -> Batch:
        """In the side thread: make temporaries and names durable."""
        alone = sync_disks(batch)
        files = [item for item in batch.files if id(item.job.group) in alone]
        folders = [handle.sync for group, handle in batch.names.folders.items() if group in alone]
        errors = sync_each([*(partial(self._small.sync, item) for item in files), *folders], self._fsyncs)
        batch.failed += [(item, error) for item, error in zip(files, errors, strict=False) if error is not None]
        for error in errors[len(files) :]:
            if error is not None:
                raise error
        batch.names_durable = True
        return batch

    def _synced(self, batch: Batch) -> None:
        self._syncing = False
        # The next batch goes to the disk while this one is read from it.
        self._look()
        files = batch.files
        if batch.failed:
            for item, error in batch.failed:
                self._small.drop(item, temporary_fault(error, item.job))
            self._held.release([item for item, _ in batch.failed])
            lost = {id(item) for item, _ in batch.failed}
            files = [item for item in files if id(item) not in lost]
        del self._batches[0]
        if not self._verify:
            self._held.release(files)
        else:
            held = [item for item in files if item.holder is not None]
            for in_memory, items in self._small.by_place(held):
                self._held.check(items, in_memory=in_memory)
            files = [item for item in files if item.holder is None]
        self._finish(files)

    def _finish(self, files: list[Temporary]) -> None:
        """Read back what lies here, and give all a name."""
        self._batches.append(files)
        self._give_names(self._small.read_back(files) if self._verify else files)
        self._batches.remove(files)

    # --- small files that other processes hold ----------------------------------------------------------

    def _pack_held(self, pack: PackHeld) -> None:
        for job, index, name, digest in zip(pack.jobs, pack.indices, pack.names, pack.digests, strict=True):
            self._written.append(Temporary(job, name, digest, -1, pack.holder, pack.r, index))
            self._written_bytes += job.row.size
        for job, name, error in pack.failed:
            self.remover.remove(job.group, name)
            self._reports.job_failed(job, error)

    def _held_checked(self, answer: HeldChecked) -> None:
        for item, number in self._held.answered(answer):
            if number is None:
                self._give_names((item,))
            else:
                self._small.not_read_back(item, number)

    def _holder_lost(self, lost: HolderLost) -> None:
        """What a process held is looked at from here, now that it is gone."""
        asked = self._held.lost(lost.holder)
        for item in itertools.chain(self._written, *self._batches, asked):
            if item.holder is lost.holder:
                item.holder = None
        self._finish(asked)
        for group, name in lost.orphans:
            self.remover.remove(group, name)

    # --- small files that have their names ---------------------------------------------------------------

    def _give_names(self, items: Iterable[Temporary]) -> None:
        """Small files that are durable, and were checked, get their names."""
        let_go, transferred, folders = self._small.let_go, self._names.transferred, self._names.folders
        for item in items:
            job, group = item.job, item.job.group
            handle, checksum = group.handle, None
            try:
                if job.external_checksum is not None or job.algorithm is not None:
                    checksum = published_digest(self._root, job, item.name)
                let_go(item)
                place = place_of(handle, item.name) if job.shared else None
                handle.rename(item.name, job.name)
            except TowpathError as error:
                self._small.drop(item, error)
            except OSError as error:
                self._small.drop(item, temporary_fault(error, job, item.name))
            else:
                job.place = place
                transferred.append((job, checksum))
                folders[id(group)] = handle

    # --- large files -----------------------------------------------------------------------------------

    def _blocks_checked(self, item: BlocksChecked) -> None:
        self._checks.asked -= 1
        file = item.file
        self._names.checked_bytes += item.size
        if item.error is None:
            file.mark = item.mark or file.mark
            for index in item.good:
                file.mark_done(index)
        file.checked(item.taken)
        if item.error is not None:
            file.failed = True
            self._reports.file_failed(file, fault(item.error, "destination", file.job.destination_path))
            return
        for index in item.bad:
            self._reports.refetch(file, index)
        if not item.good:
            return
        size = sum(map(file.length_of, item.good))
        if file.complete:
            # Counts together with the name: until then the journal has the file as it was before this check.
            file.last_check, file.last_charged = size, item.size
            self._names.checked_bytes -= item.size
            self._checks.finish(partial(self._checker.seal, file))
        else:
            self.record.part_settled(file, size)

    def _file_sealed(self, item: FileSealed) -> None:
        self._checks.asked -= 1
        file, job = item.file, item.file.job
        self._names.checked_bytes += file.last_charged
        file.last_charged = 0
        checksum = None
        try:
            if item.error is not None:
                raise item.error
            if job.external_checksum is not None or job.algorithm is not None:
                checksum = published_digest(self._root, job, file.temporary)
            place = place_of(job.group.handle, file.temporary) if job.shared else None
            job.group.handle.rename(file.temporary, job.name)
        except (TowpathError, OSError) as error:
            problem = temporary_fault(error, job, file.temporary) if isinstance(error, OSError) else error
            self._not_named(file, problem)
            return
        job.place = place
        self._has_name(file, checksum)

    def _not_named(self, file: LargeFile, error: TowpathError) -> None:
        """A complete file did not get its name. It waits for the next attempt, which may be much later, where there is
        one and nothing is wrong with what is in it."""
        if isinstance(error, ItemFailed) or error.code in (PART_LOST, VERIFY_CHECKSUM):
            self.remover.remove(file.job.group, file.temporary)
            self.record.part_dropped(file)
        else:
            self.record.part_settled(file, file.last_check)
        self._reports.job_failed(file.job, error)

    def _has_name(self, file: LargeFile, checksum: str | None) -> None:
        """All that is missing is the sync of its folder, and its place in the books."""
        self._names.transferred.append((file.job, checksum))
        self._names.complete.append(file)
        self._names.touch(file.job.group)

    # --- links, errors --------------------------------------------------------------------------------

    def _link(self, link: LinkWanted) -> None:
        job, temporary = link.job, self._temporary_name()
        error = make_link(link, temporary, preserve_timestamp=self._preserve_timestamp)
        if error is not None:
            self.remover.remove(job.group, temporary)
            self._reports.job_failed(job, error)
            return
        self._names.linked.append(job)
        self._names.touch(job.group)

    def _hard_link(self, link: HardLinkWanted) -> None:
        job, temporary = link.job, self._temporary_name()
        try:
            add_name(self._root, link, temporary)
        except OSError as error:
            self.remover.remove(job.group, temporary)
            self._reports.hard_link_failed(job, error)
            return
        # Where the name was one of this file already, renaming has changed nothing.
        self.remover.remove(job.group, temporary)
        job.linked = True
        self._names.transferred.append((job, None))
        self._names.touch(job.group)

    def _outcome(self, outcome: Outcome) -> None:
        file = outcome.discard
        if file is None:
            self._names.outcomes.append(outcome)
        else:
            # Its blocks may be being checked now: the descriptor is closed behind that.
            self._checks.ask(partial(self._discard, replace(outcome, discard=None), file))

    def _discard(self, outcome: Outcome, file: LargeFile) -> Discarded:
        """In the side thread."""
        self._checker.discard(file)
        return Discarded(outcome, file)

    def _abandon(self, item: Abandoned) -> Closed:
        """In the side thread."""
        return Closed(self._checker.abandon(item))

    # --- bookkeeping -----------------------------------------------------------------------------------

    def _record(self, names: Settled) -> None:
        """In the side thread, or here for what needs no sync."""
        if not names:
            return
        done = self.record.settled(names.transferred, names.linked, names.outcomes, names.complete, names.listed)
        jobs = [job for job, _ in names.transferred] + names.linked + [outcome.job for outcome in names.outcomes]
        self._reports.settled(jobs, sum(job.charged for job in jobs))
        if names.checked_bytes:
            self._reports.blocks_settled(names.checked_bytes)
        if done:
            self._reports.groups_done(done)

    def _record_synced(self, batch: Batch) -> Recorded:
        """In the side thread, after the sync: temporaries are read back meanwhile."""
        if batch.names_durable:
            self._record(batch.names)
        return Recorded()
