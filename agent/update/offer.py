"""What a release says of itself, and whether this agent takes it now. No I/O."""

from __future__ import annotations

import hashlib
import platform
import re
import sys
from typing import Annotated

import msgspec
from msgspec import Meta

from protocol.errors import ProtocolError, TowpathError

_VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})\.(\d{1,6})(?:(a|b|rc)(\d{1,6}))?\Z")
_STAGES = {"a": 0, "b": 1, "rc": 2, None: 3}


class UpdateRefused(TowpathError):
    """What a mirror serves must not be installed. ``code`` says why."""

    default_code = "UPDATE_REFUSED"


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """A release for one platform and channel, as signed. ``share`` is the percentage of agents that take it by
    themselves so far; ``released`` is in Unix seconds."""

    version: Annotated[str, Meta(max_length=64)]
    platform: Annotated[str, Meta(max_length=64)]
    channel: Annotated[str, Meta(max_length=32)]
    bundle: Annotated[str, Meta(max_length=255, pattern=r"^[A-Za-z0-9._/-]+$")]
    share: Annotated[int, Meta(ge=0, le=100)] = 100
    released: float = 0.0
    notes: Annotated[str, Meta(max_length=2000)] = ""


def parse_offer_untrusted(data: bytes) -> Offer:
    """An offer from its bytes. Raises only `ProtocolError`."""
    try:
        offer = msgspec.json.decode(data, type=Offer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"The release's description cannot be read: {error}.") from error
    if _VERSION.match(offer.version) is None or ".." in offer.bundle or offer.bundle.startswith("/"):
        raise ProtocolError("The release's description is not one of ours.")
    return offer


def version_key(version: str) -> tuple[int, ...]:
    """Orders versions: 0.2.0rc1 < 0.2.0 < 0.10.0. Anything else is older than everything."""
    match = _VERSION.match(version)
    if match is None:
        return (-1,)
    major, minor, patch, stage, number = match.groups()
    return (int(major), int(minor), int(patch), _STAGES[stage], int(number or 0))


def is_newer(offered: str, running: str) -> bool:
    """Whether a version is newer than the one that runs. Going back is never an update."""
    return version_key(offered) > version_key(running)


def takes_part(node_id: str, offer: Offer) -> bool:
    """Whether this agent belongs to the share that takes a release by itself so far.

    The same agent is early for one release and late for another; a growing share keeps those it had.
    """
    digest = hashlib.sha256(f"{offer.version}:{node_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 10_000 < offer.share * 100


def this_platform() -> str:
    """The platform a bundle has to be for, such as ``linux-x86_64``."""
    names = {"linux": "linux", "darwin": "macos", "win32": "windows"}
    machines = {"amd64": "x86_64", "arm64": "aarch64"}
    machine = platform.machine().lower()
    return f"{names.get(sys.platform, sys.platform)}-{machines.get(machine, machine)}"


def index_name(channel: str, of_platform: str) -> str:
    """The signed file that says which release a channel has for a platform."""
    return f"channels/{channel}/{of_platform}.json"
