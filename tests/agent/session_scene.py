"""A worker that serves one session over real TLS, and everything that a visitor of it hears."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.connect.tls import session_context
from protocol import lane, session
from protocol.control import SessionAnswer, SessionOrder
from protocol.identity import NodeKey
from tests.agent.engine_world import World, world

SECRET = b"secret-content-of-alpha " * 400
OPEN = b"open-content-of-alpha " * 400
INSTANCE = bytes(range(32))
# Seconds.
PATIENCE = 60.0


@dataclass
class Scene:
    """Alpha serves one session to beta, for what lies below /open."""

    made: World
    task: str
    session: str
    ticket: str
    answer: SessionAnswer

    def ticket_for(self, **changes: Any) -> str:
        source = changes.pop("source", self.made.alpha.grant("r", ["/open"]))
        destination = changes.pop("destination", self.made.beta.grant("rw", ["/"]))
        fields = {"session_id": self.session, "task_id": self.task} | changes
        return self.made.ticket(self.task, self.session, source, destination, **fields)

    def version(self, path: str) -> session.Version:
        found = os.stat(self.made.alpha.root / path)
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def dial(self, context: ssl.SSLContext, session_id: str | None = None) -> ssl.SSLSocket:
        candidate = self.answer.candidates[0]
        raw = socket.create_connection((candidate.host, candidate.port), timeout=PATIENCE)
        return context.wrap_socket(raw, server_hostname=(session_id or self.session) + session.SNI_SUFFIX)

    def context(self, identity: NodeKey | None, alpn: str = session.ALPN_CONTROL) -> ssl.SSLContext:
        if identity is not None:
            return session_context(identity, self.made.alpha.key.certificate_pem, server_side=False, alpn=(alpn,))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols([alpn])
        return context


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with world(tmp_path) as made:
        for name, content in (("secret/hidden-name", SECRET), ("open/shown-name", OPEN)):
            (made.alpha.root / name).parent.mkdir()
            (made.alpha.root / name).write_bytes(content)
        task, session_id = str(uuid.uuid4()), str(uuid.uuid4())
        ticket = made.ticket(task, session_id, made.alpha.grant("r", ["/open"]), made.beta.grant("rw", ["/"]))
        assert made.alpha.service is not None
        order = SessionOrder(session_id=session_id, task_id=task, ticket=ticket, peer=made.beta.party)
        answer = await made.alpha.service.put_session(order)
        yield Scene(made, task, session_id, ticket, answer)


def everything(sock: ssl.SSLSocket) -> bytes:
    """All that the other side says until it ends the connection, or stops saying anything."""
    received = bytearray()
    try:
        while data := sock.recv(65536):
            received += data
    except (OSError, ssl.SSLError):
        pass
    return bytes(received)


def visit(scene: Scene, context: ssl.SSLContext, data: bytes, session_id: str | None = None) -> bytes:
    """Connect, say ``data`` whatever happens, and return every byte that was served. Blocks."""
    try:
        with scene.dial(context, session_id) as sock:
            sock.sendall(data)
            return everything(sock)
    except (OSError, ssl.SSLError):
        return b""


def asking(ticket: str) -> bytes:
    """A greeting and the wish to see everything, in one go."""
    messages = [
        session.Hello(ticket, INSTANCE),
        session.ListDirectory(1, b""),
        session.StatPaths(2, [b"open/shown-name"]),
    ]
    return b"".join(map(session.encode, messages))


def messages_in(data: bytes) -> list[Any]:
    return [session.answer_untrusted(body) for body in session.MessageReader().feed_untrusted(data)]


def converse(
    scene: Scene, context: ssl.SSLContext, session_id: str, ticket: str, *requests: session.Message
) -> list[Any]:
    """A greeting, and after a welcome some requests; all answers. Blocks."""
    received = bytearray()
    with scene.dial(context, session_id) as sock:
        sock.sendall(session.encode(session.Hello(ticket, INSTANCE)))
        received += sock.recv(65536)
        if requests:
            sock.sendall(b"".join(map(session.encode, requests)))
            while len(messages_in(bytes(received))) < 1 + len(requests):
                data = sock.recv(65536)
                if not data:
                    break
                received += data
    assert SECRET[:24] not in received
    assert b"hidden-name" not in received or requests
    return messages_in(bytes(received))


def read_on_lane(
    scene: Scene, requests: list[session.Message], ticket: str = "", *, lane_first: bool = False
) -> tuple[bytes, list[tuple[lane.AnyHeader, bytes]]]:
    """Enter the session as its destination, ask on a lane, and return all bytes of it until the last answer. With
    ``lane_first`` the lane has greeted before the control stream has. Blocks."""

    def greet_on_lane() -> ssl.SSLSocket:
        bulk = opened.enter_context(scene.dial(scene.context(scene.made.beta.key, session.ALPN_LANE)))
        bulk.sendall(lane.encode_header(lane.LaneHello(INSTANCE, 0)))
        return bulk

    with contextlib.ExitStack() as opened:
        control = opened.enter_context(scene.dial(scene.context(scene.made.beta.key)))
        if lane_first:
            bulk = greet_on_lane()
            # Long enough for its thread to be where it waits for the control stream.
            time.sleep(0.3)
        control.sendall(session.encode(session.Hello(ticket or scene.ticket, INSTANCE)))
        assert isinstance(messages_in(control.recv(65536))[0], session.HelloAnswer)
        if not lane_first:
            bulk = greet_on_lane()
        wire = bytearray()
        frames: list[tuple[lane.AnyHeader, bytes]] = []
        while not any(isinstance(header, lane.LaneReady) for header, _ in frames):
            wire += bulk.recv(65536)
            frames = frames_in(wire)
        control.sendall(b"".join(map(session.encode, requests)))
        last = max(request.r for request in requests)  # type: ignore[attr-defined]
        while not any(getattr(header, "r", 0) == last for header, _ in frames):
            data = bulk.recv(65536)
            assert data, "the lane ended early"
            wire += data
            frames = frames_in(wire)
        return bytes(wire), frames


def frames_in(wire: bytearray) -> list[tuple[lane.AnyHeader, bytes]]:
    frames, at = [], 0
    while at + lane.FRAME.size <= len(wire):
        head, payload = lane.lengths_untrusted(wire[at : at + lane.FRAME.size])
        start = at + lane.FRAME.size
        at = start + head + payload
        if at > len(wire):
            break
        frames.append((lane.header_untrusted(wire[start : start + head]), bytes(wire[start + head : at])))
    return frames
