"""A thread beside another one, for system calls that take long: runs what it is asked in order, answers on a queue."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, Self, TypeVar

from protocol import threads

Answer = TypeVar("Answer")
Item = TypeVar("Item", contravariant=True)


class Answers(Protocol[Item]):
    """Where answers go, from any thread; a queue, for one."""

    def put(self, item: Item, /) -> object: ...


class LookAgain:
    """In a queue: something has come that goes before what is in it."""


class AnswersFirst(Generic[Answer]):
    """Answers that are to be taken before everything else in a queue: whoever takes from that looks at ``waiting``
    each time, and there is a `LookAgain` in it for each answer."""

    def __init__(self, queue: Answers[LookAgain]) -> None:
        self.waiting: deque[Answer] = deque()
        self._queue = queue

    def put(self, answer: Answer, /) -> None:
        self.waiting.append(answer)
        self._queue.put(LookAgain())


class Broken(Exception):
    """What was asked of a side thread raised; the reason is the cause."""


class SideThread(Generic[Answer]):
    """A context manager: the thread lives inside the block, which ends when everything asked for is done. To enter it
    raises `protocol.threads.NoThread`.

    Each answer (or `Broken`) goes to ``answers``.
    """

    def __init__(self, name: str, answers: Answers[Answer | Broken]) -> None:
        self._answers = answers
        self._work: queue.SimpleQueue[Callable[[], Answer] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name)

    def ask(self, function: Callable[[], Answer]) -> None:
        """Run this after everything asked for before."""
        self._work.put(function)

    def _run(self) -> None:
        while (function := self._work.get()) is not None:
            try:
                answer: Answer | Broken = function()
            except BaseException as error:
                # It is the asking thread that ends by it.
                answer = Broken()
                answer.__cause__ = error
            self._answers.put(answer)

    def __enter__(self) -> Self:
        threads.start(self._thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._work.put(None)
        self._thread.join()
