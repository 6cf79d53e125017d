"""The people of a relay."""

from __future__ import annotations

from typing import IO

import click

from relay.cli.audited import AuditedGroup
from relay.cli.frame import as_document, of_one_user, settings_of, show, show_rows, with_store

_OF_LINK = "With this link its user chooses a password. It works once and for a week."


@click.group(cls=AuditedGroup)
def user() -> None:
    """People of this relay."""


@user.command("add")
@click.argument("name")
@click.option("--full-name", help="The name to show to others.")
@click.option("--email")
@click.option("--password-file", type=click.File(), help="Read a password from a file, or - for standard input.")
@click.option("--no-link", is_flag=True, help="Make no link for choosing a password.")
@as_document
@click.pass_context
def user_add(
    context: click.Context,
    name: str,
    full_name: str | None,
    email: str | None,
    password_file: IO[str] | None,
    no_link: bool,
    as_json: bool,
) -> None:
    """Add a user, and print a one-time link with which they choose their password.

    NAME without an @ belongs to the relay's own domain; others sign in at their provider and need no link.
    """
    from relay import accounts

    settings = settings_of(context)
    password = None if password_file is None else password_file.read(1000).rstrip("\r\n")
    identity = with_store(settings, accounts.adding_user(settings, name, full_name, email))
    document = {"id": identity.id, "username": identity.username, "name": identity.name, "email": identity.email}
    if password is not None:
        with_store(settings, accounts.setting_password(settings, identity.id, password))
    elif not no_link and identity.username.endswith("@" + settings.user_domain):
        document["link"] = with_store(settings, accounts.inviting(settings, identity.id))
    show(document, as_json)
    if "link" in document and not as_json:
        click.echo(_OF_LINK, err=True)


@user.command("link")
@click.argument("name")
@as_document
@click.pass_context
def user_link(context: click.Context, name: str, as_json: bool) -> None:
    """Print a one-time link with which a user chooses a new password. It works for a week."""
    from relay import accounts

    settings = settings_of(context)
    link = with_store(settings, accounts.inviting(settings, name))
    if as_json:
        show({"link": link}, as_json)
    else:
        click.echo(link)
        click.echo(_OF_LINK, err=True)


@user.command("password")
@click.argument("name")
@click.option(
    "--password-file", type=click.File(), help="Read it from a file, or - for standard input; else asked for."
)
@click.pass_context
def user_password(context: click.Context, name: str, password_file: IO[str] | None) -> None:
    """Give a user a password. It is never taken from the command line, where others could see it."""
    from relay import accounts

    settings = settings_of(context)
    if password_file is not None:
        password = password_file.read(1000).rstrip("\r\n")
    else:
        password = str(click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
    with_store(settings, accounts.setting_password(settings, name, password))
    click.echo("The password is set; browsers that were signed in have to sign in again.")


@user.command("close")
@click.argument("name")
@as_document
@click.pass_context
def user_close(context: click.Context, name: str, as_json: bool) -> None:
    """Close an account: it cannot sign in any more, its tokens end and its tasks pause. Nothing is deleted.

    What it was granted counts no more for identities that are linked to it; within a minute, for their tasks neither.
    """
    from relay import accounts

    settings = settings_of(context)
    identity = with_store(settings, accounts.closing(settings, name))
    programs = with_store(settings, accounts.programs_of(identity.id))
    if as_json:
        rows = [{"id": program.id, "name": program.name} for program in programs]
        show({"id": identity.id, "username": identity.username, "open": False, "programs": rows}, as_json)
        return
    click.echo(f"{identity.username} is closed. Tasks that run pause within a minute; `user open` lets them go on.")
    if programs:
        click.echo("Programs that were added for it are identities of their own and go on; close each by its id:")
    for program in programs:
        click.echo(f"  {program.id}  {program.name}")


@user.command("sign-out")
@click.argument("name")
@click.pass_context
def user_sign_out(context: click.Context, name: str) -> None:
    """End everything a user is signed in with: browsers, commands, applications, tokens of long life.

    For a lost machine. The password still works, and so do passkeys: have the user choose a new password (`user link`)
    and remove a passkey that was kept there on the account page. Tasks go on.
    """
    from relay import accounts

    settings = settings_of(context)
    identity = with_store(settings, accounts.signing_out(settings, name))
    click.echo(f"{identity.username} is signed out everywhere.")


@user.command("open")
@click.argument("name")
@click.pass_context
def user_open(context: click.Context, name: str) -> None:
    """Open a closed account again: its owner can sign in, and its paused tasks go on."""
    from relay import accounts

    settings = settings_of(context)
    identity = with_store(settings, accounts.opening(settings, name))
    click.echo(f"{identity.username} is open. Tasks that were paused go on within a minute.")


@user.command("administrator")
@click.option("--add", metavar="NAME", help="Let this user administer the relay, too.")
@click.option("--remove", metavar="NAME", help="Let this user administer it no longer.")
@click.pass_context
def user_administrator(context: click.Context, add: str | None, remove: str | None) -> None:
    """Say who administers the relay itself: reads its statistics and metrics.

    Without an option: print a new one-time link for the first administrator, as long as there is none whose account is
    open.
    """
    from relay import accounts

    settings = settings_of(context)
    if add is not None and remove is not None:
        raise click.UsageError("Give one of --add and --remove.")
    if add is not None:
        identity = with_store(settings, accounts.making_administrator(settings, add))
        click.echo(f"{identity.username} administers this relay.")
        return
    if remove is not None:
        identity = with_store(settings, accounts.removing_administrator(settings, remove))
        click.echo(f"{identity.username} does not administer this relay any more.")
        return
    link = with_store(settings, lambda store: accounts.first_administrator_link(settings, store))
    click.echo("This relay has an administrator." if link is None else link)


@user.command("list")
@as_document
@click.pass_context
def user_list(context: click.Context, as_json: bool) -> None:
    """List the users."""
    from relay import accounts

    show_rows(
        with_store(settings_of(context), accounts.list_users), ("id", "username", "status", "role", "name"), as_json
    )


@click.group(cls=AuditedGroup)
def token() -> None:
    """Tokens of long life that people made for machines."""


@token.command("list")
@of_one_user
@as_document
@click.pass_context
def token_list(context: click.Context, name: str | None, as_json: bool) -> None:
    """List the tokens, the one that ends first in front."""
    from relay import accounts

    settings = settings_of(context)
    rows = with_store(settings, accounts.listing_tokens(settings, name))
    show_rows(rows, ("id", "username", "expires", "name"), as_json, times=("expires",))


@token.command("end")
@click.argument("token_id")
@click.pass_context
def token_end(context: click.Context, token_id: str) -> None:
    """End a token at once."""
    from relay import accounts

    if not with_store(settings_of(context), accounts.ending_token(token_id)):
        raise click.ClickException(f"There is no token {token_id}.")
    click.echo("The token is dead.")
