"""The same as `test_moved_at_source_by_seed` with all that a task may have besides: pauses, kills before, in and after
a second look, lane processes, filter rules, access lists and attributes, hard links, folders of one name but for case,
and items that lead into one another.

When the last look has asked and found nothing changed, what is at the destination is what the source has now, name by
name."""

from __future__ import annotations

import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import trio

from agent.storage.access_lists import AccessList
from agent.storage.faulty import Call, Plan
from agent.storage.rules import included
from agent.transfer.basis.journal_rows import DirectoryRow
from agent.transfer.books.manifest import SkippedRow, TransferredRow, read_page
from agent.transfer.planning.second_look import LOOKS, SecondLook
from protocol.control import FilterRule, TaskItem, TaskObserved
from tests.agent.access_list_scene import give, list_of
from tests.agent.engine_inside import Crashed, Engine, contents, quick_path, skipped
from tests.agent.folding_root import FoldingRoot
from tests.agent.moving_source import MOVED_AWAY, Play
from tests.slices import chosen_seeds

__all__ = ["quick_path"]

ITEMS = [
    [("/", "/")],
    [("/", "/")],
    [("/", "/")],
    [("/a", "/to"), ("/b", "/to"), ("/c", "/else")],
    [("/", "/all"), ("/b", "/all/b"), ("/c", "/beside")],
    [("/b", "/b/inside"), ("/", "/")],
    [("/a", "/x"), ("/a", "/y/z"), ("/", "/y")],
]
RULES = [
    [FilterRule(method="exclude", name="*skip*")],
    [FilterRule(method="exclude", name="*skip*", type="file")],
    [FilterRule(method="include", name="*skip-folder*", type="dir"), FilterRule(method="exclude", name="*skip*")],
]
LIST = AccessList(6, 4, 0, mask=4)
FOLDER_LIST = AccessList(7, 5, 0, mask=5)
TAG = "user.tag"


