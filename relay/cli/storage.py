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
    from relay import accounts, machines

    settings = settings_of(context)
    made = with_store(settings, accounts.adding_collection(settings, name, owner, grant, public))
    show(made, as_json)
    if as_json:
        return
    others = with_store(settings, machines.namesakes(made))
    if others:
        click.echo(
            f"The same user has {', '.join(others)} of this name, so commands ask for the id. If that is the one you "
            f"meant: towpath-relay collection remove {made['collection_id']}",
            err=True,
        )
    click.echo("On its machine: TOWPATH_SETUP_KEY=THE_SETUP_KEY towpath setup --root FOLDER", err=True)


@collection.command("grant")
@click.argument("collection_name", metavar="COLLECTION")
@click.argument("grant", metavar="IDENTITY:ROLE")
@as_document
@click.pass_context
def collection_grant(context: click.Context, collection_name: str, grant: str, as_json: bool) -> None:
    """Give a user or a program a role on a collection that is there.

    COLLECTION is its id, or a name that only one has. An administrator reads, writes and manages it; the other roles
    are access_manager, activity_manager and activity_monitor. Its owner can do the same, and take it back: `globus
    endpoint role`.
    """
    from relay import accounts, machines

    settings = settings_of(context)
    who, role = accounts.identity_and_role(grant)
    given = with_store(settings, machines.granting(collection_name, who, role, settings))
    if as_json:
        show(given, as_json)
    else:
        click.echo(f"{given['username']} has the role {role} on {terminal_safe(given['name'])}.")


@collection.command("remove")
@click.argument("collection_name", metavar="COLLECTION")
@as_document
@click.pass_context
def collection_remove(context: click.Context, collection_name: str, as_json: bool) -> None:
    """Remove a collection that no agent serves, made by mistake or left by a machine that was revoked.

    COLLECTION is its id, or a name that only one has. Its setup key dies, its roles and rules count no more, and what
    waits for it ends. One that an agent serves is its owner's to remove: `towpath endpoint delete`.
    """
    from relay import machines

    removed = with_store(settings_of(context), machines.removing(collection_name))
    if as_json:
        show(removed, as_json)
    else:
        click.echo(f"The collection {terminal_safe(removed['name'])} ({removed['collection_id']}) is removed.")


@collection.command("setup-key")
@click.argument("collection_name", metavar="COLLECTION")
@as_document
@click.pass_context
def collection_setup_key(context: click.Context, collection_name: str, as_json: bool) -> None:
    """Print a new setup key for a collection that no agent serves.

    COLLECTION is its id, or a name that only one has. For a first key that got lost or ran out, and for another machine
    in the place of one that was revoked: the collection keeps its id, roles and access rules. Keys given before do not
    work any more.
    """
    from relay import machines

    settings = settings_of(context)
    show(with_store(settings, machines.replacing(settings, collection_name)), as_json)


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
    columns = ("node_id", "owner", "state", "last_linked", "version", "hostname", "collections")
    show_rows(rows, columns, as_json, times=("last_linked",))


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
