"""Set-up: redeem a one-time setup key and write down what follows from it.

The order makes every interruption harmless: node key → relay → identity (which remembers the redeemed key) → CA file
→ configuration. Repeating the same command goes on from wherever it stopped, because the relay gives the winner of a
key the same answer again, and a key that was redeemed here is never sent twice.

Trust begins with the setup key alone: it names the relay and the SHA-256 of the authority's certificate. Whatever a
connection that was not verified says is used only after it matched.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import jwt
import msgspec

from agent.config import edit as config_edit
from agent.config import layers as config_layers
from agent.config.keys import AgentConfig, default_state_dir, relay_url_problem
from agent.enrol_http import RelayTrust, fetch_authority, redeem
from agent.identity_file import (
    CA_FILE,
    KEY_FILE,
    Identity,
    NotSetUp,
    Redeemed,
    load_identity,
    load_key,
    make_state_dir,
    save_identity,
)
from agent.system.file_lock import wait_for_lock
from protocol.control import EnrolRequest
from protocol.errors import ProtocolError, TowpathError
from protocol.identity import NodeKey
from protocol.private_file import write_private_file

SETUP_KEY_VARIABLE = "TOWPATH_SETUP_KEY"
PREFIX = "twp-"
MAX_SETUP_KEY = 2048
PROOF_AUDIENCE = "towpath-enrol"
PROOF_LIFE = 600


class SetupFailed(TowpathError):
    """Set-up cannot go on; the sentence says what to do. Nothing of it needs undoing before a repetition."""

    default_code = "SETUP_FAILED"


@dataclass(frozen=True)
class SetupKey:
    """A parsed setup key. ``text`` is secret and in no representation."""

    relay_url: str
    ca_sha256: str | None
    text: str

    def __repr__(self) -> str:
        return f"SetupKey(relay_url={self.relay_url!r}, ca_sha256={self.ca_sha256!r})"

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the key: how it may be named without giving it away."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the owner wants the new collection to be. ``name`` None takes the relay's."""

    root: str
    name: str | None = None
    read_only: bool = False
    shareable: bool = False
    hidden: bool = True
    home: str = "/"
    default_directory: str = "/~/"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """``already`` is set when this key had been redeemed and written down here before."""

    endpoint_id: str
    node_id: str
    collection_id: str
    name: str
    root: str
    relay_url: str
    config_file: Path
    state_dir: Path
    already: bool


def parse_setup_key_untrusted(text: str) -> SetupKey:
    """What a setup key says. Raises only `ProtocolError`, whose text never repeats the key."""
    text = text.strip()
    wrong = ProtocolError("That is not a setup key: it should begin with twp- and be copied whole.", who="you")
    if not text.startswith(PREFIX) or len(text) > MAX_SETUP_KEY or not text.isascii():
        raise wrong
    body = text[len(PREFIX) :]
    try:
        raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        url, ca_sha256, secret = msgspec.json.decode(raw, type=tuple[str, str | None, str])
    except (binascii.Error, ValueError, msgspec.DecodeError):
        raise wrong from None
    if relay_url_problem(url) or not secret:
        raise wrong
    if ca_sha256 is not None and (len(ca_sha256) != 64 or any(c not in "0123456789abcdef" for c in ca_sha256)):
        raise wrong
    return SetupKey(url.rstrip("/"), ca_sha256, text)


def find_setup_key(argument: str | None, file: Path | None) -> SetupKey:
    """The key from the argument, else the file, else the environment. Raises `SetupFailed` or `ProtocolError`."""
    if argument is not None and file is not None:
        raise SetupFailed("Give the setup key either as argument or as file, not both.", who="you")
    if file is not None:
        try:
            with file.open(encoding="utf-8") as stream:
                argument = stream.read(MAX_SETUP_KEY + 2)
        except (OSError, UnicodeDecodeError) as error:
            raise SetupFailed(f"The setup key file {file} cannot be read.", who="you") from error
    text = argument if argument is not None else os.environ.get(SETUP_KEY_VARIABLE, "")
    if not text.strip():
        raise SetupFailed(
            f"No setup key: give it as argument, in the variable {SETUP_KEY_VARIABLE}, or with --setup-key-file. "
            "Or sign in instead, with --relay URL.",
            who="you",
        )
    return parse_setup_key_untrusted(text)


def set_up(
    key: SetupKey,
    wish: Wish,
    config_file: Path,
    state_dir: Path | None = None,
    *,
    clock: Callable[[], float] = time.time,
) -> Outcome:
    """Redeem the key (once) and make sure that everything that follows from it is written. Blocks on the network.

    Raises `SetupFailed`, `NotSetUp`, `ConfigError`, `CannotEdit`; everything may be repeated.
    """
    root = checked_root(wish.root)
    _, config = _read_or_template(config_file, state_dir)
    make_state_dir(config.state_dir)
    with _one_at_a_time(config.state_dir):
        return _set_up(key, wish, root, config_file, state_dir, clock())


