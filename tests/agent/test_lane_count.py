"""How many lanes a session gets, and which congestion control: decisions without a network."""

from __future__ import annotations

import itertools
import socket

from hypothesis import given
from hypothesis import strategies as st

from agent.meter.processors import Processors, ProcessorTimes, processor_times
from agent.transfer.receiving.lane_count import SPAN, LaneCount
from protocol.congestion import tcp_facts, tune_sender


class Path:
    """A path whose goodput depends on the number of lanes, and a session on it."""

    def __init__(self, limit: int, goodput: dict[int, float]) -> None:
        self.now = 0.0
        self.received = 0.0
        self.lanes = 1
        self.goodput = goodput
        self.count = LaneCount(limit, 0.0)
        self.history: list[int] = []

    def run(self, seconds: float, *, busy: bool = True, room: bool = True) -> None:
        for _ in range(int(seconds * 2)):
            self.now += 0.5
            self.received += 0.5 * self.goodput[min(self.lanes, max(self.goodput))]
            self.lanes = self.count.decide(self.now, int(self.received), self.lanes, busy=busy, room=room)
            self.history.append(self.lanes)


def test_lanes_grow_while_they_help() -> None:
    path = Path(8, {1: 10e6, 2: 20e6, 3: 30e6, 4: 31e6})
    path.run(20)
    assert max(path.history) == 4
    assert path.lanes == 3


def test_no_lane_is_tried_where_it_would_find_no_processor() -> None:
    path = Path(8, {1: 10e6, 2: 20e6})
    path.run(20, room=False)
    assert max(path.history) == 1
    path.run(3)
    assert path.lanes == 2


def test_a_lane_that_was_tried_is_judged_without_a_processor_too() -> None:
    path = Path(8, {1: 10e6, 2: 10e6})
    path.run(4)
    assert path.lanes == 2
    path.run(2, room=False)
    assert path.lanes == 1


def test_a_processor_is_to_spare_unless_this_process_computes_and_the_machine_is_full() -> None:
    readings = iter(
        ProcessorTimes(*each)
        for each in [(0, 0, 0), (1, 0.4, 0), (2, 1.4, 0.4), (3, 2.4, 1.0), (3.1, 2.5, 1.0), (4, 3.5, 1.0)]
    )
    processors = Processors(lambda: next(readings))
    assert [processors.room() for _ in range(5)] == [True, False, True, True, False]


def test_processors_are_counted_by_the_system() -> None:
    before = processor_times()
    while (now := processor_times()).clock - before.clock < 0.05:
        continue
    assert now.own > before.own
    assert now.idle > 0.0


def test_a_connection_that_still_finds_its_rate_gets_no_company() -> None:
    count, received = LaneCount(8, 0.0), 0.0
    now, lanes, history = 0.0, 1, []
    # Goodput doubles every two seconds up to what the path has, whatever lanes there are.
    for step in range(80):
        now += 0.5
        received += 0.5 * min(1e6 * 2 ** (step // 4), 64e6)
        lanes = count.decide(now, int(received), lanes, busy=True)
        history.append(lanes)
    assert max(history[: 7 * 4]) == 1
    assert max(history) == 2
    assert lanes <= 2


def test_a_lane_that_does_not_help_goes_and_is_tried_again_later_and_later() -> None:
    path = Path(8, {1: 500e6, 2: 500e6})
    path.run(600)
    tries = [index for index in range(1, len(path.history)) if path.history[index] > path.history[index - 1]]
    gaps = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert path.lanes <= 2
    assert len(tries) >= 3
    assert gaps == sorted(gaps)


def test_lanes_that_wait_for_work_are_not_multiplied() -> None:
    path = Path(8, {1: 1e6, 2: 9e6})
    path.run(60, busy=False)
    assert set(path.history) == {1}


def test_a_lowered_limit_counts_at_once() -> None:
    path = Path(8, {1: 1e6, 2: 2e6, 3: 3e6, 4: 4e6})
    path.run(4 * SPAN)
    assert path.lanes > 2
    path.count.limit = 2
    path.run(0.5)
    assert path.lanes == 2


@given(
    st.integers(1, 16),
    st.lists(st.tuples(st.floats(0.1, 10), st.integers(0, 2**40), st.booleans()), max_size=50),
)
def test_there_is_always_a_lane_and_never_more_than_allowed(limit: int, steps: list[tuple[float, int, bool]]) -> None:
    count, lanes, now, received = LaneCount(limit, 0.0), 1, 0.0, 0
    for passed, arrived, busy in steps:
        now, received = now + passed, received + arrived
        wanted = count.decide(now, received, lanes, busy=busy)
        assert 1 <= wanted <= limit
        assert abs(wanted - lanes) <= 1
        lanes = wanted


def test_a_connection_over_loopback_keeps_a_loss_based_control() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            client.sendall(b"x")
            assert accepted.recv(1) == b"x"
            facts = tcp_facts(client)
            if facts is not None and facts.rtt is not None:
                assert 0 < facts.rtt < 1
            tune_sender(client)
            if hasattr(socket, "TCP_CONGESTION"):
                chosen = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")
                # An unprivileged process keeps what the system gives when it may not choose.
                assert chosen in (
                    b"cubic",
                    accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0"),
                )


def test_what_is_no_tcp_connection_is_left_alone() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert tcp_facts(ours) is None
        tune_sender(ours)