class WidePlay(Play):
    """One seed, with more of everything."""

    def _widen(self) -> None:
        self.more = random.Random(f"{self.seed} widely")
        choose = self.more.choice
        self.pairs = choose(ITEMS)
        self.rules = choose([*RULES, [], [], []])
        self.processes = choose([0, 0, 1, 2])
        self.folding = self.more.random() < 0.3
        self.pauses = [self.more.randint(1, 150) for _ in range(choose([0, 0, 1, 2, 3]))]
        # What happens before the look of this number, after it, and at its commit.
        self.at_looks = {self.more.randint(1, 3): choose(["pause", "kill", "kill after", "pause after", "kill in"])}
        if self.more.random() < 0.5:
            self.at_looks.clear()
        self.singles: list[tuple[str, str, bytes]] = []
        self.options = msgspec.structs.replace(
            self.options,
            filter_rules=self.rules,
            preserve_hard_links=choose([True, False]),
            preserve_xattrs=choose([True, False]),
            preserve_acls=choose([True, False]),
            sync_level=choose([None, None, None, 0, 1, 2, 3]),
        )
        if self.options.preserve_xattrs or self.options.preserve_acls:
            # As `agent.transfer.lane_processes.session_processes` has it.
            self.processes = 0
        self.engine: Engine

    def _fill(self) -> None:
        self.listed = self.more.random() < 0.5
        super()._fill()
        for path in self.more.sample(self._files(), self.more.choice([0, 0, 1, 2])):
            place = self.more.choice(self.pairs)[1].rstrip("/")
            self.singles.append((f"/{path.relative_to(self.source)}", f"{place}/{path.name}-single", path.read_bytes()))
        for path in [self.source, *self._folders()]:
            self._mark(path)

    def _folder(self, above: Path) -> None:
        self._serial += 1
        name = self.more.choice(["folder", "folder", "Folder" if self.folding else "folder", "skip-folder", "skipped"])
        (above / f"{name}-{self._serial}").mkdir()

    def _file(self, folder: Path) -> Path:
        path = super()._file(folder)
        self._mark(path)
        return path

    def _mark(self, path: Path) -> None:
        os.setxattr(path, TAG, os.urandom(4) if path.is_dir() else path.read_bytes()[:30])
        if self.listed:
            give(path, FOLDER_LIST if path.is_dir() else LIST)

    # --- what happens ----------------------------------------------------------------------------------

    def _change(self) -> None:
        if self.more.random() < 0.5:
            super()._change()
            return
        what = self.more.choice(
            [
                self._rename_beyond_rules,
                self._respell,
                self._link,
                self._replace_link,
                self._back_and_forth,
                self._swap_folders,
                self._make_a_folder_of,
            ]
        )
        what()
        self.done.append(what.__name__)

    def _rename_beyond_rules(self) -> None:
        path = self.more.choice(self._files())
        number = path.name.rpartition("-")[2]
        self._put(path, self.more.choice(self._folders()) / f"{self.more.choice(['skip', 'moved'])}-{number}")

    def _respell(self) -> None:
        path = self.more.choice(self._folders())
        if path.parent != self.source:
            self._put(path, path.with_name(path.name.swapcase()))

    def _link(self) -> None:
        path = self.more.choice(self._files())
        self._serial += 1
        os.link(path, self.more.choice(self._folders()) / f"hard-{self._serial}")

    def _replace_link(self) -> None:
        links = [path for path in sorted(self.source.rglob("*")) if path.is_symlink()]
        if links:
            path = self.more.choice(links)
            self._serial += 1
            made = path.with_name(f"new-{self._serial}")
            made.symlink_to(f"elsewhere-{self._serial}")
            made.rename(path)

    def _back_and_forth(self) -> None:
        path = self.more.choice(self._files())
        away = self.more.choice(self._folders()) / f"away-{self._serial}"
        self._put(path, away)
        self._put(away, path)

    def _swap_folders(self) -> None:
        one, other = self.more.choice(self._folders()), self.more.choice(self._folders())
        apart = one != other and not one.is_relative_to(other) and not other.is_relative_to(one)
        if apart and self.source not in (one.parent, other.parent):
            self.replaced = True
            one.rename(self.source.parent / "aside")
            other.rename(one)
            (self.source.parent / "aside").rename(other)

    def _make_a_folder_of(self) -> None:
        path, other = self.more.choice(self._files()), self.more.choice(self._files())
        if path != other:
            self.replaced = True
            self._put(path, self.more.choice(self._folders()) / f"was-{path.name}")
            if not path.exists():
                path.mkdir()
                self._mark(path)
                other.rename(path / other.name)

    @staticmethod
    def _put(path: Path, to: Path) -> None:
        if not os.path.lexists(to):
            path.rename(to)

    def destination_plan(self, faults: float) -> Plan:
        inner, pause = super().destination_plan(faults), self.pauses.pop() if self.pauses else 0
        count = 0

        def plan(call: Call) -> int | None:
            nonlocal count
            count += 1
            if count == pause:
                self._pause_soon()
            if self.looking and call.operation == "journal_commit" and self.kill_in:
                self.kill_in = False
                self.met["deaths"] += 1
                raise Crashed
            return inner(call)

        return plan

    kill_in = False
    # Whether the source was asked, the last time, which folders changed: what is moved after all were listed is not
    # missed under the name that it had then.
    asked = False
    token: trio.lowlevel.TrioToken

    def _pause_soon(self) -> None:
        line = self.engine.line
        if line is not None:
            with suppress(trio.RunFinishedError):
                self.token.run_sync_soon(line.want, "pause")

    def at_look(self, number: int, after: str = "") -> None:
        what = self.at_looks.pop(number) if self.at_looks.get(number, "") in (f"pause{after}", f"kill{after}") else ""
        if what.startswith("pause"):
            assert self.engine.line is not None
            self.engine.line.want("pause")
        elif what:
            self.met["deaths"] += 1
            self.engine.dead = True
            raise Crashed
        if not after and self.at_looks.get(number) == "kill in":
            del self.at_looks[number]
            self.kill_in = True

    # --- what is right ---------------------------------------------------------------------------------

    def places(self, path: Path) -> Iterator[str]:
        for source, destination in self.pairs:
            top = self.source / source[1:]
            if path != top and path.is_relative_to(top) and self._is_included(path, top):
                yield str(Path(destination[1:]) / path.relative_to(top))

    def _is_included(self, path: Path, top: Path) -> bool:
        chain = [path, *(above for above in path.parents if above != top and above.is_relative_to(top))]
        return all(included(self.rules, os.fsencode(one.name), one.is_dir() and not one.is_symlink()) for one in chain)

    def rules_leave(self, before: dict[str, bytes | str]) -> set[str]:
        """What was at the destination and is none of the task's by its rules."""
        return {
            place
            for place, content in before.items()
            if not included(self.rules, os.fsencode(Path(place).name), content == "folder")
        }


