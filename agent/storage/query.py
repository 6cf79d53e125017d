"""What to show of a folder: the filter, order and paging grammar of Globus's ``ls``, as pure functions over rows.

Grammar (Globus Transfer API, "Directory Listing Filtering"): clauses joined by ``/``, each ``field:value[,value…]``.
All clauses of one filter must hold; several filters mean "either". Values come back from screens escaped and are
unescaped here, so every name can be asked for, also one with a comma in it (``␛2C``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias, get_args

import msgspec

from agent.storage import rules
from agent.storage.node import Node
from protocol.control import MAX_ENTRIES, MAX_FILTER, MAX_FILTERS, EntryType
from protocol.errors import ProtocolError
from protocol.names import escape, unescape

# In all filters together: every name in the folder is compared with each.
MAX_GLOBS = 100

ORDER_FIELDS = ("name", "type", "size", "last_modified", "permissions", "user", "group")

_TYPES = frozenset(get_args(EntryType))
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Row(msgspec.Struct, frozen=True, gc=False):
    """One entry as listings see it: ``node`` is what a symlink leads to (the link itself if that is nowhere), ``link``
    the symlink, if it is one."""

    name: bytes
    type: EntryType
    node: Node
    link: Node | None = None
    link_target: bytes = b""


Test: TypeAlias = Callable[[Row], bool]


@dataclass(frozen=True, slots=True)
class Query:
    """What a listing is to contain. ``alternatives`` are the parsed filters; none means everything."""

    alternatives: tuple[tuple[Test, ...], ...] = ()
    order: tuple[tuple[str, bool], ...] = (("name", False),)
    limit: int = MAX_ENTRIES
    offset: int = 0
    show_hidden: bool = True

    def accepts(self, row: Row) -> bool:
        """Whether a row belongs to the listing."""
        if not self.alternatives:
            return True
        return any(all(test(row) for test in tests) for tests in self.alternatives)


def parse_query_untrusted(
    *,
    filters: Sequence[str] = (),
    orderby: str = "",
    limit: int = MAX_ENTRIES,
    offset: int = 0,
    show_hidden: bool = True,
) -> Query:
    """The query of a request. Raises `ProtocolError` (code BAD_REQUEST) with a sentence for whoever wrote it."""
    if len(filters) > MAX_FILTERS:
        raise _bad(f"A listing takes {MAX_FILTERS} filters at most; there are {len(filters)}.")
    if not 1 <= limit <= MAX_ENTRIES:
        raise _bad(f"The limit of a listing is between 1 and {MAX_ENTRIES}, not {limit}.")
    if offset < 0:
        raise _bad(f"The offset of a listing cannot be negative, as {offset} is.")
    globs = sum(value.lstrip("!").startswith("~") for text in filters for value in re.split("[,:]", text))
    if globs > MAX_GLOBS:
        raise _bad(f"A listing takes {MAX_GLOBS} patterns with ~ at most; there are {globs}.")
    alternatives = tuple(parse_filter_untrusted(text) for text in filters if text)
    return Query(alternatives, parse_orderby_untrusted(orderby), limit, offset, show_hidden)


def parse_filter_untrusted(text: str) -> tuple[Test, ...]:
    """The tests of one filter. Raises `ProtocolError`."""
    if len(text) > MAX_FILTER:
        raise _bad(f"A filter has {MAX_FILTER} characters at most; this one has {len(text)}.")
    return tuple(_clause(clause) for clause in text.split("/") if clause)


def parse_orderby_untrusted(text: str) -> tuple[tuple[str, bool], ...]:
    """Fields and whether each descends, from ``field [ASC|DESC],…``. Names settle what is equal otherwise."""
    if len(text) > MAX_FILTER:
        raise _bad("The order of the listing is too long.")
    order: list[tuple[str, bool]] = []
    for part in text.split(","):
        words = part.split()
        if not words:
            continue
        direction = words[1].upper() if len(words) > 1 else "ASC"
        if words[0] not in ORDER_FIELDS or direction not in ("ASC", "DESC") or len(words) > 2:
            raise _bad(
                f"A listing cannot be ordered by “{_shown(part)}”. "
                f"Use {', '.join(ORDER_FIELDS)}, each with ASC or DESC."
            )
        order.append((words[0], direction == "DESC"))
    if all(field != "name" for field, _ in order):
        order.append(("name", False))
    return tuple(order)


def select(
    rows: Iterable[Row], query: Query, user: Callable[[int], str] = str, group: Callable[[int], str] = str
) -> tuple[list[Row], int]:
    """The rows of the page asked for, in order, and how many there are on all pages together."""
    chosen = [row for row in rows if query.accepts(row)]
    keys: dict[str, Callable[[Row], Any]] = {
        "name": lambda row: row.name,
        "type": lambda row: row.type,
        "size": lambda row: row.node.size,
        "last_modified": lambda row: row.node.mtime_ns,
        "permissions": lambda row: row.node.mode,
        "user": lambda row: user(row.node.uid),
        "group": lambda row: group(row.node.gid),
    }
    # Sorting is stable: the least important field goes first.
    for field, descending in reversed(query.order):
        chosen.sort(key=keys[field], reverse=descending)
    return chosen[query.offset : query.offset + query.limit], len(chosen)


def _clause(text: str) -> Test:
    field, colon, values = text.partition(":")
    parsers: dict[str, Callable[[list[str]], Test]] = {
        "name": _name_test,
        "type": _type_test,
        "size": _size_test,
        "last_modified": _time_test,
    }
    if not colon or field not in parsers:
        raise _bad(
            f"The filter “{_shown(text)}” is not understood. Clauses are {', '.join(parsers)}, each as field:value."
        )
    return parsers[field](values.split(","))


def _name_test(values: list[str]) -> Test:
    wanted, unwanted = (
        _among([value.removeprefix("!") for value in values if value.startswith("!") == negated])
        for negated in (False, True)
    )

    def test(row: Row) -> bool:
        if unwanted is not None and unwanted(row.name):
            return False
        return wanted is None or wanted(row.name)

    return test


def _among(values: list[str]) -> Callable[[bytes], bool] | None:
    """Whether a name is one of these or matches one of these patterns; None for no values."""
    if not values:
        return None
    names = frozenset(unescape(value.removeprefix("=")) for value in values if not value.startswith("~"))
    patterns = [unescape(value[1:]) for value in values if value.startswith("~")]
    return lambda name: name in names or any(rules.matches(pattern, name, ignore_case=True) for pattern in patterns)


def _type_test(values: list[str]) -> Test:
    for value in values:
        if value not in _TYPES:
            raise _bad(f"There is no type “{_shown(value)}”; types are {', '.join(sorted(_TYPES))}.")
    chosen = frozenset(values)
    return lambda row: row.type in chosen


def _size_test(values: list[str]) -> Test:
    """Plain sizes are alternatives; bounds must all hold."""
    equal: set[int] = set()
    least, most = 0, 1 << 63
    for value in values:
        digits = value.lstrip("<>=")
        if not digits.isascii() or not digits.isdigit() or len(digits) > 18:
            raise _bad(f"“{_shown(value)}” is no size. Give bytes, with <, <=, > or >= before them for a bound.")
        number, sign = int(digits), value[: len(value) - len(digits)]
        if sign in ("", "="):
            equal.add(number)
        elif sign in (">", ">="):
            least = max(least, number + (sign == ">"))
        elif sign in ("<", "<="):
            most = min(most, number - (sign == "<"))
        else:
            raise _bad(f"“{_shown(value)}” is no size. Give bytes, with <, <=, > or >= before them for a bound.")
    return lambda row: least <= row.node.size <= most and (not equal or row.node.size in equal)


def _time_test(values: list[str]) -> Test:
    """From and to, both included; either may be missing. A day without a time means its first instant."""
    if len(values) > 2 or not any(values):
        raise _bad("A time filter is last_modified:from,to; one of the two may be empty.")
    first = _time(values[0]) if values[0] else None
    last = _time(values[1]) if len(values) == 2 and values[1] else None

    def test(row: Row) -> bool:
        return (first is None or row.node.mtime_ns >= first) and (last is None or row.node.mtime_ns <= last)

    return test


def _time(text: str) -> int:
    """Nanoseconds since 1970 of an ISO 8601 time; without a zone it is UTC."""
    try:
        time = datetime.fromisoformat(text)
        if time.tzinfo is None:
            time = time.replace(tzinfo=UTC)
        return (time - _EPOCH) // timedelta(microseconds=1) * 1000
    except (ValueError, OverflowError) as error:
        raise _bad(f"“{_shown(text)}” is no time. Write it as 2026-01-31 or 2026-01-31 12:00:00 (UTC).") from error


def _shown(text: str) -> str:
    return escape(text[:100].encode("utf-8", "replace"))


def _bad(sentence: str) -> ProtocolError:
    return ProtocolError(sentence, code="BAD_REQUEST", who="you")
