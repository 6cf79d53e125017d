"""Hostile peers of the reversed HTTP/2 connection: floods and garbage end it cleanly, and cost little."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import h2.config
import h2.connection
import msgspec
import pytest
import trio
import trio.testing
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    ExtensionFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    PushPromiseFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ProtocolError
from protocol.reverse_http import Flood, Limits, LinkLost, connect, serve
from protocol.reverse_http.core import Core, Farewell
from protocol.reverse_http.limits import Budget

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
NOW = 1000.0


def server() -> Core:
    core = Core(client=False, limits=Limits(), now=NOW)
    core.receive_untrusted(PREFACE + SettingsFrame(0).serialize(), NOW)
    core.take(1 << 20)
    return core


def goaway_of(core: Core) -> tuple[int, str]:
    """What the last GOAWAY in the queue says."""
    data = core.take(1 << 24).removeprefix(PREFACE)
    found: tuple[int, str] | None = None
    while data:
        frame, length = Frame.parse_frame_header(memoryview(data[:9]))
        if isinstance(frame, GoAwayFrame):
            frame.parse_body(memoryview(data[9 : 9 + length]))
            said = msgspec.json.decode(frame.additional_data, type=Farewell) if frame.additional_data else Farewell()
            found = (frame.error_code, said.sentence)
        data = data[9 + length :]
    assert found is not None, "the connection was closed without a word"
    return found


def encoder() -> Callable[[list[tuple[str, str]]], bytes]:
    from hpack import Encoder

    encode = Encoder().encode
    return lambda headers: encode(headers)


REQUEST = [(":method", "GET"), (":scheme", "https"), (":authority", "a"), (":path", "/")]


def rapid_resets() -> Iterator[bytes]:
    encode = encoder()
    for number in range(1, 100_000, 2):
        frame = HeadersFrame(number, data=encode(REQUEST), flags=["END_HEADERS", "END_STREAM"])
        yield frame.serialize() + RstStreamFrame(number, error_code=8).serialize()


def repeated(frame: Frame) -> Iterator[bytes]:
    data = frame.serialize()
    while True:
        yield data


def resets_of_nothing() -> Iterator[bytes]:
    encode = encoder()
    yield HeadersFrame(1, data=encode(REQUEST), flags=["END_HEADERS", "END_STREAM"]).serialize()
    yield from repeated(RstStreamFrame(1, error_code=8))


def empty_data() -> Iterator[bytes]:
    yield HeadersFrame(1, data=encoder()(REQUEST), flags=["END_HEADERS"]).serialize()
    yield from repeated(DataFrame(1))


def continuations() -> Iterator[bytes]:
    yield HeadersFrame(1, data=encoder()(REQUEST)).serialize()
    yield from repeated(ContinuationFrame(1, data=b""))


def long_header_block() -> Iterator[bytes]:
    yield HeadersFrame(1, data=encoder()(REQUEST)).serialize()
    yield from repeated(ContinuationFrame(1, data=b"\0" * 16_000))


FLOODS: dict[str, tuple[Callable[[], Iterator[bytes]], str]] = {
    "rapid reset": (rapid_resets, "resets them"),
    "reset": (resets_of_nothing, "RST_STREAM"),
    "settings": (lambda: repeated(SettingsFrame(0, settings={3: 100})), "SETTINGS"),
    "ping": (lambda: repeated(PingFrame(0, opaque_data=b"12345678")), "PING"),
    "ping answers": (lambda: repeated(PingFrame(0, opaque_data=b"12345678", flags=["ACK"])), "PING"),
    "priority": (lambda: repeated(PriorityFrame(1, depends_on=0, stream_weight=5)), "PRIORITY"),
    "window update": (lambda: repeated(WindowUpdateFrame(0, window_increment=1)), "WINDOW_UPDATE"),
    "empty data": (empty_data, "empty DATA"),
    "continuation": (continuations, "CONTINUATION"),
    "header block": (long_header_block, "header block"),
    "extension": (lambda: repeated(ExtensionFrame(0xBE, 0, 0, b"")), "carry nothing"),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_ends_the_connection_with_its_name(name: str) -> None:
    make, word = FLOODS[name]
    core = server()
    fed = 0
    with pytest.raises(Flood, match=word):
        for data in make():
            fed += len(data)
            assert fed < 1_000_000, "the flood goes on and on"
            core.receive_untrusted(data, NOW)
    code, sentence = goaway_of(core)
    assert code == 11
    assert word in sentence
    assert core.closed


@pytest.mark.parametrize("name", ["ping", "settings", "priority", "rapid reset"])
def test_the_same_frames_at_an_honest_pace_are_fine(name: str) -> None:
    core, now = server(), NOW
    for number, data in enumerate(FLOODS[name][0]()):
        now += 1.0
        core.receive_untrusted(data, now)
        core.take(1 << 20)
        if number > 2000:
            break
    assert not core.closed


def test_a_flood_that_is_cut_into_single_bytes_is_seen_all_the_same() -> None:
    core = server()
    data = PingFrame(0, opaque_data=b"12345678").serialize() * 200
    with pytest.raises(Flood, match="PING"):
        for position in range(len(data)):
            core.receive_untrusted(data[position : position + 1], NOW)


def test_a_frame_longer_than_allowed_is_refused_before_it_is_collected() -> None:
    core = server()
    header = (1 << 24) - 1
    with pytest.raises(Flood, match="16777215 bytes"):
        core.receive_untrusted(header.to_bytes(3, "big") + bytes([0, 0]) + (1).to_bytes(4, "big"), NOW)


def test_a_compression_bomb_is_refused() -> None:
    core = server()
    # One long field in the dynamic table, then referred to thousands of times.
    block = b"\x82\x87\x84" + b"\x40\x01a\x7f\x80\x1e" + b"x" * 3967 + b"\xbe" * 10_000
    with pytest.raises(ProtocolError):
        core.receive_untrusted(HeadersFrame(1, data=block, flags=["END_HEADERS", "END_STREAM"]).serialize(), NOW)


def test_more_streams_than_announced_are_refused() -> None:
    core, encode = server(), encoder()
    with pytest.raises(ProtocolError, match="Max inbound streams"):
        for number in range(1, 2 * 102, 2):
            frame = HeadersFrame(number, data=encode(REQUEST), flags=["END_HEADERS"])
            core.receive_untrusted(frame.serialize(), NOW)


def test_more_data_than_the_window_is_refused() -> None:
    core = server()
    core.receive_untrusted(HeadersFrame(1, data=encoder()(REQUEST), flags=["END_HEADERS"]).serialize(), NOW)
    frame = DataFrame(1, data=bytes(16_000)).serialize()
    with pytest.raises(ProtocolError, match=r"[Ff]low control"):
        for _ in range(Limits().stream_window // 16_000 + 1):
            core.receive_untrusted(frame, NOW)


def test_padding_is_given_back_so_that_it_cannot_starve_a_stream() -> None:
    core = server()
    core.receive_untrusted(HeadersFrame(1, data=encoder()(REQUEST), flags=["END_HEADERS"]).serialize(), NOW)
    frame = DataFrame(1, data=b"x", flags=["PADDED"])
    frame.pad_length = 255
    for _ in range(20_000):
        core.receive_untrusted(frame.serialize(), NOW)
        core.consumed(1, 1)
        core.take(1 << 20)
    assert not core.closed


def test_a_client_refuses_pushed_streams() -> None:
    core = Core(client=True, limits=Limits(), now=NOW)
    peer = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
    peer.initiate_connection()
    peer.receive_data(core.take(1 << 20))
    core.receive_untrusted(peer.data_to_send(), NOW)
    core.open([(n.encode(), v.encode()) for n, v in REQUEST], NOW, end=True)
    pushed = PushPromiseFrame(1, data=encoder()(REQUEST), flags=["END_HEADERS"])
    pushed.promised_stream_id = 2
    with pytest.raises(ProtocolError):
        core.receive_untrusted(pushed.serialize(), NOW)


def test_answers_nobody_reads_end_the_connection() -> None:
    """Control frames whose answers pile up because the peer does not read, at a pace that no rate limit notices."""
    core, now = Core(client=False, limits=Limits(max_queued=4000), now=NOW), NOW
    core.receive_untrusted(PREFACE + SettingsFrame(0).serialize(), NOW)
    with pytest.raises(Flood, match="does not read"):
        for _ in range(1000):
            now += 1
            core.receive_untrusted(PingFrame(0, opaque_data=b"12345678").serialize(), now)


@given(data=st.binary(max_size=4000), cuts=st.integers(1, 400), client=st.booleans(), preface=st.booleans())
@settings(max_examples=400, deadline=None)
def test_random_bytes_raise_nothing_but_protocol_errors(data: bytes, cuts: int, client: bool, preface: bool) -> None:
    core = Core(client=client, limits=Limits(), now=NOW)
    if preface:
        data = (b"" if client else PREFACE) + SettingsFrame(0).serialize() + data
    try:
        for position in range(0, len(data), cuts):
            core.receive_untrusted(data[position : position + cuts], NOW)
    except ProtocolError:
        assert core.closed
        goaway_of(core)


frames = st.builds(
    lambda kind, flags, stream, body: (
        len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body
    ),
    st.integers(0, 12),
    st.integers(0, 255),
    st.sampled_from([0, 1, 1, 2, 3, 5, 2**31 - 1, 2**32 - 1]),
    st.one_of(
        st.binary(max_size=64),
        st.sampled_from(
            [b"\x82\x87\x84\x41\x01a", b"\x88", b"\0" * 4, b"\0" * 8, b"\0\0\0\x01", b"\0\x04\x7f\xff\xff\xff"]
        ),
    ),
)


@given(sequence=st.lists(frames, max_size=40), client=st.booleans())
@settings(max_examples=600, deadline=None)
def test_random_frames_raise_nothing_but_protocol_errors(sequence: list[bytes], client: bool) -> None:
    core = Core(client=client, limits=Limits(), now=NOW)
    start = (b"" if client else PREFACE) + SettingsFrame(0).serialize()
    try:
        core.receive_untrusted(start, NOW)
        if client:
            core.open([(n.encode(), v.encode()) for n, v in REQUEST], NOW, end=False)
        for data in sequence:
            core.receive_untrusted(data, NOW)
            core.consumed(1, 1)
            core.reset(3)
    except ProtocolError:
        assert core.closed
        goaway_of(core)


def mutated(seed: int) -> bytes:
    """A recorded conversation with some bytes changed, left out or doubled."""
    chance = random.Random(seed)
    peer = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    peer.initiate_connection()
    for number in range(1, 30, 2):
        peer.send_headers(number, REQUEST)
        peer.send_data(number, b"x" * chance.randrange(200), end_stream=chance.random() < 0.8)
    data = bytearray(peer.data_to_send())
    for _ in range(chance.randrange(1, 6)):
        position = chance.randrange(len(data))
        match chance.randrange(3):
            case 0:
                data[position] = chance.randrange(256)
            case 1:
                del data[position : position + chance.randrange(20)]
            case _:
                data[position:position] = data[position : position + chance.randrange(60)]
    return bytes(data)


async def test_a_server_survives_mutated_conversations(autojump_clock: trio.testing.MockClock) -> None:
    outcomes: Counter[str] = Counter()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        outcomes["requests"] += 1
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * 100})

    async def served(stream: trio.abc.Stream) -> None:
        ending = await serve(stream, app)
        outcomes["whole" if ending.sentence == "The other side closed the connection." else "refused"] += 1

    for seed in range(150):
        ours, theirs = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(served, ours)
            await theirs.send_all(mutated(seed))
            await trio.testing.wait_all_tasks_blocked()
            await theirs.aclose()
    assert outcomes["whole"] + outcomes["refused"] == 150
    assert all(outcomes[each] > 10 for each in ("whole", "refused", "requests")), outcomes


@pytest.mark.parametrize("garbage", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x16\x03\x01", bytes(range(256)) * 300])
async def test_garbage_from_an_agent_fails_the_calls_cleanly(
    garbage: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    async with connect(theirs) as client:
        await ours.send_all(garbage)
        with pytest.raises(LinkLost):
            await client.request("GET", "/", timeout=1000)


async def test_the_line_breaking_fails_the_calls_cleanly() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    async with connect(theirs) as client, trio.open_nursery() as nursery:

        async def call() -> None:
            with pytest.raises(LinkLost, match=r"broke|closed"):
                await client.request("GET", "/")

        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        await trio.aclose_forcefully(ours)


def test_a_farewell_from_a_peer_is_cut_to_size_and_cleaned() -> None:
    said = {"sentence": "evil\x1b[2Jtext" + "x" * 1000, "retry_after": 1e9}
    frame = GoAwayFrame(0, error_code=0, additional_data=msgspec.json.encode(said)[:1100])
    core = Core(client=True, limits=Limits(), now=NOW)
    (ended,) = core.receive_untrusted(SettingsFrame(0).serialize() + frame.serialize(), NOW)[1:]
    assert len(ended.said.sentence) <= 300  # type: ignore[union-attr]
    assert "\x1b" not in ended.said.sentence  # type: ignore[union-attr]
    assert ended.said.retry_after is None  # type: ignore[union-attr]


def test_a_budget_refills_with_time_and_no_further_than_its_capacity() -> None:
    budget = Budget(3, 2, NOW)
    assert [budget.spend(NOW) for _ in range(4)] == [True, True, True, False]
    assert [budget.spend(NOW + 1) for _ in range(3)] == [True, True, False]
    assert [budget.spend(NOW + 1000) for _ in range(4)] == [True, True, True, False]
    budget.earn(1)
    assert [budget.spend(NOW + 1000) for _ in range(2)] == [True, False]
