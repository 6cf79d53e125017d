"""A QUIC server that is gone, or was started again, is missed soon; nobody else can end its connection."""

from __future__ import annotations

import socket
import sys
import time
from contextlib import closing

import pytest

from agent.connect.quic import carrier as carrier_module
from agent.connect.quic.carrier import Carrier, ConnectionOver
from agent.connect.udp import open_udp
from tests.agent.quic_pair import (
    both,
    move_bytes,
    quic_pair,
    soon_in_doubt,
    udp,
)


def turn_until(carrier: Carrier, deadline: float) -> str:
    """Why it was over, or an empty text when it was not by then (monotonic seconds)."""
    try:
        while time.monotonic() < deadline:
            carrier.turn(0.05)
    except ConnectionOver as error:
        return error.sentence
    return ""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a socket that it was refused")
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@both
def test_a_server_that_was_killed_is_missed_soon(library: str, family: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("QUIET", 0.1), ("ASK_AGAIN", 0.02), ("REFUSED_PATIENCE", 0.1)):
        monkeypatch.setattr(carrier_module, name, value)
    with closing(quic_pair(library, make=udp if family == socket.AF_INET else open_udp)) as pair:
        pair.up()
        near, far = pair.open()
        with near, far:
            began = time.monotonic()
            # Nobody has its port any more, and nothing was said.
            pair.server._datagrams.sock.close()
            assert "nobody has the port" in turn_until(pair.client, began + 3)
            assert time.monotonic() - began < 1.5


@both
def test_a_server_that_may_have_been_started_again_must_say_something(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon_in_doubt(monkeypatch)
    with closing(quic_pair(library)) as pair:
        pair.up()
        near, far = pair.open()
        with near, far:
            pair.client.doubt()
            pair.run(lambda: pair.client._doubted is None)
            pair.client.doubt()
            # The server gets no turn any more, and its port refuses nothing.
            assert "started again" in turn_until(pair.client, time.monotonic() + 2)


@both
def test_a_server_that_was_started_again_for_certain_is_not_waited_for(library: str) -> None:
    """Whatever it may be heard of: its machine says nothing, and no time shows more than its own word."""
    with closing(quic_pair(library, instance="first")) as pair:
        pair.up()
        near, far = pair.open()
        with near, far:
            pair.client.doubt("first")
            assert pair.client._doubted is None
            assert move_bytes(pair, near, far, b"still there") == b"still there"
            began = time.monotonic()
            pair.client.doubt("second")
            assert "started again" in turn_until(pair.client, began + 5)
            assert time.monotonic() - began < carrier_module.DOUBT_PATIENCE


@both
def test_a_server_of_before_that_says_no_instance_is_doubted(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    soon_in_doubt(monkeypatch)
    with closing(quic_pair(library)) as pair:
        pair.up()
        near, far = pair.open()
        with near, far:
            pair.client.doubt("second")
            pair.run(lambda: pair.client._doubted is None)
            pair.client.doubt("second")
            assert "started again" in turn_until(pair.client, time.monotonic() + 2)


@both
def test_a_refusal_that_somebody_made_up_ends_no_connection(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("QUIET", 0.1), ("ASK_AGAIN", 0.02), ("REFUSED_PATIENCE", 0.3)):
        monkeypatch.setattr(carrier_module, name, value)
    with closing(quic_pair(library)) as pair:
        pair.up()
        near, far = pair.open()
        with near, far:
            deadline = time.monotonic() + 0.8
            while time.monotonic() < deadline:
                # As a stranger's ICMP messages would have it; the server is there and answers.
                pair.client._datagrams.refused = True
                for carrier in (pair.client, pair.server):
                    carrier.turn(0.002)
            assert move_bytes(pair, near, far, b"still there") == b"still there"
