"""What signs in without being a person: clients and applications."""

from __future__ import annotations

import click

from relay.cli.audited import AuditedGroup
from relay.cli.frame import as_document, settings_of, show, show_rows, with_store


@click.group(cls=AuditedGroup)
def client() -> None:
    """Programs that sign in with an id and a secret."""


@client.command("add")
@click.argument("name")
@click.option("--owner", help="The user this client belongs to.")
@as_document
@click.pass_context
def client_add(context: click.Context, name: str, owner: str | None, as_json: bool) -> None:
    """Add a client and print its id and secret, this once."""
    from relay import accounts

    settings = settings_of(context)
    show(with_store(settings, accounts.adding_client(settings, name, owner)), as_json)


@client.command("list")
@as_document
@click.pass_context
def client_list(context: click.Context, as_json: bool) -> None:
    """List the clients and the ids of their secrets."""
    from relay import accounts

    rows = with_store(settings_of(context), accounts.list_clients)
    show_rows(rows, ("client_id", "name", "owner", "secret_ids"), as_json)


@client.command("add-secret")
@click.argument("client_id")
@as_document
@click.pass_context
def client_add_secret(context: click.Context, client_id: str, as_json: bool) -> None:
    """Give a client a further secret and print it, this once."""
    from relay import accounts

    show(with_store(settings_of(context), accounts.adding_secret(client_id)), as_json)


@client.command("remove-secret")
@click.argument("client_id")
@click.argument("secret_id")
@click.pass_context
def client_remove_secret(context: click.Context, client_id: str, secret_id: str) -> None:
    """Take a secret from a client."""
    from relay import accounts

    if not with_store(settings_of(context), accounts.removing_secret(client_id, secret_id)):
        raise click.ClickException(f"Client {client_id} has no secret {secret_id}.")
    click.echo("Removed. Tokens that were given for it stay valid until they end.")


@click.group(cls=AuditedGroup)
def app() -> None:
    """Applications that sign people in: web portals, JupyterHub, programs on people's machines, services."""


@app.command("add")
@click.argument("name")
@click.option("--owner", required=True, help="The user who administers it from now on.")
@click.option(
    "--type",
    "kind",
    type=click.Choice(["web", "native", "service"]),
    default="web",
    show_default=True,
    help="web: keeps a secret; native: runs on people's machines, without one; service: acts for itself.",
)
@click.option("--redirect-uri", multiple=True, help="Where browsers come back to after sign-in. Repeatable.")
@click.option("--project", help="The owner's project it goes to; made when missing, and called NAME by default.")
@as_document
@click.pass_context
def app_add(
    context: click.Context,
    name: str,
    owner: str,
    kind: str,
    redirect_uri: tuple[str, ...],
    project: str | None,
    as_json: bool,
) -> None:
    """Register an application and print its id and secret, this once."""
    from relay.applications import operator

    settings = settings_of(context)
    work = operator.adding_application(settings, name, owner, kind, redirect_uri, project)
    show(with_store(settings, work), as_json)
