"""``towpath bookmark``: names for places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from agent.cli.command import with_relay
from agent.cli.location import Location, LocationType, is_uuid
from agent.cli.output import CommandFailed, Output, field
from agent.cli.relay_client import document_of
from protocol.subcommands import Subcommands

if TYPE_CHECKING:
    from agent.cli.relay_client import Relay

COLUMNS = (
    field("Name", "name"),
    field("Bookmark ID", "id", whole=True),
    field("Collection ID", "endpoint_id"),
    field("Collection", "endpoint_display_name"),
    field("Path", "path"),
)


@click.group(cls=Subcommands)
def bookmark() -> None:
    """Name the places you use."""


def find_bookmark(relay: Relay, name_or_id: str) -> Mapping[str, Any]:
    """The bookmark with an id or a name. Raises `CommandFailed` when there is none."""
    wanted = name_or_id.lower() if is_uuid(name_or_id) else None
    for row in relay.bookmarks():
        if row.get("id") == wanted or row.get("name") == name_or_id:
            return row
    raise CommandFailed(f"You have no bookmark called {name_or_id!r}; `towpath bookmark list` shows those you have.")


def collection_name(relay: Relay, collection_id: str) -> str:
    """A collection's display name, or a remark in brackets when it is gone or hidden."""
    from globus_sdk import TransferAPIError

    try:
        return str(relay.transfer.get_endpoint(collection_id)["display_name"])
    except TransferAPIError as error:
        if error.code == "EndpointDeleted":
            return "[deleted]"
        if error.http_status in (403, 404):
            return "[not visible]"
        raise


@bookmark.command()
@click.argument("location", type=LocationType(path_required=True))
@click.argument("name")
@with_relay
def create(relay: Relay, out: Output, location: Location, name: str) -> None:
    """Call a directory, COLLECTION:PATH, by a name."""
    place = relay.find(location)
    path = place.path or "/"
    document = {"endpoint_id": place.collection_id, "path": path if path.endswith("/") else path + "/", "name": name}
    answer = relay.transfer.create_bookmark(document)
    out.result(document_of(answer), f"Bookmark {name} is {answer['id']}.")


@bookmark.command("list")
@with_relay
def list_bookmarks(relay: Relay, out: Output) -> None:
    """List your bookmarks."""
    rows = [dict(row) for row in relay.bookmarks()]
    names: dict[str, str] = {}
    for row in rows if not out.is_json else []:
        identifier = str(row["endpoint_id"])
        names[identifier] = names.get(identifier) or collection_name(relay, identifier)
        row["endpoint_display_name"] = names[identifier]
    out.table({"DATA_TYPE": "bookmark_list", "DATA": rows}, rows, COLUMNS)


@bookmark.command()
@click.argument("name_or_id")
@with_relay
def show(relay: Relay, out: Output, name_or_id: str) -> None:
    """Show where a bookmark leads, as COLLECTION:PATH."""
    row = find_bookmark(relay, name_or_id)
    out.result(row, f"{row['endpoint_id']}:{row['path']}")


@bookmark.command()
@click.argument("name_or_id")
@click.argument("new_name")
@with_relay
def rename(relay: Relay, out: Output, name_or_id: str, new_name: str) -> None:
    """Give a bookmark another name."""
    row = find_bookmark(relay, name_or_id)
    answer = relay.transfer.update_bookmark(row["id"], {"name": new_name})
    out.result(document_of(answer), f"Bookmark {name_or_id} is now called {new_name}.")


@bookmark.command()
@click.argument("name_or_id")
@with_relay
def delete(relay: Relay, out: Output, name_or_id: str) -> None:
    """Forget a bookmark; the files stay."""
    row = find_bookmark(relay, name_or_id)
    answer = relay.transfer.delete_bookmark(row["id"])
    out.result(document_of(answer), f"Bookmark {name_or_id} is deleted.")