@contextlib.contextmanager
def _one_at_a_time(state_dir: Path) -> Iterator[None]:
    """Two set-ups of one agent wait for each other: neither may overwrite what the other has just written."""
    with (state_dir / "setup.lock").open("a") as file:
        # Where the file system has no locks, repeating a set-up mends what a collision lost.
        with contextlib.suppress(OSError):
            wait_for_lock(file.fileno())
        yield


def _set_up(
    key: SetupKey, wish: Wish, root: str, config_file: Path, wanted_state_dir: Path | None, now: float
) -> Outcome:
    text, config = _read_or_template(config_file, wanted_state_dir)
    state_dir = config.state_dir
    identity = load_identity(state_dir)
    known = None if identity is None else identity.collection_of(key.digest)
    redeemed = known is not None
    if known is None:
        identity, known = _enrol(key, config, identity, wish.home, now)
    assert identity is not None
    present = next((c for c in config.collections if c.id == known.collection_id), None)
    name = present.name if present else wish.name or known.display_name or "Collection"
    if present is None or config.relay.url is None:
        _write_config(text, config_file, config, identity, known.collection_id, name, root, wish, add=present is None)
    return Outcome(
        endpoint_id=identity.endpoint_id,
        node_id=identity.node_id,
        collection_id=known.collection_id,
        name=name,
        root=present.root if present else root,
        relay_url=identity.relay_url,
        config_file=config_file,
        state_dir=state_dir,
        already=redeemed and present is not None,
    )


def checked_root(root: str) -> str:
    """The root as an absolute path that can be written into YAML and opened by the agent. Raises `SetupFailed`."""
    path = os.path.abspath(os.path.expanduser(root))
    try:
        path.encode()
    except UnicodeEncodeError:
        raise SetupFailed("The path of the root is not UTF-8 text; give the folder another name or a link.") from None
    if not os.path.isdir(path):
        raise SetupFailed(f"The root {path} is not a directory. Make it first, or name another.", who="you")
    if not os.access(path, os.R_OK | os.X_OK):
        raise SetupFailed(f"This user may not read the root {path}.", who="you")
    return path


def _read_or_template(config_file: Path, state_dir: Path | None) -> tuple[str, AgentConfig]:
    try:
        text = config_file.read_text(encoding="utf-8")
    except FileNotFoundError:
        chosen = state_dir or default_state_dir(config_file)
        text = config_edit.set_value(template(), None, "state_dir", str(chosen.absolute()), config_file)
    except (OSError, UnicodeDecodeError) as error:
        raise SetupFailed(f"The configuration {config_file} cannot be read.", who="you") from error
    config = config_layers.load(config_file, owners=text.encode()).config
    if state_dir is not None and state_dir.absolute() != config.state_dir.absolute():
        raise SetupFailed(
            f"{config_file} keeps its state in {config.state_dir}, not in {state_dir}. Leave --state-dir out, or "
            "give another --config.",
            who="you",
        )
    return text, config


def template() -> str:
    """The documented configuration that new ones are made from. Raises `SetupFailed` when the installation lacks it."""
    package = Path(__file__).parent
    # Installed, the file travels inside the package; in a working copy it stands in conf/.
    for place in (package / "_conf" / "agent.yaml", package.parent / "conf" / "agent.yaml"):
        if place.is_file():
            return place.read_text(encoding="utf-8")
    raise SetupFailed("The installation is incomplete: conf/agent.yaml is missing.")


def _enrol(
    key: SetupKey, config: AgentConfig, identity: Identity | None, home: str, now: float
) -> tuple[Identity, Redeemed]:
    state_dir = config.state_dir
    node_key = load_key(state_dir)
    if identity is not None and (node_key is None or node_key.fingerprint != identity.fingerprint):
        raise NotSetUp(f"The node key in {state_dir} is missing or not the one enrolled; restore it from a backup.")
    if node_key is None:
        node_key = NodeKey.generate()
        node_key.save(state_dir / KEY_FILE)
    trust = _trust(key)
    if identity is not None and trust.relay_id is not None and identity.relay_id != trust.relay_id:
        raise _other_relay(state_dir, identity)
    answer = redeem(key.relay_url, trust, _request(key, node_key, identity, home, now))
    if identity is not None and (answer.relay_id, answer.node_id) != (identity.relay_id, identity.node_id):
        raise _other_relay(state_dir, identity)
    if trust.ca_pem is not None:
        write_private_file(state_dir / CA_FILE, trust.ca_pem.encode())
    redeemed = Redeemed(
        key_sha256=key.digest, collection_id=answer.collection_id, display_name=answer.display_name[:255]
    )
    identity = Identity(
        endpoint_id=answer.endpoint_id,
        node_id=answer.node_id,
        relay_id=answer.relay_id,
        # The root of the first enrolment stays pinned; a later answer cannot change whom this agent obeys.
        relay_root=answer.relay_root if identity is None else identity.relay_root,
        relay_url=key.relay_url,
        fingerprint=node_key.fingerprint,
        owner=answer.owner,
        owner_id=answer.owner_id,
        redeemed=[*(identity.redeemed if identity else []), redeemed],
    )
    save_identity(state_dir, identity)
    return identity, redeemed


