"""Whose turn it is: a thousand tasks of several users, bounded workers, one task at a time on any place."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.transfer.tasks.places import Places
from agent.transfer.tasks.turns import WAITING_FOR_EACH, Candidate, Claim, next_turns
from protocol.control import TaskItem
from protocol.names import CollectionPath
from tests.agent.engine_world import world
from tests.agent.orders import order_of

pytestmark = pytest.mark.usefixtures("workers_forked")


def claim(*paths: str, collection: str = "c") -> Claim:
    return Places().named(order_of(*paths, collection=collection), None)


def anything(_collection: str, _running: int) -> bool:
    return True


def task(number: int, *paths: str, owner: str = "o", **fields: bool) -> Candidate:
    return Candidate(id=str(number), owner_id=owner, claim=claim(*paths), **{"runnable": True, **fields})


@pytest.mark.parametrize(
    ("first", "second", "meet"),
    [
        ("/a", "/a", True),
        ("/a", "/a/b/c", True),
        ("/a/b/c", "/a", True),
        ("/", "/anything", True),
        ("/a/b", "/a/c", False),
        ("/a", "/ab", False),
        ("/a/../b", "/b/x", True),
    ],
)
def test_places_that_overlap(first: str, second: str, meet: bool) -> None:
    turns = next_turns([task(1, first), task(2, second)], 4, anything)
    assert turns.start == (["1"] if meet else ["1", "2"])
    assert turns.behind == ({"2": "1"} if meet else {})


def test_other_collections_are_other_places() -> None:
    other = Candidate(id="2", owner_id="o", claim=claim("/a", collection="d"), runnable=True)
    assert next_turns([task(1, "/a"), other], 4, anything).start == ["1", "2"]


def test_who_came_first_goes_first_also_when_both_wait() -> None:
    turns = next_turns([task(1, "/x", running=True), task(2, "/x/y"), task(3, "/x/y/z"), task(4, "/w")], 4, anything)
    assert turns.start == ["4"]
    assert turns.behind == {"2": "1", "3": "1"}


def test_a_paused_task_holds_no_place_and_a_cancel_waits_for_none() -> None:
    turns = next_turns([task(1, "/x", runnable=False), task(2, "/x"), task(3, "/x", ending=True)], 4, anything)
    assert set(turns.start) == {"2", "3"}


def test_tasks_that_wait_for_somebody_lock_nobody_out() -> None:
    stuck = [task(number, f"/{number}", running=True, waiting=True) for number in range(4)]
    assert next_turns([*stuck, task(9, "/nine")], 4, anything).start == ["9"]
    many = [task(number, f"/{number}", running=True, waiting=True) for number in range(4 * (1 + WAITING_FOR_EACH))]
    assert next_turns([*many, task(99, "/nine")], 4, anything).start == []


def test_running_tasks_have_their_workers_and_waiting_ones_keep_only_their_process() -> None:
    running = [task(number, f"/{number}", running=True) for number in range(3)]
    waiting = [task(10 + number, f"/{10 + number}", running=True, waiting=True) for number in range(5)]
    new = [task(100 + number, f"/{100 + number}") for number in range(4)]
    assert next_turns([*running, *waiting, *new], 4, anything).start == ["100"]
    assert next_turns([*running, task(3, "/3", running=True), *new], 4, anything).start == []
    # Processes are bounded as well: there are ten for two workers.
    many = [task(10 + number, f"/{10 + number}", running=True, waiting=True) for number in range(9)]
    assert next_turns([*many, *new], 2, anything).start == ["100"]


def test_a_collection_without_room_holds_up_nobody_else() -> None:
    asked: list[tuple[str, int]] = []

    def two_into_c(collection: str, so_many: int) -> bool:
        asked.append((collection, so_many))
        return collection != "c" or so_many < 2

    tasks = [task(0, "/0", running=True), *(task(number, f"/{number}") for number in range(1, 4))]
    tasks.append(Candidate(id="9", owner_id="o", claim=claim("/a", collection="d"), runnable=True))
    assert next_turns(tasks, 4, two_into_c).start == ["1", "9"]
    assert asked == [("c", 1), ("c", 2), ("c", 2), ("d", 0)]


def test_owners_with_fewer_running_tasks_go_first_and_then_the_oldest() -> None:
    tasks = [task(0, "/0", owner="busy", running=True)]
    tasks += [task(1, "/1", owner="busy"), task(2, "/2", owner="idle"), task(3, "/3", owner="idle")]
    assert next_turns(tasks, 4, anything).start == ["2", "1", "3"]


def test_a_task_that_waits_is_told_which_other_one_is_in_its_way() -> None:
    turns = next_turns([task(1, "/a/b", running=True), task(2, "/a"), task(3, "/a/b/c")], 4, anything)
    assert turns.behind == {"2": "1", "3": "2"}
    turns = next_turns([task(1, "/a/b"), task(2, "/a/c"), task(3, "/a")], 4, anything)
    assert (turns.start, turns.behind) == (["1", "2"], {"3": "1"})
    assert next_turns([task(number, "/a") for number in (1, 2, 3)], 4, anything).behind == {"2": "1", "3": "1"}


def test_a_thousand_tasks_of_several_users_are_served_fairly() -> None:
    """One user has submitted 940, six others ten each, later: nobody waits for the 940."""
    workers = 4
    tasks = [task(number, f"/big/{number}", owner="big") for number in range(940)]
    tasks += [
        task(1000 + 100 * user + number, f"/{user}/{number}", owner=f"user {user}")
        for user in range(6)
        for number in range(10)
    ]
    owners = {one.id: one.owner_id for one in tasks}
    left = {one.id: one for one in tasks}
    running: list[str] = []
    random = Random(7)
    served: list[str] = []
    most = 0
    while left:
        turns = next_turns(
            [replace(one, running=one.id in running, runnable=one.id not in running) for one in left.values()],
            workers,
            anything,
        )
        running += turns.start
        served += [owners[one] for one in turns.start]
        most = max(most, len(running))
        # No user has two more than another one who is waiting.
        counts = Counter(owners[one] for one in running)
        waiting = {owners[one] for one in left if one not in running}
        assert all(counts[owner] + 1 >= counts.most_common(1)[0][1] for owner in waiting)
        ended = running.pop(random.randrange(len(running)))
        del left[ended]
    assert most == workers
    # All sixty of the small users are through within the first hundred or so.
    last = max(index for index, owner in enumerate(served) if owner != "big")
    assert last < 120
    print(f"tasks: {len(tasks)}, workers at most: {most}, last task of a small user started as number {last + 1}")


PLACES = st.lists(st.sampled_from([b"a", b"b"]), max_size=3).map(tuple)


def overlap(one: CollectionPath, other: CollectionPath) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.lists(PLACES, min_size=1, max_size=2), st.booleans(), st.sampled_from("xyz")), max_size=8),
    st.integers(1, 4),
)
def test_no_two_tasks_ever_have_one_place(rows: list[tuple[list[CollectionPath], bool, str]], workers: int) -> None:
    tasks = []
    for number, (paths, runnable, owner) in enumerate(rows):
        above = frozenset(path[:depth] for path in paths for depth in range(len(path)))
        tasks.append(
            Candidate(id=str(number), owner_id=owner, claim=Claim("c", frozenset(paths), above), runnable=runnable)
        )
    by_id = {one.id: one for one in tasks}
    turns = next_turns(tasks, workers, anything)
    assert len(turns.start) <= workers
    for index, first in enumerate(turns.start):
        assert by_id[first].runnable
        for second in turns.start[index + 1 :]:
            for one in by_id[first].claim.paths:
                assert not any(overlap(one, other) for other in by_id[second].claim.paths)
    # The first that can run is never kept waiting.
    first_runnable = next((one.id for one in tasks if one.runnable), None)
    assert first_runnable not in turns.behind


async def test_two_tasks_on_one_path_run_one_after_the_other(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        (made.alpha.root / "one").write_bytes(os.urandom(40 * 1024 * 1024))
        (made.alpha.root / "two").write_bytes(b"two")
        first = await made.submit([TaskItem(source_path="/one", destination_path="/same")])
        second = await made.submit([TaskItem(source_path="/two", destination_path="/same")])
        with trio.fail_after(30):
            while made.beta.service.get_task(second).status_code != "DESTINATION_BUSY":
                assert made.beta.service.get_task(first).state != "SUCCEEDED"
                await trio.sleep(0.005)
        assert first in made.beta.service.get_task(second).status_sentence
        assert (await made.wait(first)).state == "SUCCEEDED"
        assert (await made.wait(second)).state == "SUCCEEDED"
        assert (made.beta.root / "same").read_bytes() == b"two"
