"""Which relay to speak to, and as whom: the stored profile and the environment.

Credentials belong to the relay they were made for. A relay named by the environment therefore never receives the
secret of a stored profile for another relay; and the variables of Globus's own tools count only together, when
they point at a relay at all.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
import ssl
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from agent.cli.output import fail
from protocol.private_file import write_private_file

_PROFILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_GLOBUS_WORDS_FOR_TRUE = frozenset({"", "1", "true", "t", "yes", "y", "on"})
_GLOBUS_WORDS_FOR_FALSE = frozenset({"0", "false", "f", "no", "n", "off"})


@dataclass(frozen=True)
class Tokens:
    """What a person's sign-in gave for one service; ``expires`` in Unix seconds is the access token's end."""

    access: str
    refresh: str
    expires: float

    def __repr__(self) -> str:
        return f"Tokens(expires={self.expires!r})"


@dataclass(frozen=True)
class Profile:
    """One relay and who one is there. ``ca_file`` None means the usual public authorities.

    A client identity has id and secret; a person has ``tokens`` by service besides, and the client is this
    installation's copy of the application. ``token`` is a token of long life, from the environment, and all there is.
    """

    relay_url: str
    client_id: str
    client_secret: str
    ca_file: str | None = None
    tokens: Mapping[str, Tokens] | None = None
    token: str | None = None

    def __repr__(self) -> str:
        # The secret stays out of tracebacks and logs.
        return f"Profile(relay_url={self.relay_url!r}, client_id={self.client_id!r}, ca_file={self.ca_file!r})"

    @property
    def fingerprint(self) -> str:
        """A short name for this relay and client, for files that belong to both."""
        return hashlib.sha256(f"{self.relay_url}\0{self.client_id}".encode()).hexdigest()[:16]


def checked_relay_url(text: str) -> str:
    """A relay's URL without a final slash. Fails on anything that would send a secret in the clear."""
    parts = urlsplit(text.strip())
    if parts.scheme not in ("https", "http") or not parts.hostname:
        fail(f"{text!r} is not the URL of a relay; it looks like https://relay.example.org or https://host:8443.")
    if parts.path.strip("/") or parts.query or parts.fragment or parts.username or parts.password:
        fail(f"{text!r} has more than a host and a port; a relay's URL is only https://HOST or https://HOST:PORT.")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        fail(f"{text!r} is not encrypted; use https:// (plain http:// is allowed to this machine only).")
    return f"{parts.scheme}://{parts.netloc}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def checked_client_id(text: str) -> str:
    """A client id in lower case; fails when it is not a UUID."""
    try:
        return str(uuid.UUID(text.strip()))
    except ValueError:
        fail(f"The client id {text!r} is not a UUID; `towpath-relay client add` prints the right one.")


# --- choosing --------------------------------------------------------------------------------------------


def choose_profile(environment: Mapping[str, str], stored: Profile | None) -> Profile:
    """The profile to use. TOWPATH_* variables win over the Globus ones, those over the stored profile.

    Raises `CommandFailed` with what to set or do when something is missing.
    """
    base = _from_globus_variables(environment) or stored
    url = environment.get("TOWPATH_RELAY_URL")
    if environment.get("TOWPATH_TOKEN"):
        return _from_token(environment, stored)
    client_id = environment.get("TOWPATH_CLIENT_ID")
    client_secret = environment.get("TOWPATH_CLIENT_SECRET")
    ca_file = environment.get("TOWPATH_CA_FILE")
    if url:
        url = checked_relay_url(url)
        if base is None or base.relay_url != url:
            if not (client_id and client_secret):
                fail(
                    f"TOWPATH_RELAY_URL names {url}, for which no credentials are stored; set TOWPATH_CLIENT_ID and "
                    f"TOWPATH_CLIENT_SECRET too, or run `towpath login --relay {url}`."
                )
            base = Profile(url, checked_client_id(client_id), client_secret)
    if base is None:
        fail("Nobody is signed in; run `towpath login` first (with --relay URL where no agent has been set up).")
    if client_id and checked_client_id(client_id) != base.client_id:
        if not client_secret:
            fail("TOWPATH_CLIENT_ID is set without TOWPATH_CLIENT_SECRET; set both or neither.")
        base = replace(base, client_id=checked_client_id(client_id), tokens=None)
    if client_secret:
        base = replace(base, client_secret=client_secret, tokens=None)
    if ca_file:
        base = replace(base, ca_file=str(Path(ca_file).absolute()))
    return base


