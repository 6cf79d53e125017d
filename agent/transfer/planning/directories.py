"""Listing the directories of a run, and handing out what is to be done in them, a little ahead of it.

A few tasks list at once, depth first, so that round trips overlap and few directories wait.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, closing
from functools import partial

import msgspec
import trio

from agent.storage.disks import DISK_MISSING, DISK_REPLACED
from agent.storage.faults import fault
from agent.transfer.asking.budget import charge
from agent.transfer.basis.jobs import FileJob, Group, GroupListed, LinkWanted
from agent.transfer.basis.journal_rows import DirectoryRow
from agent.transfer.basis.storage_threads import StorageThreads
from agent.transfer.course.run import Run
from agent.transfer.planning.extras import KeptExtra
from agent.transfer.planning.filled_places import SEVERAL, FilledPlaces
from agent.transfer.planning.gathered_names import GatheredNames, SpelledThere, pieces
from agent.transfer.planning.listing_queue import ListingQueue
from agent.transfer.planning.plan import DirectoryPlanner, Planned
from agent.transfer.planning.second_look import GONE, SecondLook
from protocol.errors import ItemFailed, NeedsPerson, RetryLater, TaskFailed, TowpathError
from protocol.names import CollectionPath, format_path, parse_path_untrusted, split_path
from protocol.session import DIRECTORY, Row

# Round trips that overlap while directories are listed.
LISTERS = 16
# What is said, once, where a mirror leaves something that the source has not listed.
_KEPT = {
    KeptExtra.SHARED: SEVERAL,
    KeptExtra.HIDDEN: "In {place} there are names that begin with a dot, and the source's collection does not show "
    "such names, so that nobody can tell whether the source has them: they are not deleted. If they are not wanted, "
    "remove them there by hand.",
    KeptExtra.CHANGED: "Names changed in the source's folder of {place} while they were listed, so that one may be "
    "missing in the list that was there all the time: nothing is deleted in such folders now. The next mirror "
    "finds what is left.",
    KeptExtra.LINKED: "{place} is reached by a link that leads out of the mirrored folder: what the source has goes "
    "there, as the link says, but nothing is deleted there. Replace the link by a folder, or mirror into the folder "
    "that it leads to.",
}


class _NotOpened(Exception):
    """The destination directory cannot be opened or made."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


def _disk_is_away(error: TowpathError) -> bool:
    """Whether a folder waits for its disk, at either side, while the others are transferred."""
    return isinstance(error, NeedsPerson) and error.code in (DISK_MISSING, DISK_REPLACED)


