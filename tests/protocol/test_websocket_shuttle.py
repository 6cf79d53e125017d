"""One WebSocket connection carried to a local socket, step by step, against a server that is not polite."""

from __future__ import annotations

import random
import socket
import ssl
import threading
import time
from selectors import EVENT_READ, EVENT_WRITE

import pytest
import trustme

from protocol.websocket.core import FEED, Core
from protocol.websocket.line import PING, Line, Over
from protocol.websocket.secured import READ
from protocol.websocket.shuttle import Shuttle
from protocol.websocket.tls import LibraryTls

CA = trustme.CA()
CONTENT = random.Random(1).randbytes(1_500_000)


def client_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    CA.configure_trust(context)
    return context


def shuttle_of(outside: socket.socket, local: socket.socket, core: Core, now: float) -> Shuttle:
    buffer, raw = memoryview(bytearray(FEED)), memoryview(bytearray(READ))
    line = Line(outside, LibraryTls(client_context(), "relay"), core, now, host="relay", buffer=buffer, raw=raw)
    return Shuttle(line, local, tells=True, buffer=buffer)


def serve_and_leave(sock: socket.socket, content: bytes, said: threading.Event) -> None:
    """Hear the caller out, say everything and the goodbye, and close at once without reading the answer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CA.issue_cert("relay").configure_cert(context)
    core = Core.server(("/tunnel",), 0.0)
    with context.wrap_socket(sock, server_side=True) as tls:
        while not core.peer_ended:
            core.receive_untrusted(tls.recv(FEED), 0.0)
            tls.sendall(core.take())
        core.send(content)
        core.end()
        core.close()
        tls.sendall(core.take())
    said.set()


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far


@pytest.fixture
def local() -> tuple[socket.socket, socket.socket]:
    near, far = socket.socketpair()
    far.setblocking(False)
    return near, far


def take(sock: socket.socket, most: int) -> bytes | None:
    try:
        return sock.recv(most)
    except BlockingIOError:
        return None


def test_what_came_before_a_break_is_delivered_however_slowly_it_is_taken(
    local: tuple[socket.socket, socket.socket],
) -> None:
    outside, server = connected()
    near, far = local
    said = threading.Event()
    thread = threading.Thread(target=serve_and_leave, args=(server, CONTENT, said))
    thread.start()
    now = time.monotonic()
    core = Core.client("relay", 443, "/tunnel", now)
    shuttle = shuttle_of(outside, near, core, now)
    # The own side is complete from the beginning, so that both are when the server's goodbye comes.
    far.shutdown(socket.SHUT_WR)
    received = bytearray()
    over = False
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for _ in range(3):
            if not over:
                for sock in shuttle.sockets:
                    shuttle.ready(sock, EVENT_READ | EVENT_WRITE)
                try:
                    shuttle.step(now)
                except Over:
                    over = True
                    shuttle.close()
        part = take(far, 5_000)
        if part == b"":
            break
        received += part or b""
    thread.join()
    far.close()
    assert said.is_set()
    line, _, stream = bytes(received).partition(b"\n")
    assert b"joined" in line
    assert stream == CONTENT


def test_a_side_that_takes_nothing_is_heard_all_the_same(local: tuple[socket.socket, socket.socket]) -> None:
    """Nothing is read while the local side takes nothing; pings say that somebody is there."""
    outside, server = connected()
    near, far = local
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CA.issue_cert("relay").configure_cert(context)
    heard: list[int] = []

    def serve() -> None:
        core = Core.server(("/tunnel",), 0.0)
        with context.wrap_socket(server, server_side=True) as tls:
            tls.settimeout(20)
            while not core.is_open:
                core.receive_untrusted(tls.recv(FEED), 0.0)
                tls.sendall(core.take())
            # More than the local side's buffers hold, and not so much that it waits for being read.
            core.send(CONTENT[:600_000])
            tls.sendall(core.take())
            while len(heard) < 3 and (data := tls.recv(FEED)):
                heard.append(len(data))

    thread = threading.Thread(target=serve)
    thread.start()
    now = time.monotonic()
    core = Core.client("relay", 443, "/tunnel", now)
    shuttle = shuttle_of(outside, near, core, now)
    while thread.is_alive():
        for sock in shuttle.sockets:
            shuttle.ready(sock, EVENT_READ | EVENT_WRITE)
        shuttle.step(now)
        # The shuttle's own time, which goes on as soon as it has been opened.
        now += PING / 50 if core.is_open else 0.0
        time.sleep(0.001)
    shuttle.close()
    thread.join()
    far.close()
    assert len(heard) == 3
