"""Many small questions to the database, answered in few transactions.

When thousands of agents come back at once, each has its line to write and its rows to read. A transaction for each,
with its thread and its sync of the disk, would cost more than all the rest of a link.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

import trio
from sqlalchemy import Connection

from relay.store.database import StoreBroken, StoreBusy, for_all

Q = TypeVar("Q")
A = TypeVar("A")

# Transaction as in `Store.read` and `Store.write`.
Transact = Callable[[Callable[[Connection], Any]], Awaitable[Any]]

MOST = 256
# Seconds from the begin of one transaction to that of the next, while questions come so fast.
SPACING = 0.05


class _Question(Generic[Q, A]):
    __slots__ = ("answer", "asked", "failure", "left", "turn")

    def __init__(self, asked: Q) -> None:
        self.asked = asked
        # Of one element once it is there: the answer itself may be None.
        self.answer: tuple[A] | None = None
        self.failure: Exception | None = None
        # Set when it is answered, or may ask for everybody who waits.
        self.turn = trio.Event()
        # Whoever asked is gone.
        self.left = False


class Batch(Generic[Q, A]):
    """Puts questions to ``work`` in the order they came, as many in one transaction as came during the one before.

    ``transact`` is `Store.read` or `Store.write`; ``work`` answers each question, in order. A question that comes alone
    is a transaction of its own, at once; one that comes less than ``spacing`` seconds after the last transaction began
    waits until they are over, and has company by then.
    """

    def __init__(
        self,
        transact: Transact,
        work: Callable[[Connection, Sequence[Q]], Sequence[A]],
        *,
        most: int = MOST,
        spacing: float = SPACING,
    ) -> None:
        self._transact = transact
        self._work = work
        self._most = most
        self._waiting: deque[_Question[Q, A]] = deque()
        self._spacing = spacing
        self._begun = -math.inf
        self._busy = False

    async def ask(self, asked: Q) -> A:
        """The answer to one question. Raises what ``work`` raises for it, and the store's errors.

        A question that fails takes no other down: the others of its transaction are asked again one by one. Where the
        database cannot be used all of them are told so at once.
        Cancellation may leave the question asked.
        """
        question: _Question[Q, A] = _Question(asked)
        self._waiting.append(question)
        try:
            while question.answer is None:
                if question.failure is not None:
                    raise question.failure
                if self._busy:
                    question.turn = trio.Event()
                    await question.turn.wait()
                else:
                    # Whoever finds the database free asks for everybody who waits.
                    await self._serve()
        finally:
            # One that waits stays in the queue, and is passed over: thousands may leave at once, and to look for each
            # among the others would take seconds.
            question.left = True
            if question.answer is None and question.failure is None:
                self._wake_next()
        return question.answer[0]

    async def _serve(self) -> None:
        self._busy = True
        taken: list[_Question[Q, A]] = []
        try:
            if (moment := self._begun + self._spacing) > trio.current_time():
                await trio.sleep_until(moment)
            self._begun = trio.current_time()
            while len(taken) < self._most and self._pass_over_left():
                taken.append(self._waiting.popleft())
            try:
                if taken:
                    await self._answer(taken)
            except (StoreBusy, StoreBroken) as error:
                # No question's doing: each would wait for the database again, one after the other.
                for question in taken:
                    question.failure = error
            except Exception as error:
                if len(taken) == 1:
                    taken[0].failure = error
                else:
                    await self._one_by_one(taken)
        finally:
            # After a cancellation the others still want to know.
            self._waiting.extendleft(
                question
                for question in reversed(taken)
                if question.answer is None and question.failure is None and not question.left
            )
            self._busy = False
            # Nobody else: to wake thousands each time would cost more than their answers do.
            for question in taken:
                question.turn.set()
            self._wake_next()

    def _wake_next(self) -> None:
        if not self._busy and self._pass_over_left():
            self._waiting[0].turn.set()

    def _pass_over_left(self) -> bool:
        """Whether somebody is still waiting, who is the first one now."""
        while self._waiting and self._waiting[0].left:
            self._waiting.popleft()
        return bool(self._waiting)

    async def _one_by_one(self, questions: Sequence[_Question[Q, A]]) -> None:
        for question in questions:
            try:
                await self._answer([question])
            except Exception as error:
                question.failure = error

    async def _answer(self, questions: Sequence[_Question[Q, A]]) -> None:
        asked = [question.asked for question in questions]
        with for_all():
            answers = await self._transact(lambda connection: self._work(connection, asked))
        for question, answer in zip(questions, answers, strict=True):
            question.answer = (answer,)
