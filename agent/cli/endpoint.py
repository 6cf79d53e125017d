"""``towpath endpoint``: search and describe collections."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import click

from agent.cli.command import with_relay
from agent.cli.location import Location, LocationType
from agent.cli.output import Column, Output, confirm, field
from agent.cli.relay_client import document_of
from protocol.subcommands import Subcommands

if TYPE_CHECKING:
    from agent.cli.relay_client import Relay

SCOPES = (
    "all",
    "my-endpoints",
    "my-gcp-endpoints",
    "recently-used",
    "in-use",
    "shared-by-me",
    "shared-with-me",
    "administered-by-me",
)
COLUMNS = (
    field("ID", "id", whole=True),
    field("Owner", "owner_string"),
    Column("Name", lambda row: row.get("display_name") or row.get("canonical_name") or "-"),
    Column("Connected", lambda row: {True: "yes", False: "no", None: "-"}[row.get("gcp_connected")]),
)
# Option, field of the endpoint document, help.
_TEXTS = (
    ("--display-name", "display_name", "Name."),
    ("--description", "description", "What it is."),
    ("--info-link", "info_link", "A page that tells more."),
    ("--contact-info", "contact_info", "How to reach the people behind it."),
    ("--contact-email", "contact_email", "Address of the people behind it."),
    ("--organization", "organization", "Organization."),
    ("--department", "department", "Department."),
    ("--keywords", "keywords", "Comma list of words for searching."),
    ("--default-directory", "default_directory", "Where to start when no path is given."),
    ("--user-message", "user_message", "A message to its users."),
    ("--user-message-link", "user_message_link", "A link for that message."),
)


@click.group(cls=Subcommands)
def endpoint() -> None:
    """Search and describe collections."""


@endpoint.command()
@click.argument("text", required=False)
@click.option("--filter-scope", type=click.Choice(SCOPES), default="all", show_default=True, help="Among which.")
@click.option("--owner-id", type=click.UUID, help="Only those of this identity.")
@click.option("--limit", type=click.IntRange(min=1, max=1000), default=25, show_default=True, help="At most so many.")
@with_relay
def search(relay: Relay, out: Output, text: str | None, filter_scope: str, owner_id: Any, limit: int) -> None:
    """Search collections by words in name, description, keywords, organization or owner."""
    if not text and filter_scope == "all":
        raise click.UsageError("Give a text to search for, or another --filter-scope than all.")
    query: dict[str, Any] = {"filter_scope": filter_scope}
    if text:
        query["filter_fulltext"] = text
    if owner_id is not None:
        query["filter_owner_id"] = str(owner_id)
    rows = list(itertools.islice(relay.transfer.paginated.endpoint_search(**query).items(), limit))
    out.table({"DATA_TYPE": "endpoint_list", "DATA": rows}, rows, COLUMNS)


@endpoint.command()
@click.argument("collection", type=LocationType())
@with_relay
def show(relay: Relay, out: Output, collection: Location) -> None:
    """Describe a collection."""
    document = document_of(relay.transfer.get_endpoint(relay.find(collection).collection_id))
    names = (
        ("Display name", "display_name"),
        ("ID", "id"),
        ("Owner", "owner_string"),
        ("Kind", "entity_type"),
        ("Connected", "gcp_connected"),
        ("Paused", "gcp_paused"),
        ("Visible to all", "public"),
        ("Shareable", "shareable"),
        ("Default directory", "default_directory"),
        ("Description", "description"),
        ("Organization", "organization"),
        ("Department", "department"),
        ("Keywords", "keywords"),
        ("Contact", "contact_email"),
        ("Contact info", "contact_info"),
        ("Info link", "info_link"),
        ("Message", "user_message"),
    )
    rows: list[tuple[str, object]] = [(name, document.get(key)) for name, key in names]
    rows.append(("Your roles", ", ".join(document.get("my_effective_roles") or []) or None))
    out.record(document, rows)


def _text_options(command: Any) -> Any:
    for option, name, help_text in reversed(_TEXTS):
        command = click.option(option, name, help=help_text)(command)
    return command


@endpoint.command()
@click.argument("collection", type=LocationType())
@_text_options
@click.option("--public/--private", default=None, help="Whether everybody may find it.")
@click.option("--disable-verify/--no-disable-verify", default=None, help="Whether transfers may go unverified.")
@with_relay
def update(relay: Relay, out: Output, /, collection: Location, **options: Any) -> None:
    """Change the description of a collection. An empty text clears a field."""
    changes = {name: value for name, value in options.items() if value is not None}
    if not changes:
        raise click.UsageError("Give at least one thing to change; see --help.")
    document = {name: None if value == "" else value for name, value in changes.items()}
    answer = relay.transfer.update_endpoint(relay.find(collection).collection_id, document)
    out.result(document_of(answer), answer["message"])


@endpoint.command()
@click.argument("collection", type=LocationType())
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@with_relay
def delete(relay: Relay, out: Output, collection: Location, yes: bool) -> None:
    """Remove a collection from the relay. The files behind it stay."""
    identifier = relay.find(collection).collection_id
    if not yes:
        name = relay.transfer.get_endpoint(identifier)["display_name"]
        out.remark(f"This removes the collection {name} ({identifier}) and every access rule on it.")
        confirm("Go on?")
    answer = relay.transfer.delete_endpoint(identifier)
    out.result(document_of(answer), answer["message"])
