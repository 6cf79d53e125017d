"""TLS of lanes: with one another, with an older agent's `ssl`, with strangers, and with peers that say nothing."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agent.connect import lane_tls
from agent.connect.lane_tls import SecuredLane, secure_lane
from agent.connect.tls import session_context
from protocol.errors import TowpathError
from protocol.identity import NodeKey

ALPN, NAME = "towpath-lane/test", "session.example"
MINE, THEIRS, STRANGER = (NodeKey.generate() for _ in range(3))
CONTENT = bytes(range(256)) * 12_345

Side = Callable[[socket.socket], Any]


def new(identity: NodeKey, peer: NodeKey, *, server: bool) -> Side:
    name = None if server else NAME
    return lambda sock: secure_lane(sock, identity, peer.certificate_pem, server_name=name, alpn=ALPN)


def old(identity: NodeKey, peer: NodeKey, *, server: bool) -> Side:
    """The lane of an agent from before."""
    context = session_context(identity, peer.certificate_pem, server_side=server, alpn=(ALPN,))
    return lambda sock: context.wrap_socket(sock, server_side=server, server_hostname=None if server else NAME)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def both(pair: tuple[socket.socket, socket.socket], dial: Side, serve: Side) -> tuple[Any, Any]:
    with ThreadPoolExecutor(1) as other:
        served = other.submit(serve, pair[1])
        return dial(pair[0]), served.result()


def read(lane: Any, size: int) -> bytes:
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        count = lane.recv_into(view[got:], size - got)
        assert count, "the lane ended early"
        got += count
    return bytes(data)


@pytest.mark.parametrize(("dials", "serves"), [(new, new), (old, new), (new, old)])
def test_content_passes_both_ways(pair: tuple[socket.socket, socket.socket], dials: Any, serves: Any) -> None:
    one, two = both(pair, dials(MINE, THEIRS, server=False), serves(THEIRS, MINE, server=True))
    with ThreadPoolExecutor(1) as other:
        for sender, receiver in ((one, two), (two, one)):
            sent = other.submit(sender.sendall, memoryview(CONTENT))
            assert read(receiver, len(CONTENT)) == CONTENT
            sent.result()
    for lane in (one, two):
        if isinstance(lane, ssl.SSLSocket):
            assert lane.version() == "TLSv1.3"
        lane.close()


@pytest.mark.parametrize("dials", [new, old])
def test_a_stranger_is_refused_by_either_side(dials: Any) -> None:
    def refused(dial: Side, serve: Side) -> None:
        pair = socket.socketpair()
        with pair[0], pair[1], ThreadPoolExecutor(1) as other:
            served = other.submit(serve, pair[1])
            with contextlib.suppress(OSError), contextlib.closing(dial(pair[0])) as lane:
                # In TLS 1.3 who dials is done before who serves has looked at the certificate.
                assert lane.recv_into(memoryview(bytearray(1)), 1) == 0
            pair[0].close()
            with pytest.raises((OSError, TowpathError)):
                served.result()

    refused(dials(STRANGER, THEIRS, server=False), new(THEIRS, MINE, server=True))
    refused(new(MINE, THEIRS, server=False), new(STRANGER, MINE, server=True))
    # Nobody's certificate at all.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    refused(lambda sock: context.wrap_socket(sock, server_hostname=NAME), new(THEIRS, MINE, server=True))


def test_no_session_is_resumed() -> None:
    """It would skip the certificate."""
    context = session_context(MINE, THEIRS.certificate_pem, server_side=False, alpn=(ALPN,))
    session = None
    for _ in range(2):
        pair = socket.socketpair()
        with pair[0], pair[1], ThreadPoolExecutor(1) as other:
            served = other.submit(new(THEIRS, MINE, server=True), pair[1])
            with context.wrap_socket(pair[0], server_hostname=NAME, session=session) as lane:
                two = served.result()
                two.sendall(b"x")
                assert lane.recv(1) == b"x"
                assert not lane.session_reused
                session = lane.session
                two.close()


def test_who_says_nothing_is_not_waited_for(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_tls, "HANDSHAKE_TIMEOUT", 0.01)
    with pytest.raises(TimeoutError):
        new(THEIRS, MINE, server=True)(pair[1])
    assert pair[1].fileno() == -1


def test_who_drips_is_not_waited_for_longer(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_tls, "HANDSHAKE_TIMEOUT", 0.05)
    over = threading.Event()

    def drip() -> int:
        pair[0].sendall(b"\x16\x03\x01\x40\x00")
        for dripped in range(2000):
            if over.wait(0.005):
                return dripped
            try:
                pair[0].sendall(b"\0")
            except BrokenPipeError:
                return dripped
        return 2000

    with ThreadPoolExecutor(1) as other:
        dripped = other.submit(drip)
        with pytest.raises(TimeoutError):
            new(THEIRS, MINE, server=True)(pair[1])
        over.set()
        assert dripped.result() < 1000


def test_a_lane_ends_by_silence_by_a_word_and_from_another_thread() -> None:
    def lanes() -> tuple[SecuredLane, SecuredLane]:
        pair = socket.socketpair()
        made: tuple[SecuredLane, SecuredLane] = both(
            pair, new(MINE, THEIRS, server=False), new(THEIRS, MINE, server=True)
        )
        return made

    one, two = lanes()
    two.close()
    assert one.recv(100) == b""
    with pytest.raises(OSError, match=r"."):
        for _ in range(10):
            one.sendall(CONTENT)
    one.close()

    one, two = lanes()
    with socket.socket(fileno=socket.dup(one.fileno())) as duplicate:
        waiting = threading.Timer(0.05, duplicate.shutdown, [socket.SHUT_RDWR])
        waiting.start()
        assert one.recv(100) == b""
        waiting.join()
    one.close()
    two.close()

    one, two = lanes()
    one.settimeout(0.01)
    with pytest.raises(TimeoutError):
        one.recv(1)
    two.sendall(b"later")
    one.settimeout(None)
    assert one.recv(100) == b"later"
    one.close()
    two.close()


def test_what_is_no_tls_is_an_error_of_the_connection(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(ConnectionError, match="TLS of a lane failed"):
        new(THEIRS, MINE, server=True)(pair[1])


HARDENED = """
import ctypes, mmap, sys
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE, as systemd's MemoryDenyWriteExecute
    sys.exit(77)
from tests.agent import test_lane_tls as lanes
import socket
dial, serve = lanes.new(lanes.MINE, lanes.THEIRS, server=False), lanes.new(lanes.THEIRS, lanes.MINE, server=True)
one, two = lanes.both(socket.socketpair(), dial, serve)
one.sendall(b"through")
assert two.recv(100) == b"through"

import trio
from tests.agent import test_control_tls as control

async def talk():
    async with control.ends() as (ours, theirs):
        await ours.send_all(b"through")
        assert await theirs.receive_some() == b"through"

trio.run(talk)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a service manager's rule of Linux")
def test_lanes_need_no_memory_that_is_writable_and_executable() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HARDENED],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip("this kernel has no PR_SET_MDWE")
    assert done.returncode == 0, done.stderr
