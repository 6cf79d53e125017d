"""Compression on lanes: when it pays, what a hostile frame can do, and what it leaves as it was."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import psutil
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from agent.limits.pace import Pace
from agent.transfer.basis import compression
from agent.transfer.basis.compression import Compression, Mode, compress, inflate_untrusted, offered, wanted
from agent.transfer.receiving.receive import LaneReceiver
from protocol import lane
from protocol.control import SessionAnswer, TaskItem, TaskOptions
from protocol.errors import ProtocolError
from protocol.session import MAX_BLOCK
from tests.agent.engine_inside import CHECKED, Engine, contents, quick_path
from tests.agent.engine_world import world

__all__ = ["quick_path"]

pytestmark = pytest.mark.skipif(not compression.usable(), reason="no zstd in this environment")

MIB = 1024 * 1024


class Road:
    """A network and a compressor of known speeds, and the time one block after the other takes."""

    def __init__(self, network: float, compressor: float, ratio: float) -> None:
        self.network, self.compressor, self.ratio = network, compressor, ratio
        self.now = 0.0
        self.squeezed = 0
        self.decider = Compression(self._squeeze, lambda: self.now)

    def _squeeze(self, content: compression.Buffer) -> bytes:
        self.squeezed += len(content)
        self.now += len(content) / self.compressor
        return bytes(int(len(content) * self.ratio))

    def send(self, blocks: int, mode: Mode = "auto") -> tuple[int, int]:
        """How many blocks went compressed, and bytes on the wire."""
        packed_blocks = wire = 0
        block = bytes(MIB)
        for _ in range(blocks):
            packed = self.decider.attempt(block, mode)
            size = MIB if packed is None else len(packed)
            packed_blocks += packed is not None
            seconds = size / self.network
            self.now += seconds
            self.decider.sent(size, seconds)
            wire += size
        return packed_blocks, wire


def test_content_that_compresses_goes_compressed_over_a_slow_network() -> None:
    packed, wire = Road(25e6, 300e6, 0.3).send(100)
    assert packed >= 95
    assert wire < 36 * MIB


def test_content_that_does_not_compress_costs_a_sample_now_and_then() -> None:
    path = Road(25e6, 300e6, 1.0)
    packed, wire = path.send(1000)
    assert (packed, wire) == (0, 1000 * MIB)
    assert path.squeezed < 25 * compression.SAMPLE


def test_a_fast_network_is_left_alone() -> None:
    path = Road(400e6, 300e6, 0.3)
    assert path.send(200)[0] == 0
    # Beyond what any compressor does not even a sample is tried.
    assert (path.squeezed > 0) and Road(2e9, 1e9, 0.1).send(200)[0] == 0


def test_it_stops_when_the_network_becomes_fast_and_begins_when_it_becomes_slow() -> None:
    path = Road(25e6, 300e6, 0.3)
    assert path.send(50)[0] > 45
    path.network = 1e9
    path.send(2500)
    assert path.send(100)[0] == 0
    path.network = 25e6
    path.send(150)
    assert path.send(100)[0] > 90


def test_it_stops_when_content_no_longer_compresses() -> None:
    path = Road(25e6, 300e6, 0.3)
    path.send(50)
    path.ratio = 1.0
    path.send(2)
    assert path.send(100) == (0, 100 * MIB)


def test_samples_that_promise_what_the_whole_does_not_keep_cost_little() -> None:
    path = Road(145e6, 300e6, 0.3)
    squeeze = path.decider._squeeze

    def slower_when_whole(content: compression.Buffer) -> bytes:
        path.compressor = 300e6 if len(content) <= compression.SAMPLE else 150e6
        return squeeze(content)

    path.decider._squeeze = slower_when_whole
    assert path.send(1000) == (0, 1000 * MIB)
    assert path.squeezed < 30 * MIB


def test_where_it_hardly_pays_the_looks_cost_little() -> None:
    """The machine's other work makes the compressor now fast, now slow."""
    random = Random(7)
    path = Road(145e6, 300e6, 0.3)
    squeeze = path.decider._squeeze

    def unsteady(content: compression.Buffer) -> bytes:
        path.compressor = random.choice((100e6, 300e6))
        return squeeze(content)

    path.decider._squeeze = unsteady
    blocks = 2000
    kept, _ = path.send(blocks)
    assert path.squeezed - kept * MIB < blocks * MIB // 10


def test_always_and_never() -> None:
    assert Road(2e9, 300e6, 0.3).send(10, "on")[0] == 10
    assert Road(2e9, 300e6, 1.0).send(10, "on")[0] == 0
    assert Road(25e6, 300e6, 0.3).send(10, "off") == (0, 10 * MIB)


def test_what_is_offered_is_what_is_understood() -> None:
    modes: tuple[Mode, ...] = ("auto", "on", "off")
    for mode in modes:
        assert wanted(offered(mode)) == mode
    # What an older destination says, and one of the future.
    assert wanted([]) == "off"
    assert wanted(["zstd", "something else"]) == "auto"


def test_a_frame_never_becomes_more_than_it_may() -> None:
    bomb = compress(bytes(64 * MIB))
    assert len(bomb) < 10_000
    assert inflate_untrusted(bomb, MIB) is None
    assert inflate_untrusted(bomb, MAX_BLOCK) is None
    assert inflate_untrusted(compress(bytes(MIB)), MIB) == bytes(MIB)


@given(st.binary(min_size=1, max_size=2000), st.integers(0, 3000))
def test_only_the_whole_content_counts(content: bytes, size: int) -> None:
    found = inflate_untrusted(compress(content), size)
    assert found == (content if size == len(content) else None)


