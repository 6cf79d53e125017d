"""Who you are to the relay: ``login``, ``logout``, ``whoami``."""

from __future__ import annotations

import os
import sys
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.cli.command import with_output, with_relay
from agent.cli.output import Output, fail
from agent.cli.profile import (
    Profile,
    checked_client_id,
    checked_relay_url,
    load_profile,
    profile_path,
    save_profile,
    token_path,
)

if TYPE_CHECKING:
    from agent.cli.relay_client import Relay

MAX_SECRET = 4096


def read_secret(secret_file: str | None) -> str:
    """The client secret: from the file, from TOWPATH_CLIENT_SECRET, or asked for. Never from the command line."""
    if secret_file is not None:
        try:
            # click opens - as standard input.
            with click.open_file(secret_file, encoding="utf-8") as file:
                secret = str(file.read(MAX_SECRET)).strip()
        except (OSError, UnicodeDecodeError) as error:
            fail(f"The client secret cannot be read from {secret_file}: {error}")
    else:
        secret = os.environ.get("TOWPATH_CLIENT_SECRET", "").strip()
        if not secret and sys.stdin.isatty():
            secret = str(click.prompt("Client secret", hide_input=True, err=True)).strip()
    if not secret:
        fail("A client secret is needed: set TOWPATH_CLIENT_SECRET, or use --secret-file FILE (- for standard input).")
    return secret


@click.command()
@click.option("--relay", "relay_url", envvar="TOWPATH_RELAY_URL", metavar="URL", help="The relay, https://HOST[:PORT].")
@click.option("--ca-file", envvar="TOWPATH_CA_FILE", help="The relay's CA certificate, when it made its own.")
@click.option("--device", is_flag=True, help="Show a code to be typed in on another device.")
@click.option("--no-browser", is_flag=True, help="Show an address, and ask for the code that is shown there.")
@click.option("--client-id", envvar="TOWPATH_CLIENT_ID", metavar="ID", help="Sign in as a client identity instead.")
@click.option("--secret-file", metavar="FILE", help="Read the client secret from a file, or - for standard input.")
@with_output
def login(
    out: Output,
    relay_url: str | None,
    ca_file: str | None,
    device: bool,
    no_browser: bool,
    client_id: str | None,
    secret_file: str | None,
) -> None:
    """Sign in to a relay and remember it.

    Without --relay it is the one that this machine's agent belongs to (`towpath setup`), and its certificate authority
    is known then, too. Opens a browser; over SSH, or where there is none, use --device or --no-browser. With
    --client-id, a program's own identity signs in: its secret comes from --secret-file, from TOWPATH_CLIENT_SECRET or
    from a prompt, never from the command line, where other users of this machine could see it.
    """
    from agent.cli.failures import explained
    from agent.cli.relay_client import Relay

    if device + no_browser + (client_id is not None) > 1:
        raise click.UsageError("Choose one of --device, --no-browser and --client-id.")
    own, own_ca_file = machines_relay()
    if not (relay_url or own):
        raise click.UsageError("Name the relay with --relay URL.")
    url = checked_relay_url(relay_url or own)
    if ca_file is None and url == own:
        ca_file = own_ca_file
    authority = None if ca_file is None else str(Path(ca_file).absolute())
    if client_id is not None:
        profile = Profile(url, checked_client_id(client_id), read_secret(secret_file), authority)
    else:
        profile = _person(url, authority, device=device, no_browser=no_browser)
    with explained(profile), Relay(profile, token_file=token_path(os.environ, profile)) as relay:
        identity = _identity(relay)
    path = profile_path(os.environ)
    save_profile(path, profile)
    out.result(
        {"relay_url": profile.relay_url, "client_id": profile.client_id, "profile": str(path), **identity},
        f"Signed in to {profile.relay_url} as {identity.get('preferred_username')}.",
    )