def watch_looks(play: WidePlay, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for `Play`, and what happens at looks."""
    look, look_at_all = SecondLook.look, SecondLook._look_at_all
    count = 0

    async def asked(self: SecondLook, on_changed: Callable[[list[DirectoryRow]], Awaitable[None]]) -> None:
        play.asked = True
        await look_at_all(self, on_changed)

    async def watched(self: SecondLook) -> bool:
        nonlocal count
        count += 1
        play.looking, play.asked = True, False
        play.at_look(count)
        again = await look(self)
        play.kill_in = False
        if again:
            play.looking = False
            play.looks += 1
        play.at_look(count, " after")
        return again

    monkeypatch.setattr(SecondLook, "look", watched)
    monkeypatch.setattr(SecondLook, "_look_at_all", asked)


ALWAYS = {0, 1, 2, 3}
SEEDS = [pytest.param(seed, marks=() if seed in ALWAYS else pytest.mark.soak) for seed in chosen_seeds(range(600))]


@pytest.mark.parametrize("seed", SEEDS)
async def test_whatever_a_task_has_besides_what_is_moved_arrives_and_stays(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    play = WidePlay(seed, quick_path)
    play.token = trio.lowlevel.current_trio_token()
    watch_looks(play, monkeypatch)
    # As if the tree had been made long ago.
    monkeypatch.setattr("agent.transfer.source.source_rows.CLOCK_TICK", 10_000_000)
    time.sleep(0.02)
    before = contents(play.destination)
    faults = play.more.choice([0.0, 0.0, 0.0, 0.005])
    source_plan = play.source_plan(play.more.randint(1, 6))
    items = [TaskItem(source_path=one, destination_path=other, recursive=True) for one, other in play.pairs]
    items += [TaskItem(source_path=one, destination_path=other) for one, other, _ in play.singles]
    events = []
    while True:
        plan = play.destination_plan(faults)
        engine = Engine(quick_path, play.options, items, plan=plan, source_plan=source_plan, processes=play.processes)
        engine.lanes_wanted, engine.numbers, engine.permitted = play.more.choice([1, 2]), True, 0o777
        engine.events, play.engine, play.looking = events, engine, False
        if play.folding:
            engine.wrap = FoldingRoot.around
        try:
            observed = await engine.run(60)
            if observed.state != "PAUSED":
                break
            play.met["pauses"] += 1
        except Crashed:
            pass
        events = list(engine.events)
    failed = skipped(engine)
    print(f"seed {seed}: {observed.state}, {play.looks} looks, {dict(play.met)}, folding {play.folding}, {play.done}")
    print(f"{play.options}, {play.pairs}, {play.singles}, {failed}, {observed.counters}")
    check(play, engine, observed, before, failed)


def check(
    play: WidePlay, engine: Engine, observed: TaskObserved, before: dict[str, bytes | str], failed: dict[str, str]
) -> None:
    found = contents(engine.destination)
    assert engine.temporaries() == []
    assert observed.state in ("SUCCEEDED", "FAILED")
    unlucky = {"IO_ERROR", "STALE_HANDLE", "BUSY"} if play.met["faults"] else set()
    expected = MOVED_AWAY | unlucky | ({"NAME_COLLISION"} if play.folding else set())
    # A folder that is moved into one that has taken its place.
    expected |= {"SYMLINK_LOOP"} if play.options.recursive_symlinks == "copy" else set()
    assert set(failed.values()) <= expected, failed
    wanted = defaultdict(list)
    for path in sorted(play.source.rglob("*")):
        if not path.is_symlink() or play.options.recursive_symlinks == "keep":
            for place in play.places(path):
                wanted[spelled(play, place)].append(path)
    # What was there is not deleted where the source has it.
    there = {spelled(play, place): place for place in found}
    for place in before:
        assert spelled(play, place) not in wanted or spelled(play, place) in there, place
    if not play.rules_leave(before) <= found.keys():
        raise AssertionError(play.rules_leave(before) - found.keys())
    if play.asked and play.looks < LOOKS and not unlucky & set(failed.values()):
        check_places(play, engine, wanted, there, failed)
    if not (play.met["faults"] or play.met["deaths"]):
        count(play, engine, observed, failed)


def spelled(play: WidePlay, place: str) -> str:
    return place.lower() if play.folding else place


def check_places(
    play: WidePlay, engine: Engine, wanted: dict[str, list[Path]], there: dict[str, str], failed: dict[str, str]
) -> None:
    """Nothing has changed since every folder was listed."""
    for place, paths in wanted.items():
        if any(
            str(above.relative_to(play.source)) in failed for path in paths for above in (path, *above_of(play, path))
        ):
            continue
        assert place in there, (place, paths)
        arrived = engine.destination / there[place]
        assert any(is_there(play, path, arrived) for path in paths), (place, paths)
    for source, destination, content in play.singles:
        path = play.source / source[1:]
        if path.is_file() and path.read_bytes() == content and source[1:] not in failed:
            assert spelled(play, destination[1:]) in there, destination
            wanted[spelled(play, destination[1:])].append(path)
    check_transferred(play, engine, wanted, there)
    if play.options.delete_destination_extra and "EXTRA_NOT_DELETED" not in engine.codes():
        singles = {spelled(play, destination[1:]) for _, destination, _ in play.singles}
        links = {spelled(play, place) for path in play.source.rglob("*") for place in play.places(path)}
        extra = there.keys() - wanted.keys() - singles - links
        extra = {place for place in extra if not any(one.startswith(f"{place}/") for one in [*wanted, *singles])}
        extra = {
            place for place in extra if all(included(play.rules, os.fsencode(part), False) for part in place.split("/"))
        }
        assert not extra or failed or len(play.pairs) > 1, extra


def check_transferred(play: WidePlay, engine: Engine, wanted: dict[str, list[Path]], there: dict[str, str]) -> None:
    """What the task brought has what its file has besides content, and is one file where that is one."""
    rows = read_page(engine.state / "transferred.manifest", TransferredRow, None, 10000, complete=True).rows
    brought = {spelled(play, os.fsdecode(row.destination)) for row in rows}
    inodes = defaultdict(set)
    for place, paths in wanted.items():
        arrived = engine.destination / there.get(place, "")
        if place not in brought or place not in there or arrived.is_symlink() or not arrived.is_file():
            continue
        same = [path for path in paths if path.is_file() and path.read_bytes() == arrived.read_bytes()]
        if not same:
            continue
        # A name may have come to a file that a sync level leaves as it is.
        whole = not play.options.preserve_hard_links or play.options.sync_level is None
        if play.options.preserve_xattrs and whole:
            assert os.getxattr(arrived, TAG) == os.getxattr(same[0], TAG), place
        if play.options.preserve_acls and play.listed and whole:
            assert list_of(arrived) == list_of(same[0]), place
        # A link that is followed is no name of the file.
        if not same[0].is_symlink():
            inodes[same[0].stat().st_ino].add(arrived.stat().st_ino)
    files = [inode for found in inodes.values() for inode in found]
    assert len(files) == len(set(files)), "two files became one"
    # A name that was given, and not noted before the kill, is left alone at these levels, and nothing known of it.
    unknown = play.met["deaths"] and play.options.sync_level in (0, 1)
    undisturbed = not play.done and not unknown
    if play.options.preserve_hard_links and undisturbed and "HARD_LINK_NOT_KEPT" not in engine.codes():
        assert all(len(found) == 1 for found in inodes.values()), inodes


def above_of(play: WidePlay, path: Path) -> list[Path]:
    return [above for above in path.parents if above != play.source and above.is_relative_to(play.source)]


def is_there(play: WidePlay, path: Path, arrived: Path) -> bool:
    """Whether a file, folder or link is what there should be of it."""
    options = play.options
    if path.is_symlink():
        return arrived.is_symlink() and (arrived.readlink() == path.readlink() or options.sync_level == 0)
    if path.is_dir():
        same = arrived.is_dir()
        if same and options.preserve_xattrs:
            same = os.getxattr(arrived, TAG) == os.getxattr(path, TAG)
        if same and options.preserve_timestamp and len(play.pairs) == 1 and not play.folding and not play.singles:
            same = arrived.stat().st_mtime_ns == path.stat().st_mtime_ns
        return same
    if not arrived.is_file():
        return False
    if options.sync_level == 0:
        return True
    if arrived.read_bytes() == path.read_bytes():
        return True
    # Equal in all that this task looks at.
    alike = arrived.stat().st_size == path.stat().st_size
    return alike and (options.sync_level in (1, 2) or not options.preserve_timestamp)


def count(play: WidePlay, engine: Engine, observed: TaskObserved, failed: dict[str, str]) -> None:
    """What the counters say is what the task has listed."""
    counters = observed.counters
    rows = read_page(engine.state / "transferred.manifest", TransferredRow, None, 10000, complete=True).rows
    twice = [path for path, times in Counter(row.destination for row in rows).items() if times > 1]
    assert not twice or play.replaced or play.restless or len(play.pairs) > 1 or play.looks, twice
    errors = len(read_page(engine.state / "skipped.manifest", SkippedRow, None, 10000, complete=True).rows)
    brought, ended = (
        counters.files_transferred + counters.symlinks_transferred,
        counters.failed + counters.skipped_errors,
    )
    # What ended before a pause, and is not in its folder any more when that is listed anew, is in the lists alone.
    assert brought == len(rows) or (play.met["pauses"] and brought < len(rows)), (counters, len(rows))
    assert ended == errors or (play.met["pauses"] and ended < errors), (counters, errors)
    assert counters.files_transferred + counters.files_skipped <= counters.files
    slack = len(failed) + 2 * (len(play.pairs) + len(play.singles))
    assert counters.files <= counters.files_transferred + counters.files_skipped + slack
    assert play.met["pauses"] or counters.bytes_transferred <= counters.bytes_total
    if play.options.preserve_acls and play.listed:
        lists = counters.acls_kept + counters.acls_not_kept + counters.acls_refused
        files = counters.files_transferred - counters.hard_links_kept
        assert lists <= files + counters.directories, (lists, counters)
