"""Questions put to the database together: nobody is forgotten, whoever fails or leaves."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from random import Random
from typing import Any, cast

import pytest
import trio
import trio.testing
from sqlalchemy import Connection

from relay.store.batch import Batch
from relay.store.database import StoreBroken, StoreBusy

NO_CONNECTION = cast("Connection", None)


class Database:
    """Runs work after one second of virtual time; remembers what was asked together."""

    def __init__(self) -> None:
        self.rounds: list[list[int]] = []
        self.poison: set[int] = set()

    async def transact(self, work: Callable[[Connection], Any]) -> Any:
        await trio.sleep(1)
        return work(NO_CONNECTION)

    def work(self, _connection: Connection, asked: Sequence[int]) -> list[int | None]:
        self.rounds.append(list(asked))
        if self.poison & set(asked):
            raise LookupError("on purpose")
        return [None if question == 0 else question * 10 for question in asked]


@pytest.fixture
def database() -> Database:
    return Database()


async def test_what_comes_during_a_transaction_shares_the_next_one(
    database: Database, autojump_clock: trio.testing.MockClock
) -> None:
    batch = Batch(database.transact, database.work, most=8)
    answers: dict[int, int | None] = {}

    async def ask(question: int) -> None:
        answers[question] = await batch.ask(question)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, 1)
        await trio.sleep(0.5)
        for question in [0, *range(2, 13)]:
            nursery.start_soon(ask, question)
            await trio.lowlevel.checkpoint()
    assert answers == {0: None} | {question: question * 10 for question in range(1, 13)}
    assert [len(together) for together in database.rounds] == [1, 8, 4]
    # First come, first served.
    assert list(chain(*database.rounds)) == [1, 0, *range(2, 13)]


async def test_a_lone_question_is_asked_at_once_and_a_crowd_in_company(
    database: Database, autojump_clock: trio.testing.MockClock
) -> None:
    async def at_once(work: Callable[[Connection], Any]) -> Any:
        return work(NO_CONNECTION)

    batch = Batch(at_once, database.work, spacing=0.05)
    start = trio.current_time()
    await batch.ask(1)
    assert trio.current_time() == start
    async with trio.open_nursery() as nursery:
        for question in range(2, 12):
            nursery.start_soon(batch.ask, question)
            await trio.sleep(0.01)
    # Ten questions in a tenth of a second: three transactions, and nobody waited for longer than half of that.
    assert [len(together) for together in database.rounds] == [1, 5, 5]
    assert trio.current_time() - start <= 0.15
    # Whoever leaves while it waits for all takes nobody along.
    with trio.move_on_after(0.01):
        await batch.ask(12)
    assert await batch.ask(13) == 130
    await trio.sleep(1)
    start = trio.current_time()
    await batch.ask(14)
    assert trio.current_time() == start


async def test_a_question_that_fails_fails_alone(database: Database, autojump_clock: trio.testing.MockClock) -> None:
    batch = Batch(database.transact, database.work)
    database.poison = {3}
    outcomes: dict[int, object] = {}

    async def ask(question: int) -> None:
        try:
            outcomes[question] = await batch.ask(question)
        except LookupError:
            outcomes[question] = "failed"

    async with trio.open_nursery() as nursery:
        for question in range(1, 6):
            nursery.start_soon(ask, question)
    assert outcomes == {1: 10, 2: 20, 3: "failed", 4: 40, 5: 50}


@pytest.mark.parametrize("error", [StoreBusy("It is busy."), StoreBroken("It is full.")])
async def test_a_database_that_cannot_be_used_is_not_waited_for_by_one_after_the_other(
    autojump_clock: trio.testing.MockClock, error: Exception
) -> None:
    """Each would wait for its lock for a quarter of a minute."""
    asked: list[int] = []

    async def transact(_: object) -> Any:
        asked.append(1)
        await trio.sleep(15)
        raise error

    batch: Batch[int, int] = Batch(transact, lambda _connection, questions: questions)
    failed: list[float] = []

    async def ask(question: int) -> None:
        with pytest.raises(type(error)):
            await batch.ask(question)
        failed.append(trio.current_time())

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for question in range(100):
            nursery.start_soon(ask, question)
    assert len(failed) == 100
    assert len(asked) <= 2
    assert max(failed) - start <= 31


async def test_whoever_asks_for_all_may_leave(database: Database, autojump_clock: trio.testing.MockClock) -> None:
    batch = Batch(database.transact, database.work)
    answers: list[int | None] = []
    async with trio.open_nursery() as nursery:
        leaving = trio.CancelScope()

        async def leader() -> None:
            with leaving:
                await batch.ask(1)

        async def other(question: int) -> None:
            answers.append(await batch.ask(question))

        nursery.start_soon(leader)
        for question in (2, 3):
            nursery.start_soon(other, question)
        await trio.sleep(0.5)
        leaving.cancel()
    assert sorted(answers, key=str) == [20, 30]
    assert 1 not in database.rounds[-1]


async def test_one_who_waits_may_leave(database: Database, autojump_clock: trio.testing.MockClock) -> None:
    batch = Batch(database.transact, database.work)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(batch.ask, 1)
        await trio.sleep(0.5)
        with trio.move_on_after(0.1):
            await batch.ask(2)
        nursery.start_soon(batch.ask, 3)
    assert list(chain(*database.rounds)) == [1, 3]


async def test_a_question_whose_asker_has_left_holds_up_nobody(
    database: Database, autojump_clock: trio.testing.MockClock
) -> None:
    batch = Batch(database.transact, database.work, most=2)
    answers: list[int | None] = []
    leaving = {question: trio.CancelScope() for question in range(1, 7)}

    async def ask(question: int) -> None:
        with leaving[question]:
            answers.append(await batch.ask(question))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for question in leaving:
                nursery.start_soon(ask, question)
                await trio.testing.wait_all_tasks_blocked()
            await trio.sleep(1.5)
            # Two and three are being asked, by two for both.
            for question in (3, 2):
                leaving[question].cancel()
                await trio.testing.wait_all_tasks_blocked()
    assert answers == [10, 40, 50, 60]
    assert 3 not in chain(*database.rounds)


async def test_thousands_who_leave_at_once_are_not_looked_for(
    database: Database, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has many calls under way may hang up on all of them; to find each in the queue took the relay seconds."""

    class Queue(deque[Any]):
        def __contains__(self, _: object) -> bool:
            raise AssertionError("all who wait are looked through")

        def remove(self, _: object) -> None:
            raise AssertionError("all who wait are looked through")

    batch = Batch(database.transact, database.work)
    batch._waiting = Queue()
    answers: list[int | None] = []

    async def ask(question: int) -> None:
        answers.append(await batch.ask(question))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, 1)
        await trio.sleep(0.5)
        async with trio.open_nursery() as leaving:
            for question in range(2, 2000):
                (leaving if question % 100 else nursery).start_soon(ask, question)
            await trio.sleep(0.1)
            leaving.cancel_scope.cancel()
    assert sorted(cast("list[int]", answers)) == [10, *range(1000, 20_000, 1000)]
    assert [len(together) for together in database.rounds] == [1, 19]


@pytest.mark.parametrize("seed", range(20))
async def test_everybody_who_stays_is_answered(
    database: Database, autojump_clock: trio.testing.MockClock, seed: int
) -> None:
    random, answers = Random(seed), dict[int, int | None]()
    batch = Batch(database.transact, database.work, most=random.choice((1, 2, 5)))
    database.poison = {7} if seed % 2 else set()
    stays: set[int] = set()

    async def ask(question: int, patience: float) -> None:
        await trio.sleep(random.uniform(0, 5))
        with trio.move_on_after(patience), suppress(LookupError):
            answers[question] = await batch.ask(question)

    with trio.fail_after(300):
        async with trio.open_nursery() as nursery:
            for question in range(1, 31):
                patience = random.choice((0.3, 2.0, math.inf))
                if patience == math.inf and question not in database.poison:
                    stays.add(question)
                nursery.start_soon(ask, question, patience)
    assert stays <= answers.keys()
    assert all(answer == question * 10 for question, answer in answers.items())