def machines_relay() -> tuple[str, str | None]:
    """The relay that the agent of this machine belongs to, and its certificate authority; an empty text for none."""
    from agent.config.keys import default_config_file
    from agent.config.layers import load_config
    from protocol.errors import TowpathError

    try:
        relay = load_config(default_config_file()).relay
    except (TowpathError, OSError):
        return "", None
    return (relay.url or "").rstrip("/"), None if relay.ca_file is None else str(relay.ca_file)


def _person(url: str, ca_file: str | None, *, device: bool, no_browser: bool) -> Profile:
    """Have a person sign in. Everything they are told goes to standard error; results alone go to standard output."""
    from agent.cli.profile import check_ca_file
    from agent.cli.sign_in import SignIn

    if ca_file is not None:
        check_ca_file(ca_file)
    signing = SignIn(url, ca_file)
    try:
        copy = signing.make_copy()
        if device:
            code = signing.begin_device(copy)
            tell(f"On any device, open {code.page} and type the code {code.user_code}")
            tokens = signing.wait_for_device(copy, code)
        elif no_browser or browser_is_elsewhere():
            tokens = signing.with_copied_code(copy, _show_address, _ask_code)
        else:
            tokens = signing.with_browser(copy, _open_browser)
    finally:
        signing.close()
    return Profile(url, copy.client_id, copy.secret, ca_file, tokens)


def tell(sentence: str) -> None:
    """Say something to whoever sits at the terminal."""
    click.echo(sentence, err=True)


def browser_is_elsewhere() -> bool:
    """Whether a browser opened here would open on another machine's screen, or there is none (containers)."""
    if os.environ.get("SSH_TTY") or os.environ.get("SSH_CONNECTION"):
        return True
    try:
        webbrowser.get()
    except webbrowser.Error:
        return True
    return False


def _show_address(address: str) -> None:
    tell(f"Open this address in a browser:\n{address}")


def _ask_code() -> str:
    return str(click.prompt("Code", err=True))


def _open_browser(address: str) -> None:
    tell(f"If no browser opens, open this address on this machine (or end this, and use --no-browser):\n{address}")
    webbrowser.open(address)


@click.command()
@with_output
def logout(out: Output) -> None:
    """Revoke the kept access tokens and forget the stored credentials."""
    from agent.cli.failures import explained
    from agent.cli.output import CommandFailed
    from agent.cli.relay_client import Relay

    path = profile_path(os.environ)
    profile = load_profile(path)
    if profile is None:
        out.result({"logged_out": False}, "Nobody was signed in.")
        return
    tokens = token_path(os.environ, profile)
    try:
        with explained(profile), Relay(profile, token_file=tokens) as relay:
            relay.sign_out()
    except CommandFailed as error:
        # What is kept here must go even when the relay cannot be told.
        out.remark(f"The relay could not be told: {error.message}")
    tokens.unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    out.result({"logged_out": True, "relay_url": profile.relay_url}, f"Signed out of {profile.relay_url}.")


@click.command()
@with_relay
def whoami(relay: Relay, out: Output) -> None:
    """Say who is signed in, and where."""
    identity = _identity(relay)
    ends = identity.get("token_expires")
    out.record(
        {"relay_url": relay.profile.relay_url, "client_id": relay.profile.client_id, **identity},
        [
            ("Username", identity.get("preferred_username")),
            ("Name", identity.get("name")),
            ("ID", identity.get("sub")),
            ("Email", identity.get("email")),
            ("Relay", relay.profile.relay_url),
            *([] if ends is None else [("Token ends", ends)]),
        ],
    )
    if identity.get("token_is_ending"):
        out.remark(f"The token “{identity.get('token_name')}” ends on {ends}: make a new one on the account page.")


def _identity(relay: Relay) -> Mapping[str, Any]:
    from agent.cli.relay_client import document_of

    if relay.profile.token is not None:
        return document_of(relay.transfer.get("/towpath/v1/token"))
    return document_of(relay.auth.userinfo())
