"""The filter and order grammar of ``task_list``, turned into conditions of a query.

``filter`` is clauses joined by ``/``: ``type:TRANSFER,DELETE``, ``status:ACTIVE,…``, ``task_id:a,b``,
``label:~glob,!~glob,=exact`` and ``request_time:from,to``, ``completion_time:from,to`` (either side may be empty).
Values of one clause are alternatives, except negated labels, all of which must hold; clauses must all hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_

from relay import times
from relay.refusal import ApiError
from relay.store import transfer_tables as tables
from relay.transfer.fields import bad_request, is_uuid

MAX_FILTER = 32_768
MAX_VALUES = 1000
# In all. SQLite bounds how deep an expression may be, and takes a row of conditions for one inside the other.
MAX_LABELS = 200
MAX_CLAUSES = 100
STATUSES = frozenset({"ACTIVE", "INACTIVE", "SUCCEEDED", "FAILED"})
TYPES = frozenset({"TRANSFER", "DELETE"})

_ORDER = {
    "task_id": tables.tasks.c.id,
    "type": tables.tasks.c.type,
    "status": tables.tasks.c.status,
    "label": tables.tasks.c.label,
    "request_time": tables.tasks.c.requested,
    "completion_time": tables.tasks.c.completed,
    "deadline": tables.tasks.c.deadline,
}

Condition = ColumnElement[bool]


def conditions(*texts: str) -> list[Condition]:
    """Conditions for all ``filter`` parameters of a request; none for empty ones. Raises `ApiError` 400."""
    if sum(map(len, texts)) > MAX_FILTER:
        raise bad_request(f"filter is longer than {MAX_FILTER} characters.")
    clauses = [clause for text in texts for clause in text.split("/") if clause]
    if len(clauses) > MAX_CLAUSES:
        raise bad_request(f"filter has more than {MAX_CLAUSES} clauses.")
    labels = sum(clause.count(",") + 1 for clause in clauses if clause.startswith("label:"))
    if labels > MAX_LABELS:
        raise bad_request(f"filter: label has more than {MAX_LABELS} values.")
    return [_clause(clause) for clause in clauses]


def _clause(clause: str) -> Condition:
    name, colon, rest = clause.partition(":")
    reader = _CLAUSES.get(name)
    if not colon or reader is None:
        known = ", ".join(sorted(_CLAUSES))
        raise bad_request(f"filter: '{clause[:80]}' is not field:value with one of the fields {known}.")
    values = rest.split(",")
    if len(values) > MAX_VALUES:
        raise bad_request(f"filter: {name} has more than {MAX_VALUES} values.")
    return reader(name, values)


def _words(column: ColumnElement[str], allowed: frozenset[str]) -> Callable[[str, list[str]], Condition]:
    def read(name: str, values: list[str]) -> Condition:
        words = [value.strip().upper() for value in values if value.strip()]
        if not words or not set(words) <= allowed:
            raise bad_request(f"filter: {name} must be one or more of {', '.join(sorted(allowed))}.")
        return column.in_(words)

    return read


def _task_ids(name: str, values: list[str]) -> Condition:
    ids = [value.strip().lower() for value in values if value.strip()]
    if not ids or not all(map(is_uuid, ids)):
        raise bad_request(f"filter: {name} must be one or more UUIDs.")
    return tables.tasks.c.id.in_(ids)


def _labels(_name: str, values: list[str]) -> Condition:
    label = func.coalesce(tables.tasks.c.label, "")
    wanted: list[Condition] = []
    unwanted: list[Condition] = []
    condition: Condition
    for value in values:
        negated = value.startswith("!")
        pattern = value[1:] if negated else value
        if pattern.startswith("~"):
            condition = label.ilike(glob_to_like(pattern[1:]), escape="\\")
        else:
            condition = func.lower(label) == pattern.removeprefix("=").lower()
        (unwanted if negated else wanted).append(~condition if negated else condition)
    return and_(*([or_(*wanted)] if wanted else []), *unwanted)


def _period(column: ColumnElement[float | None]) -> Callable[[str, list[str]], Condition]:
    def read(name: str, values: list[str]) -> Condition:
        if len(values) > 2:
            raise bad_request(f"filter: {name} takes two times, from and to.")
        bounds: list[float | None] = []
        for value in values:
            try:
                bounds.append(times.parse(value) if value.strip() else None)
            except ValueError as error:
                raise bad_request(f"filter: '{value[:64]}' in {name} is not a time.") from error
        start, end = (*bounds, None)[:2]
        held: list[Condition] = [column.is_not(None)]
        if start is not None:
            held.append(column >= start)
        if end is not None:
            # Documents show whole seconds: what happened within the last one named is meant, too.
            held.append(column < end + 1 if end.is_integer() else column <= end)
        return and_(*held)

    return read


_CLAUSES: dict[str, Callable[[str, list[str]], Condition]] = {
    "type": _words(tables.tasks.c.type, TYPES),
    "status": _words(tables.tasks.c.status, STATUSES),
    "task_id": _task_ids,
    "label": _labels,
    "request_time": _period(tables.tasks.c.requested),
    "completion_time": _period(tables.tasks.c.completed),
}


def glob_to_like(pattern: str) -> str:
    """A glob with ``*`` and ``?`` as a LIKE pattern whose escape character is the backslash."""
    escaped = pattern.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return escaped.replace("*", "%").replace("?", "_")


def order(text: str | None) -> list[ColumnElement[Any]]:
    """Order terms for an ``orderby`` parameter; newest request first without one. Raises `ApiError` 400."""
    # By field: the first mention decides, and a further one could change nothing.
    terms: dict[str, ColumnElement[Any]] = {}
    for part in (text or "").split(","):
        words = part.split()
        if not words:
            continue
        column = _ORDER.get(words[0].lower())
        direction = words[1].upper() if len(words) == 2 else "ASC"
        if column is None or len(words) > 2 or direction not in ("ASC", "DESC"):
            known = ", ".join(sorted(_ORDER))
            raise bad_request(f"orderby: '{part.strip()[:64]}' is not a field ({known}), with or without ASC or DESC.")
        terms.setdefault(column.name, column.desc() if direction == "DESC" else column.asc())
    # A last term that never ties, so that pages do not overlap.
    return [*(terms.values() or [tables.tasks.c.requested.desc()]), tables.tasks.c.id]


def event_kind(text: str | None) -> bool | None:
    """The ``filter`` of an event list: ``is_error:1``, ``is_error:0`` or nothing. Raises `ApiError` 400."""
    if not text:
        return None
    if text in ("is_error:1", "is_error:0"):
        return text == "is_error:1"
    raise ApiError(400, "ClientError.BadRequest", "filter of an event list must be is_error:0 or is_error:1.")
