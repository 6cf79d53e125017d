"""The port of a server that is started again: where no outgoing connection can take it, and free at the moment."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from agent.demo import free_port as module
from agent.demo.free_port import HIGHEST, LOWEST, free_port

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def test_it_is_outside_the_range_of_outgoing_connections() -> None:
    assert all(LOWEST <= free_port() <= HIGHEST for _ in range(50))
    if _RANGE.exists():
        lowest = int(_RANGE.read_text().split()[0])
        if lowest == 32768:  # as Linux comes; a machine may be set up otherwise
            assert lowest > HIGHEST


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_port_that_is_taken_is_not_offered(kind: socket.SocketKind, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = free_port()
    monkeypatch.setattr(module, "LOWEST", taken)
    monkeypatch.setattr(module, "HIGHEST", taken)
    assert free_port() == taken
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", taken))
        with pytest.raises(OSError, match="No free port"):
            free_port()
