"""Files and folders of the source that are moved, renamed, made and removed while they are listed, by seed: in several
items, by mirrors or not, killed and disturbed by faults. Whatever was at the source all the time, under whatever path,
arrives when the task says that it succeeded, and no mirror deletes it where the source has it."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

from agent.transfer.books.manifest import SkippedRow, TransferredRow, read_page
from agent.transfer.planning.second_look import LOOKS
from protocol.control import TaskItem, TaskObserved
from tests.agent.engine_inside import Crashed, Engine, contents, quick_path, skipped
from tests.agent.folding_root import FoldingRoot
from tests.agent.moving_source import MOVED_AWAY, Play, watch_looks
from tests.slices import chosen_seeds

__all__ = ["quick_path"]

# Quick ones.
ALWAYS = {0, 1, 3, 13}
SEEDS = [pytest.param(seed, marks=() if seed in ALWAYS else pytest.mark.soak) for seed in chosen_seeds(range(300))]


@pytest.mark.parametrize("seed", SEEDS)
async def test_what_is_moved_while_it_is_listed_is_neither_missed_nor_deleted(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    play = Play(seed, quick_path)
    watch_looks(play, monkeypatch)
    # As if the tree had been made long ago.
    monkeypatch.setattr("agent.transfer.source.source_rows.CLOCK_TICK", 10_000_000)
    time.sleep(0.02)
    before = contents(play.destination)
    faults = play.random.choice([0.0, 0.0, 0.005])
    items = [TaskItem(source_path=one, destination_path=other, recursive=True) for one, other in play.pairs]
    engine = Engine(quick_path, play.options, items, plan=play.destination_plan(faults))
    engine.source_plan = play.source_plan(play.random.randint(1, 5))
    engine.lanes_wanted = play.random.choice([1, 2])
    if play.folding:
        engine.wrap = FoldingRoot.around
    sessions = 0
    while True:
        try:
            observed = await engine.run(60)
            break
        except Crashed:
            sessions += engine.sessions
            after = engine.revived(play.destination_plan(faults))
            after.source_plan, after.wrap = engine.source_plan, engine.wrap
            engine = after
    print(f"seed {seed}: {observed.state}, {play.done}, {play.options}, {play.pairs}, {skipped(engine)}")
    check(play, engine, observed, before)
    sessions += engine.sessions
    # Sessions that end with a fault are followed by another one.
    assert sessions <= 1 + LOOKS + play.met["deaths"] or play.met["faults"], sessions


def check(play: Play, engine: Engine, observed: TaskObserved, before: dict[str, bytes | str]) -> None:
    found, failed = contents(engine.destination), skipped(engine)
    assert engine.temporaries() == []
    assert observed.state in ("SUCCEEDED", "FAILED")
    unlucky = {"IO_ERROR", "STALE_HANDLE", "BUSY"} if play.met["faults"] else set()
    assert set(failed.values()) <= MOVED_AWAY | unlucky | ({"NAME_COLLISION"} if play.folding else set()), failed
    assert observed.state == "FAILED" or not unlucky & set(failed.values())
    wanted = {path: path.read_bytes() for path in play._files()}

    def spelled(place: str) -> str:
        return place.lower() if play.folding else place

    there = {spelled(place): content for place, content in found.items()}
    for path, content in wanted.items():
        for place in play.places(path):
            # What was there is not deleted where the source has it.
            assert place not in before or place in found, place
            calm = not play.restless and observed.state == "SUCCEEDED" and content in play.constant
            if not calm or str(path.relative_to(play.source)) in failed:
                continue
            # Under the name that it had when it was listed, perhaps, where no mirror has deleted that.
            if content not in (arrived := there.get(spelled(place)), *found.values()):
                # Files that are equal in all that the task looks at are not looked into.
                assert isinstance(arrived, bytes), place
                assert len(arrived) == len(content), place
                assert play.options.sync_level == 1 or not play.options.preserve_timestamp, place
    if not (play.met["faults"] or play.met["deaths"]):
        count(play, engine, observed, failed)


def count(play: Play, engine: Engine, observed: TaskObserved, failed: dict[str, str]) -> None:
    """What the counters say is what the task has listed."""
    counters = observed.counters
    rows = read_page(engine.state / "transferred.manifest", TransferredRow, None, 10000, complete=True).rows
    twice = [path for path, times in Counter(row.destination for row in rows).items() if times > 1]
    assert not twice or play.replaced or play.restless or len(play.pairs) > 1, twice
    assert counters.failed + counters.skipped_errors == len(
        read_page(engine.state / "skipped.manifest", SkippedRow, None, 10000, complete=True).rows
    )
    assert counters.files_transferred + counters.symlinks_transferred == len(rows), (counters, len(rows))
    assert counters.files_transferred + counters.files_skipped <= counters.files
    assert counters.files <= counters.files_transferred + counters.files_skipped + len(failed) + 2 * len(play.pairs)
    if not play.options.preserve_hard_links:
        assert counters.bytes_transferred == sum(row.size for row in rows)
