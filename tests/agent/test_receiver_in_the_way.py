"""A receiver that reads too slowly is not taken for a slow network."""

from __future__ import annotations

import contextlib
import socket
import sys

import pytest

from agent.meter.lane import LaneMeter
from tests.protocol.test_round_trip import Told


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how long the receiver's window was full")
def test_the_receivers_window_is_told_while_it_is_full() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as sender,
        listener.accept()[0],
    ):
        meter = LaneMeter(sender)
        assert meter.held_back() == 0.0
        sender.setblocking(False)
        # Nobody reads: the window fills, and the kernel's clock of that ticks.
        while meter.held_back() < 0.02:
            with contextlib.suppress(BlockingIOError):
                sender.send(bytes(65536))


def test_a_full_window_of_a_long_path_is_the_paths() -> None:
    assert LaneMeter(Told(4_000, 2_999, window=500_000)).held_back() == 0.5
    assert LaneMeter(Told(4_000, 3_000, window=500_000)).held_back() == 0.0


def test_where_the_system_does_not_tell_nothing_was_in_the_way() -> None:
    assert LaneMeter(Told(100, 100, window=500_000, length=72)).held_back() == 0.0
    ends = socket.socketpair()
    with ends[0] as one, ends[1]:
        assert LaneMeter(one).held_back() == 0.0