def _from_token(environment: Mapping[str, str], stored: Profile | None) -> Profile:
    """The relay that a token of long life is for must be named with it, or be the stored one."""
    url = environment.get("TOWPATH_RELAY_URL") or (None if stored is None else stored.relay_url)
    if url is None:
        fail("TOWPATH_TOKEN is set without TOWPATH_RELAY_URL; set both.")
    ca_file = environment.get("TOWPATH_CA_FILE")
    if ca_file is None and stored is not None and stored.relay_url == checked_relay_url(url):
        ca_file = stored.ca_file
    ca_file = None if ca_file is None else str(Path(ca_file).absolute())
    return Profile(checked_relay_url(url), "", "", ca_file, token=environment["TOWPATH_TOKEN"].strip())


def _from_globus_variables(environment: Mapping[str, str]) -> Profile | None:
    """The relay and client that the variables of globus-cli and globus-sdk name, when they name a whole set."""
    url = environment.get("GLOBUS_SDK_SERVICE_URL_TRANSFER")
    client_id = environment.get("GLOBUS_CLI_CLIENT_ID")
    client_secret = environment.get("GLOBUS_CLI_CLIENT_SECRET")
    if not (url and client_id and client_secret):
        return None
    relay_url = checked_relay_url(url)
    auth = environment.get("GLOBUS_SDK_SERVICE_URL_AUTH")
    if auth and checked_relay_url(auth) != relay_url:
        fail("GLOBUS_SDK_SERVICE_URL_AUTH and GLOBUS_SDK_SERVICE_URL_TRANSFER name different relays; make them equal.")
    verify = environment.get("GLOBUS_SDK_VERIFY_SSL", "")
    ca_file = None
    if verify.lower() in _GLOBUS_WORDS_FOR_FALSE:
        fail("GLOBUS_SDK_VERIFY_SSL switches the check of the relay's certificate off; name the CA file in it instead.")
    if verify.lower() not in _GLOBUS_WORDS_FOR_TRUE:
        ca_file = str(Path(verify).absolute())
    return Profile(relay_url, checked_client_id(client_id), client_secret, ca_file)


def check_ca_file(path: str) -> None:
    """Fail when a file cannot serve as certificate authority, before any connection is tried with it."""
    try:
        ssl.create_default_context(cafile=path)
    except FileNotFoundError:
        fail(f"There is no CA certificate at {path}; ask the relay's operator for the file, or correct its path.")
    except OSError as error:
        # An SSLError is an OSError, too.
        reason = getattr(error, "reason", None) or error.strerror or "not a certificate"
        fail(
            f"{path} cannot be read as a CA certificate in PEM form ({reason}); ask the relay's operator for the file."
        )


# --- storing ---------------------------------------------------------------------------------------------


def profile_name(environment: Mapping[str, str]) -> str:
    """The name of the stored profile: TOWPATH_PROFILE, or ``default``."""
    name = environment.get("TOWPATH_PROFILE") or "default"
    if not _PROFILE_NAME.fullmatch(name):
        fail(f"TOWPATH_PROFILE is {name!r}; a profile's name is letters, digits, '.', '_' and '-' only.")
    return name


def profile_path(environment: Mapping[str, str]) -> Path:
    """Where the profile is stored."""
    root = environment.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(root) / "towpath" / "profiles" / f"{profile_name(environment)}.json"


def token_path(environment: Mapping[str, str], profile: Profile) -> Path:
    """Where the access tokens of a profile are kept between commands."""
    root = environment.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "towpath" / "tokens" / f"{profile.fingerprint}.sqlite"


def load_profile(path: Path) -> Profile | None:
    """The stored profile, or None when there is none. Raises `CommandFailed` when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        fail(f"The stored profile {path} cannot be read ({error}); run `towpath login` again.")
    try:
        document = json.loads(text)
        ca_file = document.get("ca_file")
        return Profile(
            str(document["relay_url"]),
            str(document["client_id"]),
            str(document["client_secret"]),
            None if ca_file is None else str(ca_file),
            None if document.get("tokens") is None else _tokens(document["tokens"]),
        )
    except (ValueError, KeyError, AttributeError, TypeError):
        fail(f"The stored profile {path} is damaged; run `towpath login` again.")


def _tokens(document: Mapping[str, Mapping[str, str | float]]) -> Mapping[str, Tokens]:
    return {
        server: Tokens(str(item["access"]), str(item["refresh"]), float(item["expires"]))
        for server, item in document.items()
    }


def save_profile(path: Path, profile: Profile) -> None:
    """Store a profile for this user alone (mode 0600), all or nothing."""
    document = {
        "relay_url": profile.relay_url,
        "client_id": profile.client_id,
        "client_secret": profile.client_secret,
        "ca_file": profile.ca_file,
        "tokens": None if profile.tokens is None else {name: vars(item) for name, item in profile.tokens.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_private_file(path, f"{json.dumps(document, indent=2)}\n".encode())
