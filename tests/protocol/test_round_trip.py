"""What the kernel's numbers say of a connection whose SYNs crossed. The numbers are those of Linux 6.18 (tcp_info)."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field, replace

import pytest

from protocol.congestion import TcpFacts, leave_bbr, tcp_facts, tune_sender
from protocol.round_trip import dialled_round_trip

pytestmark = pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="this system tells nothing of its connections")


@dataclass
class Told:
    """A socket of which the kernel says this; microseconds and segments. ``allowed``: what may be chosen."""

    rtt: int
    least: int
    sent: int = 0
    came: int = 0
    again: int = 0
    data: int = 0
    delivered: int = 1
    allowed: tuple[bytes, ...] = (b"bbr", b"cubic", b"reno")
    since: int = 0
    length: int = 256
    standard: bytes = b"cubic"
    # Microseconds that it had something to send, and that the other side took nothing more.
    busy: int = 0
    window: int = 0
    chosen: list[bytes] = field(default_factory=list)

    def getsockopt(self, _level: int, option: int, size: int) -> bytes:
        if option == socket.TCP_CONGESTION:
            return self.standard.ljust(size, b"\0")
        info = bytearray(256)
        rows = {56: self.since, 68: self.rtt, 100: self.again, 136: self.sent, 140: self.came, 148: self.least}
        for offset, value in {**rows, 156: self.data, 192: self.delivered}.items():
            struct.pack_into("=I", info, offset, value)
        struct.pack_into("=QQ", info, 168, self.busy, self.window)
        return bytes(info[: min(size, self.length)])

    def setsockopt(self, _level: int, _option: int, value: bytes) -> None:
        if value not in self.allowed:
            raise PermissionError
        self.chosen.append(value)


@pytest.mark.parametrize("least", [5_117, 50_238, 95_189])
def test_where_syns_crossed_the_round_trip_is_what_the_dialling_took(least: int) -> None:
    crossed = Told(least, least, sent=3, came=2, delivered=2)
    assert dialled_round_trip(crossed, 0.1004) == 0.1004
    # A program that is late to hear of it makes the path no longer.
    crossed.since = 140
    assert dialled_round_trip(crossed, 0.2404) == pytest.approx(0.1004)
    # With a SYN that was sent again, nobody knows.
    assert dialled_round_trip(Told(least, least, sent=4, came=2, again=1, delivered=2), 1.1004) is None


@pytest.mark.parametrize(
    "honest",
    [
        Told(100_900, 100_900, sent=2, came=1),
        # Our own SYN did not get through, the other's did, a while later.
        Told(100_437, 100_437, sent=2, came=2, delivered=2),
        # Older kernels take the other's SYN-ACK for a mistake, and measure up to the acknowledgement of their own.
        Told(100_437, 100_437, sent=3, came=3, delivered=2),
    ],
)
def test_what_the_kernel_measures_right_is_believed(honest: Told) -> None:
    assert dialled_round_trip(honest, 0.35) == honest.least / 1e6


def smoothed(least: float, true: float, samples: int) -> int:
    return round(true - (true - least) * (7 / 8) ** samples)


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("least", [5_000, 30_000])
def test_a_sender_whose_kernel_took_too_little_for_the_round_trip_does_not_use_bbr(least: int, samples: int) -> None:
    """It would send ten packets a round trip for ten seconds."""
    sender = Told(smoothed(least, 100_000, samples), least, data=samples, delivered=samples + 2)
    tune_sender(sender)
    assert sender.chosen == [b"cubic"]
    facts = tcp_facts(sender)
    assert facts is not None
    assert facts.at_least == pytest.approx(0.1, rel=1e-3)
    strict = Told(sender.rtt, least, data=samples, delivered=samples + 2, allowed=(b"bbr", b"reno"))
    tune_sender(strict)
    assert strict.chosen == [b"reno"]


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize(
    ("least", "extra"),
    [
        # The later one of two whose SYNs crossed, both at the same moment, and one whose own SYN was lost.
        (75_000, 2),
        (50_000, 2),
        (100_000, 2),
        # Others may have a queue in the way of all but the SYN.
        (10_000, 1),
        (10_000, 0),
    ],
)
def test_all_other_senders_on_long_paths_do(least: int, extra: int, samples: int) -> None:
    sender = Told(smoothed(least, 100_000, samples), least, data=samples, delivered=samples + extra)
    tune_sender(sender)
    assert sender.chosen == [b"bbr"]


@pytest.mark.parametrize(("rtt", "chosen"), [(2_999, b"cubic"), (3_000, b"bbr")])
def test_short_paths_keep_a_control_that_goes_by_loss(rtt: int, chosen: bytes) -> None:
    sender = Told(rtt, rtt)
    tune_sender(sender)
    assert sender.chosen == [chosen]
    # Where that may not be chosen, what the system gave stays.
    strict = Told(rtt, rtt, allowed=(b"reno",))
    tune_sender(strict)
    assert strict.chosen == []
    # What was not measured yet is no path of no length.
    fresh = Told(0, 0)
    tune_sender(fresh)
    assert fresh.chosen == []


def test_what_the_kernel_tells_of_a_connection() -> None:
    told = Told(100_000, 90_000, again=7, data=3, delivered=3, busy=2_500_000, window=500_000)
    assert tcp_facts(told) == TcpFacts(0.1, 7, 2.5, 0.5, 0.09, None)
    # A kernel that does not count deliveries tells the rest; an older one the round trip alone.
    assert tcp_facts(replace(told, length=195)) == TcpFacts(0.1, 7, 2.5, 0.5, 0.09, None)
    assert tcp_facts(replace(told, length=184)) == TcpFacts(0.1, 7, 2.5, 0.5, 0.09, None)
    assert tcp_facts(replace(told, length=183)) == TcpFacts(0.1)
    crossed = tcp_facts(replace(told, delivered=5, length=196))
    assert crossed is not None
    assert crossed.at_least == pytest.approx(0.1203, rel=1e-3)
    assert tcp_facts(replace(told, length=71)) is None
    assert tcp_facts(Told(0, 0)) == TcpFacts(None, 0, 0.0, 0.0, None, None)


@pytest.mark.parametrize("length", [72, 104, 150, 180, 190])
def test_kernels_that_tell_less_are_believed(length: int) -> None:
    sender = Told(20_000, 1_000, sent=3, came=2, data=1, delivered=3, length=length)
    tune_sender(sender)
    assert sender.chosen == [b"bbr"]


def test_a_fresh_connection_leaves_a_bbr_that_believes_too_little() -> None:
    """Also of the side that receives, which has but requests to send: the system's own choice may be BBR."""
    for standard, least, chosen in [
        (b"bbr", 20_000, [b"cubic"]),
        (b"bbr", 50_000, []),
        # Nothing is known of it yet.
        (b"bbr", 0, []),
        (b"cubic", 20_000, []),
    ]:
        fresh = Told(least, least, sent=3, came=2, delivered=2, standard=standard)
        leave_bbr(fresh, 0.1)
        assert fresh.chosen == chosen
    here, there = socket.socketpair()
    with here, there:
        leave_bbr(here, 0.1)
