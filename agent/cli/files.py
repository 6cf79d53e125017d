"""Looking at and arranging files on a collection: ``ls``, ``stat``, ``mkdir``, ``rename``."""

from __future__ import annotations

import posixpath
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from agent.cli.command import with_relay
from agent.cli.location import Location, LocationType, Place, parse_location
from agent.cli.output import Column, CommandFailed, Output, fail, field
from agent.cli.relay_client import document_of
from protocol.terminal import ends_shown, typed_path

if TYPE_CHECKING:
    from agent.cli.relay_client import Relay

PAGE = 100_000
_FILTER_CLAUSE = re.compile(r"(name|type|size|last_modified):")
_ORDERED_BY = re.compile(r"(name|type|size|last_modified|permissions|user|group)(:(ASC|DESC))?", re.IGNORECASE)

LONG_COLUMNS = (
    field("Permissions", "permissions"),
    field("User", "user"),
    field("Group", "group"),
    field("Size", "size", right=True),
    field("Last modified", "last_modified"),
    field("Type", "type"),
    Column("Name", lambda entry: shown_name(entry)),
)


def filter_parameter(text: str) -> str:
    """A ``--filter`` value in the service's grammar: ``*.txt``, ``=name``, ``!~*.tmp``, or a clause such as
    ``type:dir`` or ``size:>1000`` as it is."""
    if _FILTER_CLAUSE.match(text):
        return text
    if text.startswith(("=", "~", "!")):
        return f"name:{text}"
    return f"name:~{text}" if any(character in text for character in "*?") else f"name:={text}"


def orderby_parameter(values: Sequence[str]) -> str | None:
    """``--orderby`` values (``size``, ``size:desc``) in the service's grammar. Raises `click.BadParameter`."""
    parts = []
    for value in values:
        if not _ORDERED_BY.fullmatch(value):
            raise click.BadParameter(
                f"{value!r} is not FIELD or FIELD:asc or FIELD:desc with a field of a listing.", param_hint="--orderby"
            )
        name, _, direction = value.partition(":")
        parts.append(f"{name.lower()} {direction.upper()}" if direction else name.lower())
    return ",".join(parts) or None


def shown_name(entry: Mapping[str, Any]) -> str:
    """The name as a listing shows it: directories end in a slash, symlinks tell their target, and what is blank at its
    ends can be seen."""
    name = ends_shown(entry.get("name", ""))
    if entry.get("type") == "dir":
        name += "/"
    target = entry.get("link_target")
    return f"{name} -> {target}" if target else name


def list_directory(relay: Relay, place: Place, query: Mapping[str, Any]) -> dict[str, Any]:
    """One whole directory as the service's document, pages joined."""
    from globus_sdk import MISSING

    document: dict[str, Any] | None = None
    rows: list[Any] = []
    while True:
        page = relay.transfer.operation_ls(
            place.collection_id, MISSING if place.path is None else place.path, limit=PAGE, offset=len(rows), **query
        ).data
        if not isinstance(page, dict):
            fail("The relay answered a listing in a form that cannot be read.")
        document = document or page
        rows += page["DATA"]
        total = page.get("total")
        if not page["DATA"] or total is None or len(rows) >= int(total):
            return {**document, "DATA": rows, "length": len(rows), "limit": max(len(rows), PAGE), "offset": 0}


def walk(relay: Relay, place: Place, query: Mapping[str, Any], depth_limit: int) -> Iterator[dict[str, Any]]:
    """Every entry below a directory, breadth first, names relative to where the walk started.

    Directories reached over symlinks are listed and not entered, so that no loop is followed.
    """
    waiting: deque[tuple[str | None, str, int]] = deque([(place.path, "", 0)])
    while waiting:
        path, prefix, depth = waiting.popleft()
        document = list_directory(relay, Place(place.collection_id, path), query)
        base = str(document["path"])
        for entry in document["DATA"]:
            name = posixpath.join(prefix, str(entry["name"]))
            yield {**entry, "name": name}
            if entry.get("type") == "dir" and not entry.get("link_target") and depth < depth_limit:
                waiting.append((posixpath.join(base, str(entry["name"])) + "/", name, depth + 1))


def _file_itself(relay: Relay, place: Place) -> dict[str, Any]:
    """A listing with one row, for a path that is a file."""
    entry = relay.transfer.operation_stat(place.collection_id, _required(place)).data
    return {"DATA_TYPE": "file_list", "path": place.path, "endpoint": place.collection_id, "DATA": [entry]}


