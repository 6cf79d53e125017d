"""Where the paths of clients lead, and which part of a collection a task needs: the prefixes that its tickets name.

Clients write ``~/x`` and ``x`` for what lies below the collection's home. The owner's agent says where that is, and the
relay resolves it once: from there on, in tasks, tickets and calls on the link, a path starts at the collection's root.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from protocol.errors import ProtocolError
from protocol.names import CollectionPath, below_home, format_path, is_within, parse_path_untrusted
from protocol.ticket import MAX_PATHS
from relay.refusal import ApiError
from relay.transfer.fields import bad_request

# Prefixes of one side together, and folders that symlinks may lead to, in bytes of a ticket: two of each, a third more
# in the ticket's alphabet, stay under its limit (`protocol.ticket.MAX_TOKEN`).
MAX_SCOPE_TEXT = 60_000
MAX_REACH_TEXT = 24_000
GLOB_CHARACTERS = frozenset(b"*?[")


def place(text: str, key: str, home: CollectionPath | None) -> CollectionPath:
    """A path from a client. ``home`` is None while no agent has said where it is.

    Raises `ApiError`: 400 that names the field ``key``, 409 when the path begins at an unknown home.
    """
    try:
        path = parse_path_untrusted(text, home or ())
    except ProtocolError as error:
        raise ApiError(400, "ClientError.BadRequest", f"{key}: {error.sentence}") from error
    if home is None and below_home(text):
        raise ApiError(
            409,
            "Conflict",
            f"{key}: no agent serves this collection yet, so nobody knows where its home (~) is. Set the agent up "
            "first, or write the path from the root of the collection, beginning with '/'.",
        )
    return path


def canonical(path: CollectionPath, text: str) -> str:
    """``path`` from the root of the collection, as a directory if the client wrote ``text`` as one."""
    return format_path(path, directory=text.endswith("/"))


def overlapping(source: CollectionPath, destination: CollectionPath) -> bool:
    """Whether, in one collection, the destination is the source itself or lies inside it."""
    return is_within(destination, source)


def glob_base(target: CollectionPath) -> CollectionPath:
    """The directory in which the glob of a delete item works; globs are allowed in the last component only."""
    if any(GLOB_CHARACTERS & frozenset(part) for part in target[:-1]):
        raise bad_request("path: only the last component of a path may contain *, ? or [ ].")
    return target[:-1] if target and GLOB_CHARACTERS & frozenset(target[-1]) else target


def prefixes(places: Iterable[CollectionPath]) -> list[str]:
    """The shortest list of prefixes that covers all places; when it is too long, of their parents instead."""
    paths = _outermost(set(places))
    depth = max(map(len, paths), default=0)
    while True:
        found = [format_path(path) for path in sorted(paths)]
        if len(found) <= MAX_PATHS and sum(map(_size_in_ticket, found)) <= MAX_SCOPE_TEXT:
            return found
        depth -= 1
        paths = _outermost({path[:depth] for path in paths})


def reach_text(folders: Iterable[CollectionPath] | None) -> list[str] | None:
    """Folders in which symlinks may end, as they travel; None is anywhere. What takes too much is not reached."""
    if folders is None:
        return None
    found: list[str] = []
    left = MAX_REACH_TEXT
    for folder in sorted(_outermost(set(folders))):
        text = format_path(folder)
        left -= _size_in_ticket(text)
        if left < 0 or len(found) == MAX_PATHS:
            break
        found.append(text)
    return found


def _size_in_ticket(text: str) -> int:
    """Tickets are ASCII: letters of other alphabets take six bytes or twelve."""
    return len(json.dumps(text)) + 1


def _outermost(paths: set[CollectionPath]) -> set[CollectionPath]:
    """Without those that lie inside another one of the set."""
    return {path for path in paths if not any(path[:length] in paths for length in range(len(path)))}
