"""What a task says while something is wrong."""

from __future__ import annotations

from collections.abc import Callable

from protocol.control import TaskObserved
from tests.agent.engine_inside import Engine, Line


class Seen:
    """What a task says while something is wrong; mends it once the task has said so."""

    def __init__(self, code: str, mend: Callable[[], None]) -> None:
        self.code = code
        self.mend = mend
        self.told: list[TaskObserved] = []

    def __call__(self, _line: Line, observed: TaskObserved) -> None:
        if observed.status_code == self.code and not self.told:
            self.told.append(observed)
            self.mend()

    def check(self, engine: Engine, who: str, words: str) -> None:
        """Held up in words that name a person and a place, told in an event."""
        (observed,) = self.told
        assert (observed.state, observed.who) == ("WAITING", who), observed
        assert words in observed.status_sentence, observed.status_sentence
        assert observed.status_sentence.endswith(".")
        (event, *_) = (event for event in engine.events if event.code == self.code)
        assert event.is_error
        assert who in event.details