@click.command()
@click.argument("location", type=LocationType())
@click.option("-l", "--long", "long_format", is_flag=True, help="Show permissions, owner, size and time.")
@click.option("-a", "--all", "show_hidden", is_flag=True, help="Show names that begin with a dot.")
@click.option("-r", "--recursive", is_flag=True, help="List what is below, too.")
@click.option("--recursive-depth-limit", type=click.IntRange(min=0), default=3, show_default=True, help="How deep.")
@click.option(
    "--filter",
    "filters",
    multiple=True,
    metavar="PATTERN",
    help="Only matching names (*.txt, =name, ~glob, !name, !~glob) or a clause (type:dir). Repeat for either-or.",
)
@click.option("--orderby", multiple=True, metavar="FIELD[:asc|desc]", help="Order of the rows.")
@with_relay
def ls(
    relay: Relay,
    out: Output,
    location: Location,
    long_format: bool,
    show_hidden: bool,
    recursive: bool,
    recursive_depth_limit: int,
    filters: tuple[str, ...],
    orderby: tuple[str, ...],
) -> None:
    """List a directory of a collection. Without a path: its default directory."""
    from globus_sdk import TransferAPIError

    order = orderby_parameter(orderby)
    place = relay.find(location)
    clauses = [filter_parameter(text) for text in filters]
    if recursive and clauses:
        # The directories are needed to get further down.
        clauses.append("type:dir")
    query: dict[str, Any] = {"show_hidden": show_hidden}
    if clauses:
        query["filter"] = clauses
    if order:
        query["orderby"] = order
    if recursive:
        rows = list(walk(relay, place, query, recursive_depth_limit))
        document: dict[str, Any] = {"DATA_TYPE": "file_list", "endpoint": place.collection_id, "DATA": rows}
    else:
        try:
            document = list_directory(relay, place, query)
        except TransferAPIError as error:
            if error.code == "PermissionDenied" and place.path is None:
                fail(
                    f"You may not look into the folder where {location.collection} begins. If one in it was shared "
                    f"with you, name that: {location.collection}:/FOLDER/."
                )
            if not str(error.code or "").endswith(".NotDirectory") or place.path is None:
                raise
            document = _file_itself(relay, place)
    _show_listing(out, document, long_format)


def _show_listing(out: Output, document: Mapping[str, Any], long_format: bool) -> None:
    if out.is_json:
        out.document(document)
    elif long_format:
        out.table(document, document["DATA"], LONG_COLUMNS)
    else:
        for entry in document["DATA"]:
            out.line(shown_name(entry))


@click.command()
@click.argument("location", type=LocationType(path_required=True))
@with_relay
def stat(relay: Relay, out: Output, location: Location) -> None:
    """Show one file or directory. Exit code 1 when there is nothing at the path."""
    from globus_sdk import TransferAPIError

    place = relay.find(location)
    try:
        entry = relay.transfer.operation_stat(place.collection_id, _required(place))
    except TransferAPIError as error:
        if error.http_status == 404 and error.code == "NotFound":
            fail(f"There is nothing at {location.collection}:{location.path}.")
        raise
    out.record(
        document_of(entry),
        [
            ("Name", entry.get("name")),
            ("Type", entry.get("type")),
            ("Size", entry.get("size")),
            ("Last modified", entry.get("last_modified")),
            ("Permissions", entry.get("permissions")),
            ("User", entry.get("user")),
            ("Group", entry.get("group")),
            *([("Link target", entry.get("link_target"))] if entry.get("link_target") else []),
        ],
    )


@click.command()
@click.argument("location", type=LocationType(path_required=True))
@with_relay
def mkdir(relay: Relay, out: Output, location: Location) -> None:
    """Make a directory; its parent must exist."""
    place = relay.find(location)
    answer = relay.transfer.operation_mkdir(place.collection_id, _required(place))
    out.result(document_of(answer), answer["message"])


@click.command()
@click.argument("location", type=LocationType(path_required=True))
@click.argument("new_path", metavar="NEW_PATH")
@with_relay
def rename(relay: Relay, out: Output, location: Location, new_path: str) -> None:
    """Rename a file or directory within its collection."""
    place = relay.find(location)
    target = _within(relay, place, location.collection, new_path)
    answer = relay.transfer.operation_rename(place.collection_id, oldpath=_required(place), newpath=target)
    out.result(document_of(answer), answer["message"])


def _within(relay: Relay, place: Place, written: str, new_path: str) -> str:
    """The new path in the collection. The collection may be written again before it, as in `towpath rename a:/old
    a:/new`; another one would become part of the name. Raises `click.UsageError` for one."""
    prefix, colon, rest = new_path.partition(":")
    if colon and prefix == written:
        return typed_path(rest)
    if colon and prefix and "/" not in prefix:
        try:
            other = relay.find(parse_location(new_path))
        except CommandFailed:
            # Names may have colons in them.
            return typed_path(new_path)
        if other.collection_id != place.collection_id:
            raise click.UsageError(
                f"{prefix!r} is another collection; rename works within one. Move things with `towpath transfer`, "
                f"or write './{new_path}' for a name with a colon in it."
            )
        return _required(other)
    return typed_path(new_path)


def _required(place: Place) -> str:
    if place.path is None:
        raise click.UsageError("A path is needed; write COLLECTION:PATH.")
    return place.path
