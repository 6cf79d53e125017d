"""Runs the watch rules of the configuration: looks, hands over, submits, follows, tidies up.

Notifications of the file system only say "look now"; what counts is always a whole scan, so lost, merged or overflown
notifications and restarts cost time, never files.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import sqlite3
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import trio
from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers.api import BaseObserver

from agent.collections import Collections
from agent.config.keys import WatchConfig
from agent.policy import Policy
from agent.storage.base import Directory, Root
from agent.storage.unavailable import for_owner
from agent.system import notifications
from agent.watch.ledger import LEDGER_FILE, MAX_NAMESAKES, Batch, Item, Ledger
from agent.watch.rule import (
    FEEDS_ITSELF,
    Seen,
    Settling,
    destination,
    feeds_itself,
    is_due,
    is_wanted,
    next_time,
    own_folder,
)
from agent.watch.submitter import FINAL, SubmissionRefused, Submitter
from protocol.errors import NeedsPerson, RetryLater, TowpathError
from protocol.names import CollectionPath, is_reserved, parse_path_untrusted

logger = logging.getLogger("towpath.watch")

# Seconds between two looks when nothing is heard, between two looks at a task, and after a notification.
LOOK_EVERY = 60.0
FOLLOW_EVERY = 15.0
SOON = 0.5
FIRST_RETRY = 30.0
LAST_RETRY = 3600.0
MAX_FILES = 200_000
# Files of which one look at a folder is told by name in the log.
MOST_TOLD = 10


class WatchService:
    """All rules. `replace` may be called at any time; `run` runs until cancelled."""

    def __init__(
        self,
        state_dir: Path,
        rules: Sequence[WatchConfig],
        policy: Policy,
        collections: Collections,
        submitter: Submitter,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._state_dir = state_dir
        self._rules = tuple(rules)
        self._policy = policy
        self._collections = collections
        self._submitter = submitter
        self._clock = clock
        self._ledger: Ledger | None = None
        self._changed = trio.Event()
        self._running: dict[str, RuleRunner] = {}

    def replace(self, rules: Sequence[WatchConfig]) -> None:
        """The owner changed the rules."""
        if tuple(rules) != self._rules:
            self._rules = tuple(rules)
            self._changed.set()

    async def run(self) -> None:
        """Run all rules until cancelled; nothing is held open while there is none."""
        while True:
            self._changed = trio.Event()
            if not self._rules:
                await self._changed.wait()
                continue
            try:
                self._ledger = await trio.to_thread.run_sync(Ledger, self._state_dir / LEDGER_FILE)
            except sqlite3.Error as error:
                logger.error("Watch rules do not run: %s: %s.", self._state_dir / LEDGER_FILE, error)
                await trio.sleep(LOOK_EVERY)
                continue
            try:
                async with trio.open_nursery() as nursery:
                    for rule in self._rules:
                        runner = RuleRunner(
                            rule, self._ledger, self._policy, self._collections, self._submitter, self._clock
                        )
                        self._running[rule.name] = runner
                        nursery.start_soon(runner.run)
                    await self._changed.wait()
                    nursery.cancel_scope.cancel()
            finally:
                self._running.clear()
                ledger, self._ledger = self._ledger, None
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(ledger.close)

    def status(self) -> list[dict[str, Any]]:
        """Every rule: what it did, what it waits for, what is wrong."""
        return [runner.status() for runner in self._running.values()]

    def look_now(self, name: str, *, retry: bool) -> bool:
        """Run a rule at once, also a timed one; ``retry``: also what had failed for good. False if there is none."""
        runner = self._running.get(name)
        if runner is None:
            return False
        runner.look_now(retry=retry)
        return True


class RuleRunner:
    """One rule. Its ledger is used in threads only: another rule's long transaction, or a slow disk, holds up nobody
    else."""

    def __init__(
        self,
        rule: WatchConfig,
        ledger: Ledger,
        policy: Policy,
        collections: Collections,
        submitter: Submitter,
        clock: Callable[[], float],
    ) -> None:
        self.rule = rule
        self._ledger = ledger
        self._policy = policy
        self._collections = collections
        self._submitter = submitter
        self._clock = clock
        self._settling = Settling(rule.settle)
        self._folder: CollectionPath = parse_path_untrusted(rule.folder)
        # Folders that are not looked into: what lies there comes from this rule.
        self._not_ours: set[CollectionPath] = set()
        if rule.destination == rule.collection:
            self._not_ours.add(own_folder(rule.template))
        if rule.after == "move":
            self._not_ours.add(parse_path_untrusted(rule.moved_to))
        self._not_ours.discard(self._folder)
        self._observer: BaseObserver | None = None
        self._problem = ""
        self._waiting = 0
        # What the ledger said last.
        self._counts: dict[str, int] = {}
        self._reason = ""
        self._wake = trio.Event()
        self._forced = self._retry = False
        self._next_follow = 0.0

    def status(self) -> dict[str, Any]:
        """For `towpath watch list`."""
        return {
            "name": self.rule.name,
            "folder": self.rule.folder,
            "collection": self.rule.collection,
            "destination": self.rule.destination,
            "batches": self._counts,
            "settling": self._waiting,
            "problem": self._problem or self._reason,
        }

    def look_now(self, *, retry: bool) -> None:
        """See `WatchService.look_now`."""
        self._forced = True
        self._retry |= retry
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled. Trouble is kept as the rule's problem and tried again."""
        token = trio.lowlevel.current_trio_token()
        try:
            while True:
                self._wake = trio.Event()
                # Before the look, so that nothing falls between the two.
                await trio.to_thread.run_sync(self._listen, token)
                delay = await self.step()
                if self._problem:
                    # A folder that comes back is another one, which the old notifications know nothing of.
                    self._unlisten()
                with trio.move_on_after(max(SOON, delay)):
                    await self._wake.wait()
                    # Notifications come in swarms.
                    await trio.sleep(SOON)
        finally:
            self._unlisten()

    def _listen(self, token: trio.lowlevel.TrioToken) -> None:
        """Hear of changes, where the system can tell of them and the folder is there."""
        if self._observer is not None:
            return
        runner = self

        class Handler(FileSystemEventHandler):
            def on_any_event(self, event: FileSystemEvent) -> None:
                if event.event_type in ("opened", "closed_no_write"):
                    return
                try:
                    token.run_sync_soon(lambda: runner._wake.set())
                except trio.RunFinishedError:
                    pass

        try:
            root = self._policy.collection(self.rule.collection).root
            folder = os.path.join(os.fsencode(root), *self._folder)
            self._observer = notifications.observe(Handler(), [os.fsdecode(folder)], recursive=self.rule.recursive)
        except (OSError, TowpathError) as error:
            # Tried again before the next look.
            logger.debug("Watch %s: no notifications (%s); looking every %g s.", self.rule.name, error, LOOK_EVERY)

    def _unlisten(self) -> None:
        observer, self._observer = self._observer, None
        if observer is not None:
            notifications.stop(observer)

    async def step(self) -> float:
        """One look and what follows from it; seconds until the next. Raises nothing: what goes wrong is in the rule's
        status, and tried again with the next look."""
        try:
            try:
                await self._look()
            except TowpathError as error:
                # Rules are told of on this machine only.
                sentence = for_owner(error)
                if self._problem != sentence:
                    logger.warning("Watch %s: %s", self.rule.name, sentence)
                self._problem = sentence
            return await trio.to_thread.run_sync(self._delay, self._clock())
        except OSError as error:
            # No descriptor to look with, mostly.
            self._problem = f"The folder cannot be looked at now: {error.strerror or error}."
            logger.warning("Watch %s: %s", self.rule.name, self._problem)
        except sqlite3.Error as error:
            # A full disk, mostly: nothing was handed over that is not written down.
            logger.error("Watch %s: its ledger cannot be used: %s.", self.rule.name, error)
            self._problem = f"The ledger of the watch rules cannot be used: {error}."
        return LOOK_EVERY

    async def _look(self) -> None:
        """Raises `TowpathError`, OSError, `sqlite3.Error`."""
        now = self._clock()
        if self.rule.destination == self.rule.collection and feeds_itself(
            self.rule.template, self._folder, recursive=self.rule.recursive
        ):
            raise NeedsPerson(FEEDS_ITSELF, who="you")
        await self._write(self._retry_failed, now)
        files = await trio.to_thread.run_sync(self._scan)
        self._problem = ""
        await self._write(self._take, files, now)
        await self._submit()
        await self._follow()

    # --- looking ---------------------------------------------------------------------------------------------

    def _scan(self) -> list[Seen]:
        """Every file below the folder that the rule is about. Raises `TowpathError`; a disk that is away is no empty
        folder."""
        config = self._policy.collection(self.rule.collection)
        with self._collections.using(config) as root:
            found: list[Seen] = []
            try:
                waiting: list[tuple[bytes, ...]] = [()]
                folders = 0
                # Not by recursion: folders may lie in one another more deeply than that goes.
                while waiting:
                    self._scan_folder(root, waiting.pop(), found, waiting)
                    folders += 1
                    if len(found) > MAX_FILES or folders + len(waiting) > MAX_FILES:
                        sentence = f"{self.rule.folder} holds more than {MAX_FILES} entries, too many for a watch rule."
                        raise RetryLater(sentence)
                root.check_present()
            except OSError as error:
                raise RetryLater(f"{self.rule.folder} cannot be looked at: {error.strerror}.") from error
            return found

    def _scan_folder(
        self, root: Root, below: tuple[bytes, ...], found: list[Seen], waiting: list[tuple[bytes, ...]]
    ) -> None:
        """One folder: its files are added to ``found``, its folders to those that wait. Raises OSError."""
        if (*self._folder, *below) in self._not_ours:
            return
        with root.open_directory((*self._folder, *below)) as directory:
            for node in directory.scan():
                path = (*below, node.name)
                if node.kind == "dir" and self.rule.recursive and not is_reserved(node.name):
                    waiting.append(path)
                elif node.kind == "file" and is_wanted(path, self.rule.include, self.rule.exclude):
                    found.append(Seen(path, node.version))
                if max(len(found), len(waiting)) > MAX_FILES:
                    return

    def _take(self, files: list[Seen], now: float) -> None:
        """Hand over what has settled, if it is time."""
        settled = self._settling.observe(files, now)
        self._waiting = len(files) - len(settled)
        schedule = self.rule.schedule
        if schedule is not None and not self._forced:
            last = self._ledger.last_run(self.rule.name, now)
            if not is_due(schedule, last, now):
                return
        fresh = self._ledger.fresh(self.rule.name, settled)
        host = socket.gethostname()
        items = [
            Item(seen.path, seen.version, destination(self.rule.template, seen, self.rule.name, host)) for seen in fresh
        ]
        if items:
            logger.info("Watch %s: %d file(s) have settled.", self.rule.name, len(items))
            self._hand_over(items, now)
        # Not before: what could not be written down would wait for the next time in the table.
        if schedule is not None:
            self._ledger.ran(self.rule.name, now)
        self._forced = False

    @property
    def _sync_level(self) -> str | None:
        """Where files are deleted here, that one of the same size or time is there is not enough."""
        wanted = self.rule.sync_level
        return "checksum" if wanted and self.rule.after == "delete" else wanted

    def _hand_over(self, items: list[Item], now: float) -> None:
        rule = self.rule
        source = b"/".join((rule.collection.encode(), *self._folder))
        placed = self._ledger.hand_over(rule.name, items, now, source=source, collection=rule.destination)
        others = [after for before, after in zip(items, placed, strict=True) if before != after]
        for item in others[:MOST_TOLD]:
            logger.warning("Watch %s: another file has gone there before; this is %s.", rule.name, item.destination)
        if len(others) > MOST_TOLD:
            logger.warning("Watch %s: so it is with %d more.", rule.name, len(others) - MOST_TOLD)

    # --- submitting and following ------------------------------------------------------------------------------

    def _retry_failed(self, now: float) -> None:
        """Do what the owner has asked for."""
        if self._retry:
            self._ledger.retry_failed(self.rule.name, now)
            self._retry = False

    async def _write(self, write: Callable[..., object], *arguments: object) -> None:
        """Write to the ledger, and keep what it says for whoever asks."""
        await trio.to_thread.run_sync(self._written, partial(write, *arguments))

    def _written(self, write: Callable[[], object]) -> None:
        write()
        self._counts, self._reason = self._ledger.counts(self.rule.name), self._ledger.last_reason(self.rule.name)

    async def _open_batches(self) -> list[Batch]:
        return await trio.to_thread.run_sync(self._ledger.open_batches, self.rule.name)

    async def _submit(self) -> None:
        for batch in await self._open_batches():
            now = self._clock()
            if batch.state != "new" or batch.next_try > now:
                continue
            level = self._sync_level
            options = ["--sync-level", level] if level else []
            try:
                task = await self._submitter.submit(
                    batch, self.rule.collection, self.rule.folder, self.rule.destination, options
                )
            except RetryLater as error:
                await self._write(self._ledger.put_off, batch, error.sentence, now + self._pause(batch), now)
                return
            except SubmissionRefused as error:
                await self._write(self._ledger.finished, batch, "failed", error.sentence, now)
                continue
            logger.info("Watch %s: %d file(s) are task %s.", self.rule.name, len(batch.items), task)
            await self._write(self._ledger.submitted, batch, task, now)
            self._next_follow = min(self._next_follow, now)

    async def _follow(self) -> None:
        now = self._clock()
        if now < self._next_follow:
            return
        for batch in await self._open_batches():
            if batch.state == "submitted":
                await self._follow_one(batch)
        self._next_follow = self._clock() + FOLLOW_EVERY

    async def _follow_one(self, batch: Batch) -> None:
        outcome = await self._submitter.look(batch.task)
        now = self._clock()
        if outcome.status not in FINAL:
            return
        if outcome.status == "SUCCEEDED" and not outcome.skipped:
            await self._write(lambda: self._ledger.finished(batch, "done", self._tidy(batch), now))
            return
        reason = outcome.sentence or f"The task {batch.task} ended as {outcome.status}."
        if batch.attempts < self.rule.retries:
            await self._write(self._ledger.again, batch, reason, now + self._pause(batch), now)
        else:
            logger.error("Watch %s: given up after %d attempt(s): %s", self.rule.name, batch.attempts + 1, reason)
            await self._write(self._ledger.finished, batch, "failed", reason, now)

    def _pause(self, batch: Batch) -> float:
        return float(min(FIRST_RETRY * 2**batch.attempts, LAST_RETRY))

    def _tidy(self, batch: Batch) -> str:
        """Delete or move what has arrived, unless it has changed meanwhile; why some files stay."""
        if self.rule.after == "keep":
            return ""
        stayed = 0
        config = self._policy.collection(self.rule.collection)
        with self._collections.using(config) as root:
            for item in batch.items:
                try:
                    self._tidy_one(root, item)
                except OSError as error:
                    stayed += 1
                    logger.warning("Watch %s: a file that arrived stays: %s", self.rule.name, error.strerror)
        return f"{stayed} file(s) that arrived stay where they are." if stayed else ""

    def _tidy_one(self, root: Root, item: Item) -> None:
        """Raises OSError."""
        directory, name = root.open_parent((*self._folder, *item.path))
        with directory:
            if directory.lstat(name).version != item.version:
                # Changed since it was handed over: it will settle again and go once more.
                return
            if self.rule.after == "delete":
                # Before: whatever comes under its name from now on must not take its place.
                self._ledger.let_go(item, self.rule.destination)
                directory.unlink(name)
                return
            target = (*parse_path_untrusted(self.rule.moved_to), *item.path[:-1])
            with root.make_directories(target) as moved:
                _move(directory, name, moved)

    def _delay(self, now: float) -> float:
        moments = [now + LOOK_EVERY]
        settles = self._settling.next_deadline(now)
        if settles is not None:
            moments.append(settles)
        open_batches = self._ledger.open_batches(self.rule.name)
        if any(batch.state == "submitted" for batch in open_batches):
            moments.append(self._next_follow)
        moments += [batch.next_try for batch in open_batches if batch.state == "new" and batch.next_try > now]
        if self.rule.schedule is not None:
            moments.append(next_time(self.rule.schedule, now))
        return max(0.0, min(moments) - now)


def _move(directory: Directory, name: bytes, target: Directory) -> None:
    """Move a file that has arrived, beside what was moved there under its name before. Raises OSError."""
    for number in range(MAX_NAMESAKES):
        try:
            directory.rename_no_replace(name, b"%s.%d" % (name, number) if number else name, target)
        except FileExistsError:
            continue
        return
    raise OSError(errno.EEXIST, "too many files were moved under its name")
