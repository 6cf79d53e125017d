"""How often what is tried again before a passing fault counts as a lasting one: a budget for each kind of error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

from protocol.errors import NeedsPerson, ProtocolError, RetryLater, TaskFailed, TowpathError

DEFAULT_ATTEMPTS: Final = 5
# Attempts for one file or folder; what is not named has the default. Errors that need a person are waited for without
# end, permanent ones are not tried again at all. `docs/states.md` repeats this table.
ATTEMPTS: Final[Mapping[str, int]] = {
    # Another program is busy with it; it is so for a while.
    "BUSY": 12,
    # A network file system that does not answer.
    "TIMEOUT": 12,
    "STALE_HANDLE": 12,
    # A file that is being written all the time: better left out, and said so, than waited for.
    "FILE_CHANGED": 5,
    "IO_ERROR": 5,
    "VERIFY_CHECKSUM": 5,
}
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 15.0


def attempts(error: TowpathError) -> int:
    """How often something that fails like this is tried in all."""
    if isinstance(error, RetryLater | ProtocolError):
        return ATTEMPTS.get(error.code, DEFAULT_ATTEMPTS)
    return 1


def pause(attempt: int) -> float:
    """Seconds before the next attempt after the n-th (from 1)."""
    return min(FIRST_PAUSE * 4.0 ** min(attempt - 1, 10), LONGEST_PAUSE)


class Patience:
    """Counts failures of places that a run cannot go on without; it outlives runs."""

    def __init__(self) -> None:
        self._failures: Counter[bytes] = Counter()

    def is_passing(self, place: bytes, error: TowpathError) -> bool:
        """Whether the run should end and begin anew for the sake of this place."""
        if isinstance(error, NeedsPerson | TaskFailed):
            return True
        self._failures[place] += 1
        return self._failures[place] < attempts(error)
