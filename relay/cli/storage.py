"""Machines and the storage they offer: agents and collections."""

from __future__ import annotations

import click

from protocol.terminal import terminal_safe
from relay.cli.audited import AuditedGroup
from relay.cli.frame import as_document, of_one_user, settings_of, show, show_rows, with_store


@click.group(cls=AuditedGroup)
def collection() -> None:
    """Collections: storage that agents serve."""


@collection.command("list")
@of_one_user
@as_document
@click.pass_context
def collection_list(context: click.Context, name: str | None, as_json: bool) -> None:
    """List the collections and the agents that serve them."""
    from relay import machines

    settings = settings_of(context)
    rows = with_store(settings, machines.listing_collections(settings, name))
    show_rows(rows, ("collection_id", "owner", "node_id", "name"), as_json)


@collection.command("add")
@click.argument("name")
@click.option("--owner", required=True, help="The user it belongs to.")
@click.option("--grant", multiple=True, metavar="IDENTITY:ROLE", help="Give a role, such as administrator. Repeatable.")
@click.option("--public/--private", default=False, show_default=True, help="Whether everybody can find it.")
@as_document
@click.pass_context
def collection_add(
    context: click.Context, name: str, owner: str, grant: tuple[str, ...], public: bool, as_json: bool
) -> None:
    """Make a collection and print the setup key for its agent, this once."""
    from relay import accounts

    settings = settings_of(context)
    show(with_store(settings, accounts.adding_collection(settings, name, owner, grant, public)), as_json)


@collection.command("setup-key")
@click.argument("collection_id")
@as_document
@click.pass_context
def collection_setup_key(context: click.Context, collection_id: str, as_json: bool) -> None:
    """Print a new setup key for a collection that no agent serves.

    For a first key that got lost or ran out, and for another machine in the place of one that was revoked: the
    collection keeps its id, roles and access rules. Keys given before do not work any more.
    """
    from relay import machines

    settings = settings_of(context)
    show(with_store(settings, machines.replacing(settings, collection_id)), as_json)


@click.group(cls=AuditedGroup)
def agent() -> None:
    """Agents: the machines that have enrolled at this relay."""


@agent.command("list")
@of_one_user
@as_document
@click.pass_context
def agent_list(context: click.Context, name: str | None, as_json: bool) -> None:
    """List the agents, the one that was linked last in front."""
    from relay import machines

    settings = settings_of(context)
    rows = with_store(settings, machines.listing_agents(settings, name))
    show_rows(rows, ("node_id", "owner", "state", "last_linked", "version", "hostname", "collections"), as_json)


@agent.command("revoke")
@click.argument("agent_id", metavar="AGENT")
@as_document
@click.pass_context
def agent_revoke(context: click.Context, agent_id: str, as_json: bool) -> None:
    """Have nothing more to do with an agent, whose machine was lost or stolen. For good.

    AGENT is its id (`agent list`), its endpoint's or that of one of its collections. Its links are refused from now on.
    Within a minute the running relay ends its link and all tasks on its collections, and sessions at other agents that
    it reads from. Its collections keep ids, roles and rules, and wait for another machine (`collection setup-key`).
    Credentials that its user kept on it are not the agent's: end them with `user sign-out`.
    """
    from relay import machines

    revoked = with_store(settings_of(context), machines.revoking(agent_id))
    if as_json:
        waiting = [{"collection_id": collection_id, "name": name} for collection_id, name in revoked.collections]
        show({"node_id": revoked.node_id, "hostname": revoked.hostname, "collections": waiting}, as_json)
        return
    click.echo(f"Agent {revoked.node_id} on {terminal_safe(revoked.hostname)} is revoked.")
    for collection_id, name in revoked.collections:
        click.echo(f"  collection {collection_id}  {terminal_safe(name)}")
    click.echo("If its user had signed in on that machine: towpath-relay user sign-out NAME")
