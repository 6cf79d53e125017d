"""Decoders of what peers send, against lengths that lie: only `ProtocolError` comes out, and nothing that was only
announced takes memory. Counts are printed."""

from __future__ import annotations

import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random

import msgspec

from agent.connect import port_control
from agent.connect.quic.credit import Receiver
from protocol import control, lane, reversal, session, stun
from protocol.client_hello import parse_client_hello_untrusted
from protocol.errors import ProtocolError

SEED = 23
# What one decoder may take beyond what it was given; a body of a few bytes that claims gigabytes gets no more.
MOST = 256 * 1024
EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)

Decode = Callable[[bytes], object]


def decoders() -> dict[str, Decode]:
    return {
        "request of a session": session.request_untrusted,
        "answer of a session": session.answer_untrusted,
        "stream of a session": lambda data: session.MessageReader().feed_untrusted(data),
        "frame of a lane": lambda data: lane.lengths_untrusted(data[: lane.FRAME.size].ljust(lane.FRAME.size, b"\0")),
        "header of a lane": lane.header_untrusted,
        "order of a task": lambda data: control.decode_untrusted(data, control.TaskOrder),
        "line of an agent": lambda data: control.decode_untrusted(data, control.AgentEvent),
        "STUN request": stun.parse_request_untrusted,
        "STUN answer": stun.parse_answer_untrusted,
        "ClientHello": parse_client_hello_untrusted,
        "preamble of a dial back": reversal.parse_preamble_untrusted,
        "PCP answer": lambda data: port_control.parse_pcp_untrusted(data, b"n" * 12, 4000),
        "NAT-PMP answer": lambda data: port_control.parse_map_untrusted(data, 4000),
        "QUIC credit": lambda data: list(Receiver().feed_untrusted(data)),
    }


def good() -> list[bytes]:
    """Something to begin from, for each family."""
    block = lane.encode_header(lane.Block(1, 2, b"d" * 32, last=True))
    messages = [session.encode(session.StatPaths(2, [b"", b"x"])), session.encode(session.Failed(0, {"code": "X"}))]
    return [
        block,
        block[lane.FRAME.size :],
        *messages,
        *(message[session.PREFIX :] for message in messages),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600),
        struct.pack(">HHI12s", 1, 0, 0x2112A442, b"t" * 12),
        msgspec.json.encode({"n": 1, "kind": "event", "time": "now", "task_id": "t"}),
        bytes(60),
    ]


def lying(random: Random) -> Iterator[bytes]:
    """Good bytes in which some number is an extreme one; and msgpack that announces far more than follows."""
    for sample in good():
        for edge in EDGES:
            for size, code in ((1, "B"), (2, ">H"), (4, ">I"), (4, "<I")):
                number = struct.pack(code, edge & (256**size - 1))
                place = random.randrange(max(1, len(sample) - size))
                yield sample[:place] + number + sample[place + size :]
        yield sample[: random.randrange(len(sample))]
    for kind in (0xC6, 0xC9, 0xDB, 0xDD, 0xDF):
        for edge in EDGES:
            yield bytes([kind]) + struct.pack(">I", edge)
            yield b"\x82\xa1t\xa4stat\xa5paths" + bytes([kind]) + struct.pack(">I", edge) + b"x" * random.randrange(9)


def test_lengths_that_lie_take_no_memory_and_raise_nothing_else() -> None:
    random, refused, taken = Random(SEED), Counter[str](), Counter[str]()
    bodies = [*lying(random), *(random.randbytes(random.randrange(200)) for _ in range(300))]
    worst = (0, "")
    tracemalloc.start()
    try:
        for name, decode in decoders().items():
            for body in bodies:
                tracemalloc.reset_peak()
                before, _ = tracemalloc.get_traced_memory()
                try:
                    decode(body)
                except ProtocolError:
                    refused[name] += 1
                else:
                    taken[name] += 1
                used = tracemalloc.get_traced_memory()[1] - before
                worst = max(worst, (used, name))
                assert used < MOST, f"{name} took {used} bytes for {body[:40]!r}… (seed {SEED})"
    finally:
        tracemalloc.stop()
    print(f"seed {SEED}, bodies: {len(bodies)}, decoders: {len(decoders())}, most memory: {worst[0]} ({worst[1]})")
    print(f"refused: {dict(refused)}")
    # Each was really asked, and most lies are seen at once.
    assert all(refused[name] + taken[name] == len(bodies) for name in decoders())
    assert sum(refused.values()) > sum(taken.values())
