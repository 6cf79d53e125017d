"""What a watch rule says about one file, and when it says it: patterns, destination templates, settling, time-tables.

Plain functions and one small state machine; no I/O, time passed in.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

import yaml

from agent.config.kinds import Schema, Text, Wrong
from agent.storage.node import Version
from agent.storage.rules import matches
from protocol.names import escape

Path = tuple[bytes, ...]

FIELDS = ("name", "stem", "suffix", "path", "folder", "year", "month", "day", "hour", "minute", "rule", "host")
FEEDS_ITSELF = "The rule would take up again what it has brought: have its template begin with another folder."


@dataclass(frozen=True)
class Seen:
    """One file as a scan saw it; the path is relative to the watched folder."""

    path: Path
    version: Version

    @property
    def changed(self) -> float:
        """When content or name last changed (Unix seconds). Who copies a file here cannot set the change time back."""
        return max(self.version[3], self.version[4]) / 1e9


def is_wanted(path: Path, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether a file takes part: no part of its path is excluded, and its name is included (all are, by default)."""
    if any(matches(pattern.encode(), part) for pattern in exclude for part in path):
        return False
    return not include or any(matches(pattern.encode(), path[-1]) for pattern in include)


class Settling:
    """Tells files that are finished from those still being written: unchanged for a while.

    A file counts as unchanged from when it was first seen so, or from its own last change if the clock can be
    believed, so that nothing waits anew after a restart.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: dict[Path, tuple[Version, float]] = {}

    def observe(self, files: Iterable[Seen], now: float) -> list[Seen]:
        """Take a whole scan; the files that have settled, oldest change first."""
        before, self._since = self._since, {}
        settled = []
        for seen in files:
            version, since = before.get(seen.path, (seen.version, now))
            if version != seen.version:
                since = now
            # A change in the future is a clock that was wrong: only our own looking counts then.
            since = min(since, seen.changed) if 0 < seen.changed <= now else since
            self._since[seen.path] = (seen.version, since)
            if now - since >= self._seconds:
                settled.append(seen)
        return sorted(settled, key=lambda seen: (seen.changed, seen.path))

    def next_deadline(self, now: float) -> float | None:
        """When the next file will have settled, if nothing more happens to it."""
        waiting = [since + self._seconds for _, since in self._since.values() if since + self._seconds > now]
        return min(waiting, default=None)


def destination(template: str, seen: Seen, rule: str, host: str) -> str:
    """The path of a file at its destination, escaped as paths travel. Times are those of its last modification, UTC."""
    moment = datetime.fromtimestamp(max(0, seen.version[3]) / 1e9, UTC)
    name = escape(seen.path[-1])
    # Without a dot there is no stem, and what begins with its only one is a hidden name.
    stem, _, suffix = name.rpartition(".")
    values = {
        "name": name,
        "stem": stem or name,
        "suffix": suffix if stem else "",
        "path": "/".join(map(escape, seen.path)),
        "folder": "/".join(map(escape, seen.path[:-1])),
        "year": f"{moment:%Y}",
        "month": f"{moment:%m}",
        "day": f"{moment:%d}",
        "hour": f"{moment:%H}",
        "minute": f"{moment:%M}",
        "rule": rule,
        "host": host,
    }
    # An empty {folder} leaves two slashes.
    return re.sub("/{2,}", "/", template.format(**values))


def own_folder(template: str) -> Path:
    """The folder below which all files of a rule go, as far as its template fixes it."""
    fixed = template.partition("{")[0]
    return tuple(part.encode() for part in fixed.rpartition("/")[0].split("/") if part)


def feeds_itself(template: str, folder: Path, *, recursive: bool) -> bool:
    """Whether files that a rule has brought into its own collection are new files in its own folder, without end.

    What lies in a folder of its own below the watched one is not looked at and does no harm.
    """
    if own_folder(template) != folder:
        return False
    rest = template[template.partition("{")[0].rfind("/") + 1 :]
    return recursive or "/" not in rest.strip("/")


def is_due(schedule: str, last: float, now: float) -> bool:
    """Whether a time of a cron expression (local time) lies after ``last`` and not after ``now``."""
    return next_time(schedule, last) <= now


def next_time(schedule: str, after: float) -> float:
    """The first moment of a cron expression after a moment; local time.

    On days on which clocks are changed as cron does it (crontab(5) of Debian): a time in the hour that there is not
    comes as soon as that would be over, one in the hour that comes twice comes once; tables for every hour or minute
    go on as if nothing were.
    """
    from cronsim import CronSim

    start = datetime.fromtimestamp(after, _LocalTime())
    # In the hour that comes again, its times have been.
    return next(moment for found in CronSim(schedule, start) if (moment := found.timestamp()) > after)


class _LocalTime(tzinfo):
    """The time of this machine, with all changes of its clocks."""

    def utcoffset(self, moment: datetime | None) -> timedelta | None:
        return None if moment is None else moment.replace(tzinfo=None).astimezone().utcoffset()

    def dst(self, moment: datetime | None) -> timedelta | None:
        return None

    def tzname(self, moment: datetime | None) -> str | None:
        return None if moment is None else moment.replace(tzinfo=None).astimezone().tzname()

    def fromutc(self, moment: datetime) -> datetime:
        return datetime.fromtimestamp(moment.replace(tzinfo=UTC).timestamp()).replace(tzinfo=self)


# --- kinds of values for the configuration ---------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """A destination path with fields in braces."""

    def read(self, node: yaml.Node, base: Any) -> str:
        """The template."""
        text = Text().read(node, base)
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
            text.format(**dict.fromkeys(FIELDS, "x"))
        except (ValueError, KeyError, IndexError, AttributeError) as error:
            known = ", ".join(f"{{{name}}}" for name in FIELDS)
            raise Wrong(f"has a field that cannot be filled ({error}); known are {known}") from None
        if not text.startswith("/") or ".." in text.split("/"):
            raise Wrong("must be a path inside the collection that begins with / and has no ..")
        if not {"name", "stem", "path"} & set(fields):
            raise Wrong("must contain {name}, {stem} or {path}, or all files would get the same name")
        return text

    def schema(self) -> Schema:
        """A string that begins with a slash."""
        return {**Text().schema(), "allOf": [{"pattern": "^/"}]}


@dataclass(frozen=True)
class Cron:
    """A cron expression: minute, hour, day of month, month, day of week."""

    def read(self, node: yaml.Node, base: Any) -> str:
        """The expression."""
        from cronsim import CronSim, CronSimError

        text = Text(200).read(node, base)
        try:
            next(CronSim(text, datetime(2026, 1, 1)))
        except (CronSimError, StopIteration):
            raise Wrong(f"must be a cron expression such as '30 2 * * *', not {text[:64]!r}") from None
        return text

    def schema(self) -> Schema:
        """A string."""
        return Text(200).schema()