def _other_relay(state_dir: Path, identity: Identity) -> SetupFailed:
    return SetupFailed(
        f"The agent in {state_dir} belongs to the relay {identity.relay_url}, the setup key to another one. An agent "
        "has one relay: use another --config for the other relay.",
        who="you",
    )


def _trust(key: SetupKey) -> RelayTrust:
    """How the relay is checked from here on: by the authority in the setup key, or by the system's trust store."""
    if key.ca_sha256 is None:
        return RelayTrust(ssl.create_default_context(), None, None)
    relay_id, pem = fetch_authority(key.relay_url)
    try:
        found = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()
        context = ssl.create_default_context(cadata=pem)
    except (ValueError, ssl.SSLError) as error:
        raise SetupFailed("The relay shows a certificate that cannot be read.") from error
    if not hmac.compare_digest(found, key.ca_sha256):
        raise SetupFailed(
            f"{key.relay_url} is not the relay that made this setup key, or somebody is between you and it: its "
            "certificate authority is another one. Nothing was sent. Ask whoever gave you the key.",
            who="relay operator",
        )
    return RelayTrust(context, pem, relay_id)


def _request(key: SetupKey, node_key: NodeKey, identity: Identity | None, home: str, now: float) -> EnrolRequest:
    claims = {"aud": PROOF_AUDIENCE, "sub": key.digest, "iat": int(now), "exp": int(now) + PROOF_LIFE}
    return EnrolRequest(
        setup_key=key.text,
        proof=jwt.encode(claims, node_key.private_key, algorithm="EdDSA"),
        certificate=node_key.certificate_pem,
        node_id=None if identity is None else identity.node_id,
        hostname=socket.gethostname()[:255],
        version=metadata.version("towpath"),
        home=home,
    )


def _write_config(
    text: str,
    config_file: Path,
    config: AgentConfig,
    identity: Identity,
    collection_id: str,
    name: str,
    root: str,
    wish: Wish,
    *,
    add: bool,
) -> None:
    relay: dict[str, config_edit.Scalar] = {}
    if config.relay.url is None:
        relay["url"] = identity.relay_url
        if (config.state_dir / CA_FILE).exists():
            relay["ca_file"] = str((config.state_dir / CA_FILE).absolute())
    entry: dict[str, config_edit.Scalar] = {}
    if add:
        entry = {
            "id": collection_id,
            "name": "".join(c if c.isprintable() else " " for c in name)[:255],
            "root": root,
            "access": "read-only" if wish.read_only else "read-write",
            "sharing": wish.shareable,
        }
        entry |= {"hidden": "denied"} if not wish.hidden else {}
        entry |= {"home": wish.home} if wish.home != "/" else {}
        entry |= {"default_directory": wish.default_directory} if wish.default_directory != "/~/" else {}
    if config_file.exists():
        # The file is the owner's by now: what the program adds goes beside it.
        with config_layers.editing(config_file) as content:
            if relay:
                content.setdefault("relay", {}).update(relay)
            if entry:
                config_layers.entry_in(content, "collections", collection_id).update(entry)
        return
    for key, value in relay.items():
        text = config_edit.set_value(text, "relay", key, value, config_file)
    if entry:
        text = config_edit.append_collection(text, entry, config_file)
    result = config_edit.checked(text, config_file)
    if collection_id not in {collection.id for collection in result.collections}:
        raise config_edit.CannotEdit(f"{config_file} could not be changed safely; nothing was written.", who="you")
    _write_text(config_file, text)


def _write_text(path: Path, text: str) -> None:
    """Replace a configuration file as a whole; one that is a symlink stays one, and a mode the owner set is kept."""
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o600
        write_private_file(target, text.encode())
        target.chmod(mode)
    except OSError as error:
        raise SetupFailed(f"The configuration {path} cannot be written: {error.strerror}.", who="you") from error


def write_globus_files(collection_id: str, home: Path) -> Path:
    """Tell `globus endpoint local-id` which collection is this machine's. Raises OSError."""
    path = home / ".globusonline" / "lta" / "client-id.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_private_file(path, collection_id.encode() + b"\n")
    return path
