"""How often what is tried again before a passing fault counts as a lasting one: a budget for each kind of error."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Final

from protocol.errors import NeedsPerson, ProtocolError, RetryLater, TaskFailed, TowpathError

# The codes of content that is not what it should be, and of a file of which what had arrived is of no use any more.
VERIFY_CHECKSUM: Final = "VERIFY_CHECKSUM"
PART_LOST: Final = "PART_LOST"
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
    VERIFY_CHECKSUM: 5,
}
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 15.0
# Passing faults that storage has; all others are the connection's, or the relay's, and cost no file.
OF_STORAGE: Final = frozenset({"BUSY", "TIMEOUT", "STALE_HANDLE", "IO_ERROR", "UNKNOWN"})


def attempts(error: TowpathError) -> int:
    """How often something that fails like this is tried in all."""
    if isinstance(error, RetryLater | ProtocolError):
        return ATTEMPTS.get(error.code, DEFAULT_ATTEMPTS)
    return 1


def counted(error: TowpathError, attempt: int) -> TowpathError:
    """The error of the n-th attempt (from 1), as it is told: with how many there are. Others than passing ones as they
    are."""
    most = attempts(error)
    if most == 1 or attempt < 1:
        return error
    told = copy.copy(error)
    told.sentence = f"{error.sentence} Attempt {min(attempt, most)} of {most}."
    return told


def named(error: TowpathError, path: str) -> TowpathError:
    """The error as an event tells it, which stands alone: with the path it is about, where it has none."""
    if error.subject or not path:
        return error
    told = copy.copy(error)
    told.subject, told.sentence = path, f"{path}: {error.sentence}"
    return told


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
        return self._again(place, error)

    def lasts_at_source(self, path: bytes, error: TowpathError) -> bool:
        """Whether a fault of the source's storage was met at one of its paths as often as it is tried."""
        # No path of the destination is called so.
        return error.code in OF_STORAGE and isinstance(error, RetryLater) and not self._again(b"\0" + path, error)

    def _again(self, place: bytes, error: TowpathError) -> bool:
        self._failures[place] += 1
        return self._failures[place] < attempts(error)