@given(st.binary(min_size=1, max_size=500), st.integers(0, 10_000), st.integers(1, 255), st.binary(max_size=5))
def test_spoilt_frames_are_refused_or_hold_something_of_that_size(
    content: bytes, where: int, change: int, more: bytes
) -> None:
    frame = bytearray(compress(content) + more)
    frame[where % len(frame)] ^= change
    for data in (bytes(frame), bytes(frame[:where]), more):
        found = inflate_untrusted(data, len(content))
        assert found is None or len(found) == len(content)


def words(random: Random, size: int) -> bytes:
    return b" ".join(random.choice((b"lane", b"block", b"digest", b"source")) for _ in range(size // 5))[:size]


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
async def test_a_transfer_arrives_whatever_is_compressed(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    random = Random(7)
    engine = Engine(quick_path, options=msgspec.structs.replace(CHECKED, compression=mode))
    (engine.source / "folder").mkdir()
    for number in range(60):
        (engine.source / "folder" / f"{number}").write_bytes(words(random, 5000))
    (engine.source / "text").write_bytes(words(random, 6 * MIB + 11))
    (engine.source / "noise").write_bytes(os.urandom(3 * MIB))
    inflated: list[int] = []

    def inflate(data: compression.Buffer, size: int) -> bytes | None:
        inflated.append(size)
        # The first frame was spoilt where TLS does not see it.
        return None if len(inflated) == 1 else inflate_untrusted(data, size)

    monkeypatch.setattr(compression, "inflate_untrusted", inflate)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    assert observed.counters.bytes_transferred == observed.counters.bytes_total
    if mode == "on":
        assert sum(inflated) > 6 * MIB
        assert "VERIFY_CHECKSUM" in engine.codes()
    if mode == "off":
        assert not inflated


@pytest.mark.parametrize("whole", [10, 9, MAX_BLOCK + 1])
def test_compressed_content_of_an_impossible_size_ends_the_session(whole: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ProtocolError):
        nobody: Any = None
        receiver = LaneReceiver(1, ours, nobody, {}, queue.SimpleQueue(), nobody, Pace())  # type: ignore[arg-type]
        receiver._inflate(memoryview(bytes(10)), whole)


class BlockOfBefore(lane.Header, tag="b", frozen=True):
    """What an older peer knows of a block."""

    r: int
    offset: int
    digest: bytes
    last: bool = False


def test_older_peers_understand_each_other() -> None:
    sent = lane.encode_header(lane.Block(1, 2, b"d", True), 5)[lane.FRAME.size :]
    assert msgspec.msgpack.decode(sent, type=BlockOfBefore) == BlockOfBefore(1, 2, b"d", True)
    assert lane.header_untrusted(msgspec.msgpack.encode(BlockOfBefore(1, 2, b"d", True))) == lane.Block(
        1, 2, b"d", True
    )


class Counter:
    """Stands between the agents and counts what comes from the source."""

    def __init__(self) -> None:
        self.passed = self._port = 0
        self._target = ("", 0)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self._port = listeners[0].socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._forward, listeners)

    def detour(self, answer: SessionAnswer) -> SessionAnswer:
        candidate = answer.candidates[0]
        self._target = (candidate.host, candidate.port)
        instead = msgspec.structs.replace(candidate, host="127.0.0.1", port=self._port)
        return msgspec.structs.replace(answer, candidates=[instead])

    async def _forward(self, near: trio.SocketStream) -> None:
        try:
            far = await trio.open_tcp_stream(*self._target)
        except OSError:
            # The session that is asked for is over.
            await near.aclose()
            return
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(self._pass, near, far, False)
            await self._pass(far, near, True)
            nursery.cancel_scope.cancel()

    async def _pass(self, taken: trio.SocketStream, given: trio.SocketStream, count: bool) -> None:
        # A worker that is killed breaks its connections.
        with contextlib.suppress(trio.BrokenResourceError):
            async for data in taken:
                self.passed += len(data) if count else 0
                await given.send_all(data)


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["on", "auto", "off"])
async def test_real_workers_compress_and_go_on_when_killed(tmp_path: Path, mode: Mode) -> None:
    """All worker processes are killed in the middle; the wire carries what the mode says, and everything arrives."""
    random = Random(11)
    async with world(tmp_path) as made, trio.open_nursery() as nursery:
        counter = Counter()
        await nursery.start(counter.run)
        made.detour = counter.detour
        source = made.alpha.root
        (source / "folder").mkdir()
        for number in range(500):
            (source / "folder" / f"{number}").write_bytes(words(random, random.randrange(9000)))
        (source / "text").write_bytes(words(random, 4 * MIB) * 24)
        (source / "noise").write_bytes(os.urandom(24 * MIB + 5))
        options = TaskOptions(verify_checksum=True, preserve_timestamp=True, compression=mode)
        task = await made.submit([TaskItem(source_path="/", destination_path="/", recursive=True)], options)
        before = 0
        assert made.beta.service is not None
        with trio.fail_after(60):
            while before < 20 * MIB:
                await trio.sleep(0.01)
                before = made.beta.service.get_task(task).counters.bytes_transferred
        workers = psutil.Process().children(recursive=True)
        assert workers
        for process in workers:
            process.kill()
        observed = await made.wait(task, seconds=120)
        assert observed.state == "SUCCEEDED", observed
        assert contents(made.beta.root) == contents(source)
        again = observed.counters.bytes_sent_again
        nursery.cancel_scope.cancel()
    print(f"{mode}: {counter.passed / MIB:.1f} MiB on the wire, {again / MIB:.1f} MiB of content again, seed 11")
    assert again < 64 * MIB
    if mode == "on":
        assert counter.passed < 24 * MIB + again + 20 * MIB
    elif mode == "off":
        assert counter.passed > 120 * MIB
