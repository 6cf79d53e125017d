"""Where a command works: ``COLLECTION:PATH`` arguments and what a collection may be called.

A collection is named by its id, by one of the user's bookmarks, or by its display name when exactly one visible
collection has it. Ids win over bookmarks and bookmarks over names: display names are chosen by others, so they
come last and are refused when two collections share one.
"""

from __future__ import annotations

import posixpath
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import click

from agent.cli.output import CommandFailed
from protocol.terminal import typed_path

if TYPE_CHECKING:
    _StringParam = click.ParamType[Any]
else:
    _StringParam = click.ParamType

# What people write who are used to cp and scp. A drive letter is cut off at its colon.
_PATH_OF_THIS_MACHINE = re.compile(r"[/.~\\]|[A-Za-z]$|[^:]+/")


@dataclass(frozen=True)
class Location:
    """What the user wrote: a collection in any form, and a path or None."""

    collection: str
    path: str | None = None


@dataclass(frozen=True)
class Place:
    """Where that is: a collection id and a path below it (None: the collection's default directory)."""

    collection_id: str
    path: str | None
    display_name: str = ""


def parse_location(text: str) -> Location:
    """Split ``COLLECTION[:PATH]`` at the first colon. Raises ValueError with a sentence for the user."""
    collection, colon, path = text.partition(":")
    if not collection:
        raise ValueError(f"{text!r} names no collection; write COLLECTION:PATH.")
    if any("\ud800" <= character <= "\udfff" for character in collection):
        raise ValueError(f"{text!r} is not text in the encoding of this terminal; name the collection by its id.")
    return Location(collection, typed_path(path) if colon and path else None)


class LocationType(_StringParam):
    """Click type of a ``COLLECTION[:PATH]`` argument."""

    name = "location"

    def __init__(self, *, path_required: bool = False) -> None:
        self.path_required = path_required

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """How the argument is called in help texts."""
        return "COLLECTION:PATH" if self.path_required else "COLLECTION[:PATH]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Location:
        """Parse the argument; a wrong one is a usage error."""
        if isinstance(value, Location):
            return value
        try:
            location = parse_location(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if self.path_required and location.path is None:
            self.fail(f"{value!r} has no path; write COLLECTION:PATH.", param, ctx)
        return location


class Directory(Protocol):
    """What `resolve` must be able to ask a relay."""

    def bookmarks(self) -> Sequence[Mapping[str, Any]]:
        """All bookmarks of the caller."""
        ...

    def collections_named(self, name: str) -> Sequence[Mapping[str, Any]]:
        """Visible collections whose text matches the name."""
        ...


def is_uuid(text: str) -> bool:
    """Whether a text is a UUID in the usual form with dashes."""
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False


def below(base: str, path: str | None) -> str:
    """A path written after a bookmark: absolute and home paths stay as they are, others lie below the bookmark's."""
    if path is None:
        return base
    if path.startswith(("/", "~")):
        return path
    return posixpath.join(base, path)


def resolve(location: Location, directory: Directory) -> Place:
    """Find the collection that a location names. Raises `CommandFailed` when there is none or more than one."""
    if is_uuid(location.collection):
        return Place(location.collection.lower(), location.path)
    for bookmark in directory.bookmarks():
        if bookmark.get("name") == location.collection:
            return Place(str(bookmark["endpoint_id"]), below(str(bookmark.get("path") or "/"), location.path))
    found = [row for row in directory.collections_named(location.collection) if _is_called(row, location.collection)]
    if len(found) == 1:
        return Place(str(found[0]["id"]), location.path, location.collection)
    if not found:
        if _PATH_OF_THIS_MACHINE.match(location.collection):
            raise CommandFailed(
                f"{location.collection} is a path of this machine; write COLLECTION:PATH, such as laptop:/data. "
                "`towpath collection list` says which folders this machine offers, and under which names."
            )
        raise CommandFailed(
            f"No bookmark and no collection you can see is called {location.collection!r}; "
            f"`towpath endpoint search` finds collections, and an id always works."
        )
    listed = "\n".join(f"  {row.get('id')}  owned by {row.get('owner_string') or '?'}" for row in found[:10])
    raise CommandFailed(
        f"{len(found)} collections are called {location.collection!r}; write the id of the one you mean:\n{listed}"
    )


def _is_called(row: Mapping[str, Any], name: str) -> bool:
    return name in (row.get("display_name"), row.get("canonical_name"))
