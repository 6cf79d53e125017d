"""How often somebody may give a wrong secret before they have to wait."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Memory stays bounded however many names an attacker makes up; the oldest are forgotten first.
_MAX_SUBJECTS = 20_000


@dataclass(frozen=True)
class GuessStatistics:
    """``subjects`` are the addresses and clients with recent failures, ``failures`` counts all since the start."""

    subjects: int
    failures: int


class GuessLimit:
    """Counts failures for each subject (an address, a client at an address) in a sliding window of seconds.

    A subject with ``failures`` of them in the window is refused until the oldest has left it. Pure bookkeeping: the
    caller passes the time.
    """

    def __init__(self, failures: int, window: float) -> None:
        self._allowed = failures
        self._window = window
        self._recent: OrderedDict[str, deque[float]] = OrderedDict()
        self._changed: set[str] = set()
        self._total = 0

    def retry_after(self, subjects: Iterable[str], now: float) -> float:
        """Seconds until a further try of these subjects is looked at; 0 when it may be made now."""
        return max((self._wait(subject, now) for subject in subjects), default=0.0)

    def failed(self, subjects: Iterable[str], now: float) -> None:
        """A try of these subjects was wrong."""
        self._total += 1
        for subject in subjects:
            key = _key(subject)
            times = self._recent.setdefault(key, deque(maxlen=self._allowed))
            times.append(now)
            self._recent.move_to_end(key)
            self._changed.add(key)
        self._bound()

    def forgive(self, subjects: Iterable[str], when: float) -> None:
        """What was counted as failed at that time, before it was looked at, was right."""
        self._total -= 1
        for subject in subjects:
            key = _key(subject)
            times = self._recent.get(key)
            if times is not None and when in times:
                times.remove(when)
                self._changed.add(key)

    def changed(self) -> dict[str, list[float]]:
        """The times of failures of every subject, by digest, that has some since the last call."""
        found = {key: list(self._recent[key]) for key in self._changed if key in self._recent}
        self._changed.clear()
        return found

    def mark_changed(self, keys: Iterable[str]) -> None:
        """What the last call of `changed` told was not written down."""
        self._changed.update(keys)

    def restore(self, key: str, times: Sequence[float]) -> None:
        """Take up failures that were told by `changed`, of an earlier process."""
        self._recent[key] = deque(times, maxlen=self._allowed)
        self._bound()

    def _bound(self) -> None:
        while len(self._recent) > _MAX_SUBJECTS:
            key, _ = self._recent.popitem(last=False)
            self._changed.discard(key)

    def statistics(self) -> GuessStatistics:
        """How much guessing goes on."""
        return GuessStatistics(len(self._recent), self._total)

    def _wait(self, subject: str, now: float) -> float:
        key = _key(subject)
        times = self._recent.get(key)
        if times is None:
            return 0.0
        # Times that have not come yet are of a clock that was set back since: nobody waits for it to be there again.
        while times and not now - self._window < times[0] <= now:
            times.popleft()
        if not times:
            del self._recent[key]
            return 0.0
        return times[0] + self._window - now if len(times) >= self._allowed else 0.0


def _key(subject: str) -> str:
    """Neither memory nor the database need to know who guesses at what."""
    return hashlib.sha256(subject.encode(errors="surrogatepass")).hexdigest()
