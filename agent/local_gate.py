"""Who may ask the local API at all: no web page, by whatever name it got here, and nobody without the token.

On the private Unix socket the file system and the kernel keep other users out. Where there are none (Windows) the API
listens on a loopback port, which every program of every user and every web page of the browser can reach: there a
token from a file of this user alone is wanted, and the Host header has to be the address itself, because a page
whose name was re-bound to 127.0.0.1 sends its own.
"""

from __future__ import annotations

import hmac
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from protocol.errors import AccessDenied
from protocol.private_file import write_private_file

LOOPBACK_FILE = "local.loopback"
UNIX_HOST = "agent"
LOOPBACK = "127.0.0.1"

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class Loopback(msgspec.Struct, frozen=True):
    """Where the API listens and what has to be shown there; kept in a private file of the state directory."""

    port: int
    token: str

    def __repr__(self) -> str:
        return f"Loopback(port={self.port})"


def refusal(headers: list[tuple[bytes, bytes]], hosts: frozenset[bytes], token: str | None) -> str:
    """Why a request is not answered, as a sentence; empty if it may pass. Header names in lower case."""
    values: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        values.setdefault(name.lower(), []).append(value)
    # No program of the owner's sends these; browsers add them to whatever a page asks for.
    if b"origin" in values or b"sec-fetch-site" in values or b"referer" in values:
        return "Web pages may not control the agent."
    if len(values.get(b"host", ())) != 1 or values[b"host"][0].lower() not in hosts:
        return (
            "The request is addressed to another host; nothing but this machine's own programs may control the agent."
        )
    if token is not None:
        shown = values.get(b"authorization", [b""])
        if len(shown) != 1 or not hmac.compare_digest(shown[0], b"Bearer " + token.encode()):
            return "The token of the local API is missing or wrong."
    return ""


@dataclass(frozen=True)
class Gate:
    """An ASGI application that lets requests through to another one, or answers 403 itself."""

    inner: Application
    hosts: frozenset[bytes]
    token: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request (or the lifespan, which passes)."""
        if scope["type"] not in ("http", "lifespan"):
            return
        sentence = refusal(scope["headers"], self.hosts, self.token) if scope["type"] == "http" else ""
        if not sentence:
            await self.inner(scope, receive, send)
            return
        body = msgspec.json.encode(AccessDenied(sentence).to_document())
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def unix_gate(inner: Application) -> Gate:
    """The gate before the application on the private socket."""
    return Gate(inner, frozenset({UNIX_HOST.encode()}))


def loopback_gate(inner: Application, where: Loopback) -> Gate:
    """The gate before the application on a loopback port."""
    return Gate(inner, frozenset({f"{LOOPBACK}:{where.port}".encode()}), where.token)


def listen_on_loopback(state_dir: Path) -> tuple[socket.socket, Loopback]:
    """Listen on a loopback port of the system's choice; port and fresh token go into a private file. Raises OSError."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind((LOOPBACK, 0))
        listener.listen(16)
        listener.setblocking(False)
        where = Loopback(listener.getsockname()[1], secrets.token_urlsafe(32))
        write_private_file(state_dir / LOOPBACK_FILE, msgspec.json.encode(where) + b"\n")
    except BaseException:
        listener.close()
        raise
    return listener, where


def load_loopback(state_dir: Path) -> Loopback | None:
    """Where the running agent listens, if it does on a loopback port. Raises OSError other than for a missing file."""
    try:
        return msgspec.json.decode((state_dir / LOOPBACK_FILE).read_bytes(), type=Loopback)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
