"""No lane's TLS keys protect more than they may: another follows it in time, and nothing is sent twice for that."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from agent.transfer.asking.ranges import MEMORY_WINDOW
from agent.transfer.basis.lane_keys import AT_MOST, KEY_RECORDS, LAST_RECORD, RECORD, Succession, records_of
from agent.transfer.receiving import lanes
from protocol.control import TaskItem
from tests.agent import engine_inside, engine_world
from tests.agent.engine_inside import Engine, contents, quick_path, tree

__all__ = ["quick_path"]

pytestmark = pytest.mark.usefixtures("workers_forked")

MIB = 1024 * 1024


def test_the_limits_are_those_of_the_standard() -> None:
    """RFC 8446 section 5.5, with what may be on its way of a lane that gets no more work."""
    assert LAST_RECORD == 23_726_566
    assert KEY_RECORDS * RECORD == 256 * 1024 * MIB
    assert KEY_RECORDS * AT_MOST + 2 * MEMORY_WINDOW // RECORD < LAST_RECORD
    assert [records_of(size) for size in (0, 1, RECORD, RECORD + 1)] == [0, 1, 1, 2]


@given(st.lists(st.tuples(st.sampled_from(["carry", "up", "lost"]), st.integers(0, 5), st.integers(1, 60))))
def test_every_lane_is_followed_in_time_and_never_before(steps: list[tuple[str, int, int]]) -> None:
    """Lanes carry at random, come up late or not at all, and are lost."""
    succession, limit = Succession(100), 100
    carried, opening, leaving = {1: 0}, set[int](), set[int]()
    last = 1
    for step, which, records in steps:
        staying = sorted(carried)
        if step == "carry" and staying:
            carried[staying[which % len(staying)]] += records
        elif step == "up" and opening:
            number = sorted(opening)[which % len(opening)]
            opening.discard(number)
            carried[number] = 0
            for old in succession.up(number):
                # Somebody is there to take over.
                leaving.add(old)
        elif step == "lost":
            known = sorted(carried.keys() | opening)
            number = known[which % len(known)] if known else 0
            carried.pop(number, None)
            opening.discard(number)
            leaving.discard(number)
            succession.gone(number)
        at_work = {number: count for number, count in carried.items() if number not in leaving}
        due = succession.due(at_work)
        for old in due:
            assert at_work[old] >= limit
            last += 1
            succession.opening(old, last)
            opening.add(last)
        assert not succession.due(at_work), "nobody is followed twice at once"
        for number, count in at_work.items():
            assert succession.is_followed(number) == (count >= limit)
            assert (number in succession.spent(at_work)) == (count >= limit * AT_MOST)
        assert all(carried[number] >= limit for number in leaving & carried.keys())


@pytest.mark.parametrize("processes", [0, 1])
async def test_lanes_follow_one_another_and_nothing_comes_twice(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(lanes, "MEASURE_EVERY", 0.02)
    monkeypatch.setattr("agent.transfer.lane_processes.lane_process.TELL_EVERY", 0.02)
    engine = Engine(quick_path, processes=processes, key_records=3 * MIB // RECORD)
    # What a lane has been asked for when it is due, its window, it still carries.
    (engine.source / "large").write_bytes(os.urandom(96 * MIB + 5))
    tree(engine.source, [f"{folder}/{name}" for folder in "ab" for name in range(40)])
    engine.pace.set_rate(200 * MIB)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    assert not engine.temporaries()
    assert engine.opened >= 4
    assert observed.counters.bytes_sent_again == 0
    assert not any(report.counters.bytes_sent_again for report in engine.reports)
    assert set(engine.codes()) == {"STARTED", "SUCCEEDED"}
    assert engine.sessions == 1


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize("by_items", [False, True])
async def test_a_lane_that_is_told_to_leave_before_it_is_up_is_not_opened_again(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, by_items: bool
) -> None:
    """A better path may be found while the first lane is being opened. What it was to bring comes all the same."""
    names = [f"file-{number}" for number in range(20)]
    items = [TaskItem(source_path=f"/{name}", destination_path=f"/{name}") for name in names]
    engine = Engine(quick_path, processes=processes, items=items if by_items else list(engine_inside.WHOLE))
    tree(engine.source, names)
    (engine.source / names[0]).write_bytes(os.urandom(24 * MIB))
    engine.pace.set_rate(100 * MIB)
    open_lane = engine_inside.Line.lane

    async def lane(line: engine_inside.Line) -> object:
        opened = await open_lane(line)
        if engine.opened == 1:
            await trio.sleep(0.05)
            line.on_better_path()
        return opened

    monkeypatch.setattr(engine_inside.Line, "lane", lane)
    observed = await engine.run(seconds=10)
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    assert engine.opened == 2
    assert set(engine.codes()) == {"STARTED", "SUCCEEDED"}


async def test_a_source_ends_a_lane_that_its_destination_does_not(quick_path: Path) -> None:
    engine = Engine(quick_path, last_record=3 * MIB // RECORD)
    (engine.source / "large").write_bytes(os.urandom(32 * MIB + 5))
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    assert engine.opened >= 4
    assert observed.counters.bytes_sent_again == 0
    assert engine.sessions == 1


@pytest.mark.soak
@pytest.mark.parametrize("workers", [1, 2])
async def test_lanes_of_real_agents_follow_one_another(tmp_path: Path, workers: int) -> None:
    # One lane, or what a slow disk leaves to the end could be asked of both.
    async with engine_world.world(tmp_path, workers, key_records=4 * MIB // RECORD, lanes=1) as world:
        folder = world.alpha.root / "data"
        folder.mkdir()
        for number in range(3):
            (folder / f"large-{number}").write_bytes(os.urandom(400 * MIB))
        for number in range(2000):
            (folder / str(number)).write_bytes(os.urandom(5000))
        task = await world.submit([TaskItem(source_path="/data", destination_path="/data", recursive=True)])
        renewed = 0
        while not (observed := world.beta.service.get_task(task)).completion_time:
            if observed.flow is not None:
                renewed = max(renewed, observed.flow.renewed)
            await trio.sleep(0.05)
        assert observed.state == "SUCCEEDED", observed
        assert contents(world.beta.root / "data") == contents(folder)
        assert not list(world.beta.root.rglob(".towpath.*"))
        assert renewed >= 3
        assert observed.counters.bytes_sent_again == 0
        received = (world.beta.state / "tasks" / task / "received").read_bytes()
        assert int.from_bytes(received, "little") == observed.counters.bytes_total
        assert not [event for event in world.events if event.is_error]
