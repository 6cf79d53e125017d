"""Enrolling without a setup key: a person signs in on any device, and the key is made and used at once."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

from agent.cli.account import tell
from agent.cli.failures import explained
from agent.cli.output import CommandFailed
from agent.cli.profile import Profile, check_ca_file, checked_relay_url, load_profile, profile_path, save_profile
from agent.cli.relay_client import Relay, document_of
from agent.cli.sign_in import SignIn


def setup_key_by_sign_in(relay_url: str, ca_file: str | None, name: str | None) -> str:
    """Have whoever is at the terminal sign in, make a collection in their name, and return its setup key.

    Who is signed in to this relay already (`towpath login`) is not asked again. Else the sign-in is for this alone:
    it ends when the key is made, and nothing of it is kept. Raises `CommandFailed`.
    """
    url = checked_relay_url(relay_url)
    authority = None if ca_file is None else str(Path(ca_file).absolute())
    path = profile_path(os.environ)
    stored = load_profile(path)
    if stored is not None and stored.relay_url == url:
        profile = stored if authority is None else replace(stored, ca_file=authority)
        with explained(profile), Relay(profile, save=lambda renewed: save_profile(path, renewed)) as relay:
            return _make(relay, name)
    profile = _sign_in(url, authority)
    with explained(profile), Relay(profile) as relay:
        try:
            return _make(relay, name)
        finally:
            relay.sign_out()


def _sign_in(url: str, ca_file: str | None) -> Profile:
    if ca_file is not None:
        check_ca_file(ca_file)
    signing = SignIn(url, ca_file)
    try:
        copy = signing.make_copy()
        code = signing.begin_device(copy)
        tell(f"To enrol this machine, open {code.page} on any device and type the code {code.user_code}")
        return Profile(url, copy.client_id, copy.secret, ca_file, signing.wait_for_device(copy, code))
    finally:
        signing.close()


def _make(relay: Relay, name: str | None) -> str:
    title = name or socket.gethostname()
    wish = {"DATA_TYPE": "endpoint", "is_globus_connect": True, "display_name": title[:128]}
    document = document_of(relay.transfer.post("/v0.10/endpoint", data=wish))
    key = document.get("globus_connect_setup_key")
    if not isinstance(key, str):
        raise CommandFailed("The relay made a collection without a setup key; is it really a Towpath relay?")
    return key
