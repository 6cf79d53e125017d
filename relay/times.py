"""Times as the Globus documents write them: ISO 8601 in UTC, in whole seconds, file listings with a space for the T.
Between relay and agents, and for operators, with microseconds."""

from __future__ import annotations

import datetime
import math

# The first and the last second of the calendar; every conversion below succeeds between them.
_FIRST, _LAST = -62_135_596_800, 253_402_300_799
MAX_NS = _LAST * 10**9


def iso(seconds: float | None) -> str | None:
    """Unix seconds as ``2024-02-06T06:59:02.291996+00:00``, always with microseconds; within the calendar."""
    if seconds is None:
        return None
    return datetime.datetime.fromtimestamp(max(_FIRST, min(seconds, _LAST)), datetime.UTC).isoformat(
        timespec="microseconds"
    )


def api_time(seconds: float | None) -> str | None:
    """The same in whole seconds, ``2024-02-06T06:59:02+00:00``, as Globus writes the times of its documents and as
    scripts that were written for Globus read them."""
    if seconds is None:
        return None
    moment = datetime.datetime.fromtimestamp(math.floor(max(_FIRST, min(seconds, _LAST))), datetime.UTC)
    return moment.isoformat(timespec="seconds")


def listing_time(mtime_ns: int | None) -> str | None:
    """Nanoseconds since 1970 as ``2024-02-06 06:59:02+00:00``; what a peer invents is cut to the years 1 to 9999."""
    if mtime_ns is None:
        return None
    seconds = max(_FIRST, min(mtime_ns, MAX_NS) // 10**9)
    moment = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(seconds=seconds)
    return moment.isoformat(sep=" ", timespec="seconds")


def parse(text: str) -> float:
    """Unix seconds of an ISO 8601 time or ``YYYY-MM-DD HH:MM:SS``; UTC unless it says otherwise.

    Raises ValueError, also for a moment that lies outside the calendar in UTC, which `iso` could not write.
    """
    if len(text) > 64:
        raise ValueError("too long for a time")
    moment = datetime.datetime.fromisoformat(text.strip())
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    try:
        seconds = moment.timestamp()
    except OverflowError as error:
        raise ValueError("outside the calendar") from error
    if not _FIRST <= seconds <= _LAST:
        raise ValueError("outside the calendar")
    return seconds
