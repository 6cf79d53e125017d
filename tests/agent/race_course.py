"""A race for a path in virtual time, against worlds that say when each attempt ends."""

from __future__ import annotations

import math
from collections.abc import Callable

from agent.connect.race import Arrange, Cancel, Dial, Give, Punch, Race, SendOffer, ShowPorts
from protocol.candidates import Candidate

V4 = Candidate(kind="host", host="192.0.2.1", port=4000)


V6 = Candidate(kind="host", host="2001:db8::1", port=4000)


OUTSIDE = Candidate(kind="mapped-tcp", host="192.0.2.99", port=5000)


class Course:
    """Runs a race against a world that says when each attempt ends, and records what happened."""

    def __init__(self, race: Race, now: float = 100.0) -> None:
        self.race = race
        self.now = now
        self.started: list[tuple[float, object]] = []
        self.given: list[tuple[float, int]] = []
        self.cancelled: list[int] = []
        self.kinds: dict[int, str] = {}
        self._later: list[tuple[float, Callable[[], None]]] = []

    def later(self, seconds: float, what: Callable[[], None]) -> None:
        self._later.append((self.now + seconds, what))

    def run(self, world: Callable[[Course, object], None], until: float = 200.0) -> None:
        for _ in range(1000):
            for action in self.race.poll(self.now):
                self.started.append((self.now - 100.0, action))
                if isinstance(action, Give):
                    self.given.append((self.now - 100.0, action.id))
                elif isinstance(action, Cancel):
                    self.cancelled.append(action.id)
                else:
                    if not isinstance(action, SendOffer | ShowPorts):
                        name = "direct" if isinstance(action, Dial) else "punched"
                        self.kinds[action.id] = action.name if isinstance(action, Arrange) else name
                    world(self, action)
            due = [row for row in self._later if row[0] <= self.now]
            if due:
                self._later = [row for row in self._later if row[0] > self.now]
                for _, what in sorted(due, key=lambda row: row[0]):
                    what()
                continue
            times = [self.race.deadline(self.now), *(when for when, _ in self._later)]
            if self.race.over(self.now) and not self._later:
                return
            if math.isinf(min(times)):
                return
            self.now = max(self.now, min(times))
            if self.now > until:
                break
        raise AssertionError("the race does not end")

    def kinds_given(self) -> list[str]:
        return [self.kinds.get(attempt, "reversed") for _, attempt in self.given]


def silent(_course: Course, _action: object) -> None:
    """Nothing ever answers."""


def relayed(*, tunnel: float | None, punched: float | None, source: bool = True) -> Callable[[Course, object], None]:
    """A world where only an arrangement helps: seconds until the tunnel and the punched connection are up."""

    def world(course: Course, action: object) -> None:
        race = course.race
        if isinstance(action, SendOffer) and source:
            course.later(
                0.06, lambda: race.go(course.now, 0.03, [], [OUTSIDE], 2, ["tunnel"] if tunnel is not None else [])
            )
        elif isinstance(action, Arrange) and tunnel is not None:
            course.later(tunnel, lambda: race.connected(course.now, action.id))
        elif isinstance(action, Punch):
            if punched is None:
                course.later(4.0, lambda: race.failed(course.now, action.id, "nothing came through"))
            else:
                course.later(punched, lambda: race.connected(course.now, action.id))

    return world


def meeting(met: float | None, punched: float | None) -> Callable[[Course, object], None]:
    """The relay has seen all ports after ``met`` seconds, and a punched connection is up after ``punched`` more."""

    def world(course: Course, action: object) -> None:
        if isinstance(action, ShowPorts):
            if met is not None:
                course.later(met, lambda: course.race.met(course.now, 0.02, [OUTSIDE], [1, 2]))
        elif isinstance(action, Punch) and action.ahead:
            if punched is None:
                course.later(4.0, lambda: course.race.failed(course.now, action.id, "nothing came through"))
            else:
                course.later(punched, lambda: course.race.connected(course.now, action.id))
        else:
            relayed(tunnel=0.05, punched=0.05)(course, action)

    return world


def when(course: Course, kind: type) -> list[float]:
    return [round(moment, 3) for moment, action in course.started if isinstance(action, kind)]


def met_race(**options: object) -> Course:
    race = Race(now=100.0, direct=[], **options)  # type: ignore[arg-type]
    race.arranged(100.0, 2, 0, meets=True)
    return Course(race)