class DirectoryWalk:
    """Lists every directory the journal knows of, until none waits."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._threads = StorageThreads(run.context.root.features.file_system)
        items = run.context.order.items or () if run.options.delete_destination_extra else ()
        self._filled = FilledPlaces(items)
        self._told_of_kept: set[KeptExtra] = set()
        self._large_folder = trio.Lock()
        self.second_look = SecondLook(run, partial(self._tell_of_kept, KeptExtra.CHANGED))

    async def run(self) -> None:
        """Returns when everything is handed out."""
        queue = ListingQueue(self._run.context.journal)
        async with trio.open_nursery() as nursery:
            for _ in range(LISTERS):
                nursery.start_soon(self._take, queue)

    async def _take(self, queue: ListingQueue) -> None:
        while row := await queue.take():
            try:
                await self._list(row, queue)
            finally:
                queue.finished()

    async def _list(self, row: DirectoryRow, queue: ListingQueue) -> None:
        await self._run.slot()
        with closing(self._planner(row)) as planner:
            await self._list_with(planner, row, queue)

    def _planner(self, row: DirectoryRow) -> DirectoryPlanner:
        run, context = self._run, self._run.context
        return DirectoryPlanner(
            context.root,
            context.journal,
            run.options,
            row,
            prefix=context.temporary_prefix,
            sweep=run.sweep if run.resumed else None,
            patience=context.patience,
            filled=self._filled,
            top=self._top_of(row),
            one_machine=context.one_machine,
        )

    async def _list_with(self, planner: DirectoryPlanner, row: DirectoryRow, queue: ListingQueue) -> None:
        run = self._run
        follow = run.options.recursive_symlinks == "copy"
        if (run.options.preserve_xattrs or run.options.preserve_acls) and not await self._prepare(planner, row):
            return
        try:
            listing_of = run.session.list_directory
            async with aclosing(listing_of(row.source, follow=follow, on_end=planner.note_end)) as batches:
                async for rows in batches:
                    planned = None if planner.folds else await self._take_rows(planner, rows)
                    if planned is None:
                        await self._gather(planner, rows, batches, queue)
                    else:
                        await self._planned(planned, queue)
        except _NotOpened as problem:
            await self._not_opened(row, fault(problem.error, "destination", row.destination))
            return
        except TowpathError as error:
            await self._at_source(planner, row, error)
            return
        self.second_look.listed(recent=planner.source_recent, changed=planner.source_changed)
        if planner.source_mtime_ns != row.mtime_ns:
            await self._threads.run(planner.note_time)
        if run.options.delete_destination_extra:
            await self._note_extra(planner.group, row, planner)
        run.settle.put(GroupListed(planner.group))

    async def _gather(
        self, planner: DirectoryPlanner, rows: list[Row], batches: AsyncIterator[list[Row]], queue: ListingQueue
    ) -> None:
        """Plan a folder whose names may be one name here, once they are all known; of those with more than are held in
        memory, one at a time. Raises `ItemFailed` for names that cannot be compared."""
        run = self._threads.run
        async with AsyncExitStack() as stack:
            gathered = stack.enter_context(closing(GatheredNames(self._run.context.journal.path.parent)))
            await run(partial(gathered.add_untrusted, rows))
            async for more in batches:
                await run(partial(gathered.add_untrusted, more))
            there = None
            if gathered.are_many:
                await stack.enter_async_context(self._large_folder)
                there = stack.enter_context(closing(SpelledThere(planner.group.handle, gathered.directory)))
            portions = gathered.portions()
            while portion := await run(partial(next, portions, [])):
                await run(partial(planner.compare_names, portion, there.of if there else None))
                for some in pieces(portion):
                    await self._planned(await run(partial(planner.plan, some)), queue)
            # What was large on disk takes a moment to go.
            await run(gathered.close)
            if there is not None:
                await run(there.close)

    def _top_of(self, row: DirectoryRow) -> CollectionPath:
        """Where the item of a folder leads to."""
        return parse_path_untrusted((self._run.context.order.items or [])[row.item].destination_path)

    async def _at_source(self, planner: DirectoryPlanner, row: DirectoryRow, error: TowpathError) -> None:
        """The source cannot list or look at the folder: left to a later run, or failed by itself. Raises the error
        where the run is to begin anew."""
        if _disk_is_away(error) and not (planner.opened and planner.group.planned):
            self._put_off(error, planner.group if planner.opened else None)
            return
        may_pass = isinstance(error, RetryLater | NeedsPerson | TaskFailed)
        if may_pass and not self._run.context.patience.lasts_at_source(row.source, error):
            raise error
        await self._not_listed(planner, row, error)

    async def _prepare(self, planner: DirectoryPlanner, row: DirectoryRow) -> bool:
        """Give the folder here its attributes and access lists before anything is in it: a list that it has from the
        folder above may let others look. False when that cannot be, which is settled then."""
        try:
            await self._take_rows(planner, [])
        except _NotOpened as problem:
            await self._not_opened(row, fault(problem.error, "destination", row.destination))
            return False
        run = self._run
        try:
            unread = await run.read_folder_attributes(planner.group)
        except OSError as error:
            reason = fault(error, "destination", row.destination)
            if run.context.patience.is_passing(row.destination, reason):
                raise reason from error
            self._failed(planner.group, row, reason)
            run.settle.put(GroupListed(planner.group))
            return False
        if unread is not None:
            await self._at_source(planner, row, unread)
        return unread is None

    async def _take_rows(self, planner: DirectoryPlanner, rows: list[Row]) -> Planned | None:
        """Plan some rows; None when they are to be planned with all others. The directory here is opened in the hop
        that plans the first of them, since each hop to a thread costs as much as planning some dozens of files."""
        opened = planner.opened
        try:
            return await self._threads.run(partial(planner.take, rows))
        except OSError as error:
            if planner.opened:
                raise
            raise _NotOpened(error) from error
        finally:
            if planner.opened and not opened:
                self._run.opened(planner.group)

    async def _not_listed(self, planner: DirectoryPlanner, row: DirectoryRow, error: TowpathError) -> None:
        """The source's directory cannot be listed to its end; the one here is there all the same."""
        if not planner.opened:
            try:
                await self._take_rows(planner, [])
            except _NotOpened as problem:
                await self._not_opened(row, fault(problem.error, "destination", row.destination))
                return
        # One that was listed before and is gone now, or something else, has been brought as it was.
        if not (row.again and error.code in GONE):
            self._failed(planner.group, row, error)
        self._run.settle.put(GroupListed(planner.group))

    async def _planned(self, planned: Planned, queue: ListingQueue) -> None:
        if planned.directories:
            queue.added()
        if planned.gone:
            self._run.settled_is_gone(planned.gone)
        await self._hand_out(planned)
        await self._run.offer()

    async def _note_extra(self, group: Group, row: DirectoryRow, planner: DirectoryPlanner) -> None:
        """What cannot be looked through for a mirror's sake is an error of its own; nothing in it is deleted."""
        # The greeting's answer is there: the listing came after it.
        note = partial(planner.note_extra, source_hides=self._run.session.hides)
        try:
            kept = await self._threads.run(note)
        except OSError as error:
            problem = fault(error, "destination", row.destination)
            if self._run.context.patience.is_passing(row.destination, problem):
                raise problem from error
            self._failed(group, row, problem)
            return
        if kept is KeptExtra.CHANGED and await self.second_look.may_follow():
            self.second_look.list_again(msgspec.structs.replace(row, mtime_ns=planner.source_mtime_ns))
        elif kept is not KeptExtra.NONE:
            self._tell_of_kept(kept, row.destination)

    def _tell_of_kept(self, why: KeptExtra, destination: bytes) -> None:
        if why in self._told_of_kept:
            return
        self._told_of_kept.add(why)
        subject = format_path(split_path(destination), directory=True)
        sentence = _KEPT[why].format(place=subject[:1000])
        self._run.context.on_fault(ItemFailed(sentence, code="EXTRA_NOT_DELETED", who="you", subject=subject))

    async def _not_opened(self, row: DirectoryRow, error: TowpathError) -> None:
        """The destination directory cannot be used: an error of its own, unless it concerns the whole task."""
        run = self._run
        if _disk_is_away(error):
            self._put_off(error)
            return
        if run.context.patience.is_passing(row.destination, error):
            run.release_slot()
            raise error
        handle = await trio.to_thread.run_sync(run.context.root.open_directory, ())
        group = Group(row.id, row.source, row.destination, handle, [])
        run.opened(group)
        self._failed(group, row, error)
        run.settle.put(GroupListed(group))

    def _put_off(self, error: TowpathError, opened: Group | None = None) -> None:
        """A disk is away, at either side, and no file of this folder was begun: the journal gives it again in the next
        run."""
        self._run.put_off(error)
        if opened is None:
            self._run.release_slot()
        else:
            self._run.groups_done([opened])

    def _failed(self, group: Group, row: DirectoryRow, error: TowpathError) -> None:
        """A directory of the source cannot be listed: an error of its own, the others go on."""
        # A stand-in for the directory as a whole.
        job = FileJob(group, row.item, Row(b".", DIRECTORY, 0, 0, 0, 0, 0, 0), b".", b".", False)
        group.planned += 1
        self._run.give_up(job, error)

    async def _hand_out(self, planned: Planned) -> None:
        run = self._run
        for job, error in planned.failures:
            run.give_up(job, error)
        for job in planned.links:
            if job.row.target is None:
                run.retries.unknown_link(job)
            else:
                # Listing is faster than making links.
                job.charged = charge(0)
                await run.budget.acquire(job.charged)
                run.settle.put(LinkWanted(job, job.row.target))
        for job in planned.comparisons:
            await run.compare(job)
        copies = planned.copies
        for name in await run.hard_links.take(planned.shared) if planned.shared else ():
            if name.decision == "copy":
                copies.append(name.job)
            else:
                await run.hard_links.hand_out(name)
        while copies:
            # A few at a time, so that never many wait with all their attributes.
            ready = await run.read_attributes(copies)
            await run.copy_all(copies[:ready])
            copies = copies[ready:]
        if planned.shared:
            await run.offer()
            await run.hard_links.room()
