"""Who this agent is to its relay: the document that set-up leaves in the state directory, beside the node key."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from protocol.control import Record
from protocol.errors import TowpathError
from protocol.identity import NodeKey
from protocol.private_file import write_private_file

IDENTITY_FILE = "identity.json"
KEY_FILE = "node.key"
CA_FILE = "relay-ca.pem"
MAX_IDENTITY = 4 * 1024 * 1024


class Redeemed(Record, frozen=True, kw_only=True):
    """One setup key that was redeemed here (by its SHA-256) and the collection it stood for."""

    key_sha256: str
    collection_id: str
    display_name: str


class Identity(Record, frozen=True, kw_only=True):
    """What the relay called this agent, and the root key (PEM) pinned for good."""

    endpoint_id: str
    node_id: str
    relay_id: str
    relay_root: str
    relay_url: str
    fingerprint: str
    owner: str = ""
    owner_id: str = ""
    redeemed: list[Redeemed] = []

    def collection_of(self, key_sha256: str) -> Redeemed | None:
        """The collection a setup key was redeemed for, or None."""
        return next((entry for entry in self.redeemed if entry.key_sha256 == key_sha256), None)


class NotSetUp(TowpathError):
    """There is no usable identity in the state directory."""

    default_code = "NOT_SET_UP"


def make_state_dir(state_dir: Path) -> None:
    """Make the state directory, readable by its owner alone. Raises `NotSetUp` with the reason if it cannot be."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if state_dir.stat().st_mode & 0o077:
            state_dir.chmod(0o700)
    except OSError as error:
        raise NotSetUp(f"The state directory {state_dir} cannot be used: {error.strerror}.", who="you") from error


def load_identity(state_dir: Path) -> Identity | None:
    """The identity, or None before set-up. Raises `NotSetUp` when there is one that cannot be read."""
    path = state_dir / IDENTITY_FILE
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(MAX_IDENTITY), type=Identity)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NotSetUp(f"The identity in {path} cannot be read ({error}); restore it from a backup.") from error


def save_identity(state_dir: Path, identity: Identity) -> None:
    """Write the identity, durable and atomic. Raises OSError."""
    text = json.dumps(msgspec.to_builtins(identity), indent=2)
    write_private_file(state_dir / IDENTITY_FILE, text.encode() + b"\n")


def load_key(state_dir: Path) -> NodeKey | None:
    """The node key, or None if there is none. Raises `NotSetUp` for a file that is not one, or that others can read."""
    path = state_dir / KEY_FILE
    try:
        mode = path.stat().st_mode
        key = NodeKey.load(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise NotSetUp(f"The node key {path} cannot be read; restore it from a backup.") from error
    if mode & 0o077:
        raise NotSetUp(
            f"The node key {path} can be read by other users (mode {mode & 0o777:04o}). Run `chmod 600` on it; if "
            "others may have read it, ask for a new setup key and set up anew in an empty state directory.",
            who="you",
        )
    return key


def require(state_dir: Path) -> tuple[Identity, NodeKey]:
    """Identity and key of an agent that was set up. Raises `NotSetUp`."""
    identity, key = load_identity(state_dir), load_key(state_dir)
    if identity is None:
        raise NotSetUp(f"The agent in {state_dir} is not set up yet. Run `towpath setup` with a setup key.", who="you")
    if key is None or key.fingerprint != identity.fingerprint:
        raise NotSetUp(
            f"The node key in {state_dir} is missing or not the one that was enrolled; restore it from a backup.",
            who="you",
        )
    return identity, key
