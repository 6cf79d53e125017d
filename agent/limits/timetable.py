"""Times of the week at which other limits count: `mon-fri 08:00-18:00`, `sat,sun`, `22:00-06:00`. Local time."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeVar

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY = "|".join(DAYS)
_TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_PART = f"(?:{_DAY})(?:-(?:{_DAY}))?"
_SPAN = f"{_TIME}-(?:{_TIME}|24:00)"
FORM = f"(?:{_PART}(?:,{_PART})*(?: {_SPAN})?|{_SPAN})"
_DAY_MINUTES = 24 * 60


@dataclass(frozen=True)
class Weekly:
    """Some hours of some days. Hours that pass midnight belong to the day on which they begin."""

    days: frozenset[int]
    start: int = 0
    end: int = _DAY_MINUTES

    def contains(self, moment: datetime) -> bool:
        """Whether a moment (in the time of the table) lies in it."""
        minute = moment.hour * 60 + moment.minute
        today, yesterday = moment.weekday() in self.days, (moment.weekday() - 1) % 7 in self.days
        if self.start < self.end:
            return today and self.start <= minute < self.end
        return (today and minute >= self.start) or (yesterday and minute < self.end)


def parse_weekly(text: str) -> Weekly:
    """The hours a text names. Raises ValueError with a sentence for the user."""
    if re.fullmatch(FORM, text) is None:
        raise ValueError(f"must be times of the week such as 'mon-fri 08:00-18:00', not {text[:64]!r}")
    days, _, hours = text.partition(" ") if text[0].isalpha() else ("mon-sun", "", text)
    start, end = 0, _DAY_MINUTES
    if hours:
        start, end = (int(part[:2]) * 60 + int(part[3:]) for part in hours.split("-"))
    if start == end:
        raise ValueError("must not end when it begins; leave the hours out for whole days")
    return Weekly(frozenset(day for part in days.split(",") for day in _days(part)), start, end)


def _days(part: str) -> Iterable[int]:
    first, _, last = part.partition("-")
    begin = DAYS.index(first)
    length = (DAYS.index(last or first) - begin) % 7 + 1
    return ((begin + step) % 7 for step in range(length))


class Entry(Protocol):
    """An entry of a time-table."""

    @property
    def when(self) -> str: ...


E = TypeVar("E", bound=Entry)


def entry_at(entries: Iterable[E], moment: datetime) -> E | None:
    """The first entry whose times hold the moment, None outside all of them."""
    return next((entry for entry in entries if parse_weekly(entry.when).contains(moment)), None)
