"""Which part of a collection a task needs: the path prefixes that its tickets name.

The relay does not know where a collection's home is, so a path keeps its anchor: ``/`` for the root, ``~`` for home.
A path that climbs above home with ``..`` can be resolved by the agent alone; it stays as it was written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from protocol.errors import ProtocolError
from protocol.names import CollectionPath, escape, format_path, is_within, parse_path_untrusted
from protocol.ticket import MAX_PATHS
from relay.api.errors import ApiError
from relay.transfer.fields import bad_request

# Prefixes of one side together, so that the signed ticket stays well under its own limit.
MAX_SCOPE_TEXT = 60_000
GLOB_CHARACTERS = frozenset(b"*?[")

Anchor = Literal["/", "~", "?"]


@dataclass(frozen=True, slots=True)
class Place:
    """A checked path. With anchor ``?`` only ``text`` says where it is, and the agent resolves it."""

    anchor: Anchor
    path: CollectionPath
    text: str

    def prefix(self) -> str:
        """The canonical text of the path, as tickets name it."""
        if self.anchor == "/":
            return format_path(self.path)
        if self.anchor == "~":
            return "/~/" + "/".join(map(escape, self.path))
        return self.text

    def parent(self) -> Place:
        """The directory that holds it; the root and home are their own parents."""
        return Place(self.anchor, self.path[:-1], self.text)


def place(text: str, key: str) -> Place:
    """A path from a client. Raises `ApiError` 400 that names the field ``key``."""
    try:
        path = parse_path_untrusted(text)
    except ProtocolError as error:
        raise ApiError(400, "ClientError.BadRequest", f"{key}: {error.sentence}") from error
    # The same rule as in `parse_path_untrusted`.
    parts = [part for part in text.split("/") if part]
    tilde = parts[:1] == ["~"]
    if text.startswith("/") and not tilde:
        return Place("/", path, text)
    return Place("?" if _climbs(parts[1:] if tilde else parts) else "~", path, text)


def _climbs(parts: list[str]) -> bool:
    depth = 0
    for part in parts:
        if part == "..":
            depth -= 1
        elif part != ".":
            depth += 1
        if depth < 0:
            return True
    return False


def overlapping(source: Place, destination: Place) -> bool:
    """Whether, in one collection, the destination is the source itself or lies inside it."""
    if "?" in (source.anchor, destination.anchor) or source.anchor != destination.anchor:
        return source.text == destination.text
    return is_within(destination.path, source.path)


def glob_base(target: Place) -> Place:
    """The directory in which the glob of a delete item works; globs are allowed in the last component only."""
    if any(GLOB_CHARACTERS & frozenset(part) for part in target.path[:-1]):
        raise bad_request("path: only the last component of a path may contain *, ? or [ ].")
    return target.parent() if target.path and GLOB_CHARACTERS & frozenset(target.path[-1]) else target


def prefixes(places: Iterable[Place]) -> list[str]:
    """The shortest list of prefixes that covers all places; when it is too long, of their parents instead."""
    all_places = list(places)
    opaque = sorted({item.text for item in all_places if item.anchor == "?"})
    anchored = {anchor: _outermost({i.path for i in all_places if i.anchor == anchor}) for anchor in ("/", "~")}
    depth = max((len(path) for paths in anchored.values() for path in paths), default=0)
    while True:
        found = opaque + [Place("/", path, "").prefix() for path in sorted(anchored["/"])]
        found += [Place("~", path, "").prefix() for path in sorted(anchored["~"])]
        if len(found) <= MAX_PATHS and sum(map(len, found)) <= MAX_SCOPE_TEXT:
            return found
        if depth == 0:
            return ["/"]
        depth -= 1
        anchored = {anchor: _outermost({path[:depth] for path in paths}) for anchor, paths in anchored.items()}


def _outermost(paths: set[CollectionPath]) -> set[CollectionPath]:
    """Without those that lie inside another one of the set."""
    return {path for path in paths if not any(path[:length] in paths for length in range(len(path)))}
