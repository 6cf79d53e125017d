"""``towpath share``: folders of collections for other people, by access rules of the relay."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from agent.cli.command import with_relay
from agent.cli.location import Location, LocationType, Place, is_uuid
from agent.cli.output import Column, CommandFailed, Output, fail, field, moment
from agent.cli.relay_client import document_of
from agent.cli.submission import parse_deadline
from protocol.errors import ProtocolError
from protocol.names import below_home, format_path, parse_path_untrusted
from protocol.subcommands import Subcommands

if TYPE_CHECKING:
    from agent.cli.relay_client import Relay

EVERYBODY = "all_authenticated_users"
_WHO = {EVERYBODY: "everybody who is signed in", "anonymous": "everybody, also without signing in"}
COLUMNS = (
    Column("Rule ID", lambda row: row.get("id") or "(a role)", whole=True),
    field("Who", "who"),
    Column("May", lambda row: "read and write" if row.get("permissions") == "rw" else "read"),
    field("Folder", "path"),
    moment("Until (UTC)", "expiration_date"),
)


@click.group(cls=Subcommands)
def share() -> None:
    """Share folders with other people, and take that back."""


@share.command()
@click.argument("folder", type=LocationType(path_required=True))
@click.option(
    "--with", "users", multiple=True, metavar="USER", help="Whom: a username or an identity's id. Repeatable."
)
@click.option("--with-everybody", is_flag=True, help="Everybody who is signed in at this relay.")
@click.option("--write", is_flag=True, help="Let them change, add and delete files, too.")
@click.option("--until", metavar="TIME", help="End by itself at this time (UTC) or after this span (+30d).")
@with_relay
def add(
    relay: Relay,
    out: Output,
    folder: Location,
    users: tuple[str, ...],
    with_everybody: bool,
    write: bool,
    until: str | None,
) -> None:
    """Share FOLDER, COLLECTION:PATH from the collection's root, and everything below it.

    The collection must let itself be shared: `towpath collection update NAME --sharing`, on its machine.
    """
    if bool(users) == with_everybody:
        raise click.UsageError("Say with whom: --with USER (repeatable), or --with-everybody.")
    try:
        ends = None if until is None else parse_deadline(until, datetime.now(UTC))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--until") from error
    place = relay.find(folder)
    path = _checked_folder(relay, place)
    # All of them are found before the first gets anything.
    found = [identity_of(relay, user) for user in users]
    kinds = [("identity", identifier) for identifier, _ in found] or [(EVERYBODY, "")]
    rule: dict[str, Any] = {"DATA_TYPE": "access", "path": path, "permissions": "rw" if write else "r"}
    if ends is not None:
        rule["expiration_date"] = ends
    made = [
        _made(relay, place.collection_id, {**rule, "principal_type": kind, "principal": principal})
        for kind, principal in kinds
    ]
    names = ", ".join(name for _, name in found) or _WHO[EVERYBODY]
    may = "read and change" if write else "read"
    where = f"{place.collection_id}:{path}"
    out.result(
        {"DATA_TYPE": "access_list", "DATA": made, "address": where},
        f"{folder.collection}:{path} is shared with {names}, to {may}.",
    )
    if not out.is_json:
        out.remark(f"What to send them: towpath ls {shlex.quote(where)}")


def _made(relay: Relay, collection_id: str, rule: dict[str, Any]) -> dict[str, Any]:
    """Make a rule, or change the one that there is for the same people and folder."""
    from globus_sdk import TransferAPIError

    try:
        return dict(document_of(relay.transfer.add_endpoint_acl_rule(collection_id, rule)))
    except TransferAPIError as error:
        if error.code != "Exists":
            raise
        same = ("principal_type", "principal", "path")
        for row in relay.transfer.endpoint_acl_list(collection_id):
            if row.get("id") and all(row.get(key) == rule[key] for key in same):
                change = {"expiration_date": None, **rule}
                return dict(document_of(relay.transfer.update_endpoint_acl_rule(collection_id, row["id"], change)))
        raise


def _checked_folder(relay: Relay, place: Place) -> str:
    """The path as rules want it. Raises `CommandFailed` where it is no folder, as far as that can be found out."""
    from globus_sdk import TransferAPIError

    path = place.path or "/"
    if below_home(path):
        fail(
            f"Write the folder from the collection's root, with a slash in front: {path!r} counts from somebody's home."
        )
    try:
        # As the relay keeps it, so that a rule for the same folder is found again however it was written.
        folder = format_path(parse_path_untrusted(path), directory=True)
    except ProtocolError as error:
        fail(error.sentence)
    try:
        kind = relay.transfer.operation_stat(place.collection_id, path).get("type")
    except TransferAPIError as error:
        if error.http_status == 404 and error.code == "NotFound":
            fail(f"There is nothing at {path}; nothing is shared.")
        # Its machine may be off, or looking there not for everybody who may share it: the rule counts all the same.
        kind = "dir"
    if kind != "dir":
        fail(f"{path} is a file, and only folders are shared: share the one it is in, or make one for it.")
    return folder


def identity_of(relay: Relay, user: str) -> tuple[str, str]:
    """The id and the username of somebody; without @, a name of one's own domain. Raises `CommandFailed`."""
    asked: dict[str, Any] = {"ids": user} if is_uuid(user) else {"usernames": _whole_name(relay, user)}
    rows = list(relay.auth.get_identities(**asked))
    if len(rows) > 1 or "," in user:
        raise CommandFailed(f"{user} names several people; give each a --with of its own. Nothing is shared.")
    if not rows:
        raise CommandFailed(
            f"Nobody here is called {next(iter(asked.values()))}; they have to be a user of this relay first, "
            "whom its operator adds (`towpath-relay user add`). Nothing is shared."
        )
    return str(rows[0]["id"]), str(rows[0]["username"])


def _whole_name(relay: Relay, user: str) -> str:
    if "@" in user:
        return user
    domain = str(relay.auth.userinfo().get("preferred_username") or "").rpartition("@")[2]
    return f"{user}@{domain}"


@share.command("list")
@click.argument("collection", type=LocationType())
@with_relay
def list_rules(relay: Relay, out: Output, collection: Location) -> None:
    """List with whom folders of a collection are shared."""
    answer = relay.transfer.endpoint_acl_list(relay.find(collection).collection_id)
    rows = [dict(row) for row in answer]
    names = {} if out.is_json else _usernames(relay, rows)
    for row in rows:
        row["who"] = names.get(str(row["principal"])) or _WHO.get(str(row["principal_type"])) or row["principal"]
    out.table(answer.data, rows, COLUMNS)


def _usernames(relay: Relay, rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    ids = sorted({str(row["principal"]) for row in rows if row["principal_type"] == "identity"})
    found: dict[str, str] = {}
    for start in range(0, len(ids), 100):
        found |= {
            str(row["id"]): str(row["username"]) for row in relay.auth.get_identities(ids=ids[start : start + 100])
        }
    return found


@share.command()
@click.argument("collection", type=LocationType())
@click.argument("rule_id", type=click.UUID)
@with_relay
def remove(relay: Relay, out: Output, collection: Location, rule_id: Any) -> None:
    """Take a rule back. What they are transferring from there or to it ends at once."""
    answer = relay.transfer.delete_endpoint_acl_rule(relay.find(collection).collection_id, rule_id)
    out.result(document_of(answer), answer["message"])
