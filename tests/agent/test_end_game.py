"""The end of a transfer: what a slow lane still has is asked for again elsewhere, and what comes twice counts once."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from collections import Counter, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.limits.pace import Pace
from agent.transfer.asking import end_game
from agent.transfer.asking.fetch import Fetcher
from agent.transfer.asking.ranges import LANE_WINDOW
from agent.transfer.basis.jobs import FileJob, LargeFile, PackArrived, PackRequest, RangeRequest
from agent.transfer.receiving import lane_count, lanes
from agent.transfer.receiving.receive import LaneReceiver
from protocol import lane
from protocol.errors import RetryLater, TowpathError
from protocol.session import Abandon, ReadPack, ReadRange, Row
from tests.agent import engine_inside
from tests.agent.engine_inside import InRecords, quick_path

__all__ = ["quick_path"]

BLOCK = 64 * 1024


class Disk:
    """Takes writes and counts them."""

    def __init__(self) -> None:
        self.written: Counter[int] = Counter()

    def pwrite(self, _descriptor: int, data: memoryview, offset: int) -> int:
        self.written[offset] += 1
        return len(data)


class Scene:
    """A fetcher, its lanes' receivers, and a source that delivers one frame when it is told to. It is the fetcher's
    session and the receivers' reports, too."""

    def __init__(self, *, honours_abandon: bool, in_memory: bool = False) -> None:
        self.disk = Disk()
        self.now = 0.0
        self.lost = self.given_back = 0
        self.failed_jobs: list[FileJob] = []
        self.settle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.jobs: Counter[int] = Counter()
        self.idle_files = 0
        self._number = 0
        self._honours = honours_abandon
        self.abandoned: set[int] = set()
        self.asked: dict[int, deque[list[lane.AnyHeader]]] = {}
        self.receivers: dict[int, LaneReceiver] = {}
        self.fetcher = Fetcher(
            self,  # type: ignore[arg-type]
            on_range_lost=self._on_lost,
            on_file_idle=self._on_idle,
            on_job_failed=lambda job, _error: self.failed_jobs.append(job),
            on_hungry=lambda: None,
            in_memory=in_memory,
        )
        self.file = LargeFile(None, b"t", 3, BLOCK, bytearray(), 0)  # type: ignore[arg-type]

    def _on_lost(self, _file: LargeFile, size: int) -> None:
        self.lost += size

    def _on_idle(self, _file: LargeFile) -> None:
        self.idle_files += 1

    # --- as session ---
    def number(self) -> int:
        self._number += 1
        return self._number

    def post(self, message: Any) -> None:
        if isinstance(message, Abandon):
            self.abandoned.add(message.r)
        elif isinstance(message, ReadRange):
            offsets = range(message.offset, message.offset + message.length, BLOCK)
            end = message.offset + message.length
            frames: list[lane.AnyHeader] = [
                lane.Block(message.r, offset, DIGEST, offset + BLOCK >= end) for offset in offsets
            ]
            self.asked[message.lane].append(frames)
        elif isinstance(message, ReadPack):
            count = len(message.files)
            halves = [range(count // 2), range(count // 2, count)] if count > 1 else [range(count)]
            packs: list[lane.AnyHeader] = [
                lane.Pack(message.r, [lane.Packed(index, 8, SMALL_DIGEST) for index in half], half[-1] == count - 1)
                for half in halves
            ]
            self.asked[message.lane].append(packs)

    # --- as reports ---
    def request_done(self, number: int, r: int) -> None:
        self.fetcher.done(number, r)

    def request_failed(self, number: int, r: int, error: TowpathError) -> None:
        self.fetcher.failed(number, r, error)

    def job_failed(self, job: FileJob, _error: TowpathError) -> None:
        self.failed_jobs.append(job)

    def received(self, _size: int) -> None:
        return

    def blocks_settled(self, size: int) -> None:
        self.given_back += size

    def file_failed(self, *_: object) -> None:
        raise AssertionError

    def block_damaged(self, *_: object) -> None:
        raise AssertionError

    # --- what happens ---
    def open(self, number: int) -> None:
        ours, theirs = socket.socketpair()
        ours.close()
        theirs.close()
        root: Any = self.disk
        receiver = LaneReceiver(
            number,
            ours,  # type: ignore[arg-type]
            root,
            self.fetcher.requests,
            self.settle,
            self,
            Pace(),
        )
        self.receivers[number] = receiver
        self.asked[number] = deque()
        self.fetcher.add_lane(number, receiver.meter)

    def deliver(self, number: int) -> bool:
        """The next frame of a lane; False when it has none."""
        waiting = self.asked[number]
        if not waiting:
            return False
        receiver, frames = self.receivers[number], waiting[0]
        header: Any = frames[0]
        if self._honours and header.r in self.abandoned:
            waiting.popleft()
            self.request_failed(number, header.r, RetryLater("withdrawn"))
            return True
        frames.pop(0)
        if not frames:
            waiting.popleft()
        if isinstance(header, lane.Block):
            receiver.meter.content += BLOCK
            receiver._block(header, memoryview(CONTENT))
        else:
            receiver.meter.content += 8 * len(header.files)
            receiver._pack(header, memoryview(SMALL * len(header.files)))
        return True

    def fail(self, number: int) -> None:
        """The source cannot serve what comes next on a lane."""
        waiting = self.asked[number]
        if waiting:
            header: Any = waiting.popleft()[0]
            self.request_failed(number, header.r, RetryLater("changed"))

    def close(self, number: int) -> None:
        del self.receivers[number], self.asked[number]
        self.fetcher.drop_lane(number)

    def tick(self) -> None:
        self.now += 0.5
        self.fetcher.measure(self.now)

    def take(self, step: str, number: int) -> None:
        """One of `STEPS`, where it makes sense for that lane now."""
        up = number in self.receivers
        if step == "deliver" and up:
            self.deliver(number)
        elif step == "close" and up:
            self.close(number)
        elif step == "open" and not up:
            self.open(number)
        elif step == "tick":
            self.tick()

    def finish(self) -> None:
        """Have everything come that was asked for."""
        if not self.receivers:
            self.open(1)
        while any(self.deliver(number) for number in list(self.receivers)):
            pass

    def took(self) -> None:
        while not self.settle.empty():
            message = self.settle.get()
            if isinstance(message, PackArrived):
                self.jobs.update(id(job) for job in message.jobs)


CONTENT = bytes(BLOCK)
DIGEST = lane.digest(CONTENT)
SMALL = b"12345678"
SMALL_DIGEST = lane.digest(SMALL)


class _Row:
    size = 40 * BLOCK
    version = (0, 0, 40 * BLOCK, 0, 0)


class _Job:
    row = _Row
    source_path = b"large"
    follow = False


class _Group:
    source = b""


def _small_jobs(count: int) -> list[FileJob]:
    row = Row(b"s", 0, 8, 0, 0, 0, 0, 0)
    return [FileJob(_Group, 0, row, b"s%d" % number, b"s", False) for number in range(count)]  # type: ignore[arg-type]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["deliver"]), st.integers(1, 3)),
        st.tuples(st.sampled_from(["deliver", "close", "open", "tick"]), st.integers(1, 3)),
    ),
    max_size=150,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS, st.booleans(), st.integers(1, 5))
def test_every_block_and_file_counts_once_whatever_lanes_do(
    steps: list[tuple[str, int]], honours: bool, ranges: int
) -> None:
    scene = Scene(honours_abandon=honours)
    scene.file.job = _Job  # type: ignore[assignment]
    for number in (1, 2):
        scene.open(number)
    for index in range(ranges):
        scene.fetcher.submit_range(scene.file, index * 8 * BLOCK, 8 * BLOCK)
    jobs = _small_jobs(7)
    scene.fetcher.submit_pack(jobs)
    for step, number in steps:
        scene.take(step, number)
    scene.finish()
    scene.took()
    assert scene.disk.written == Counter({offset * BLOCK: 1 for offset in range(8 * ranges)})
    assert sorted(scene.file.unchecked) == list(range(8 * ranges))
    assert scene.jobs == Counter(id(job) for job in jobs)
    assert (scene.lost, scene.given_back, scene.failed_jobs) == (0, 0, [])
    assert scene.fetcher.idle
    assert scene.file.open_ranges == 0


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS, st.booleans(), st.integers(0, 60), st.integers(1, 3))
def test_what_a_failed_file_had_reserved_is_given_back_exactly(
    steps: list[tuple[str, int]], honours: bool, when: int, where: int
) -> None:
    scene = Scene(honours_abandon=honours)
    scene.file.job = _Job  # type: ignore[assignment]
    for number in (1, 2):
        scene.open(number)
    for index in range(4):
        scene.fetcher.submit_range(scene.file, index * 8 * BLOCK, 8 * BLOCK)
    for at, (step, number) in enumerate(steps):
        if at == when and where in scene.receivers:
            scene.fail(where)
        else:
            scene.take(step, number)
    scene.finish()
    # What was written before the failure is given back by whoever closes the file.
    assert len(scene.file.unchecked) * BLOCK + scene.lost + scene.given_back == 32 * BLOCK
    assert scene.file.open_ranges == 0


def _slow_and_idle(*, honours: bool = True) -> Scene:
    """Lane 1 delivers a block every two seconds, lane 2 has done its part."""
    scene = Scene(honours_abandon=honours)
    scene.file.job = _Job  # type: ignore[assignment]
    for number in (1, 2):
        scene.open(number)
    for index in range(2):
        scene.fetcher.submit_range(scene.file, index * 8 * BLOCK, 8 * BLOCK)
    scene.tick()
    for step in range(4):
        for _ in range(2):
            scene.deliver(2)
        if not step % 2:
            scene.deliver(1)
        scene.tick()
    return scene


def test_an_idle_lane_takes_over_what_a_slow_one_has() -> None:
    scene = _slow_and_idle()
    assert not scene.asked[2]
    for _ in range(4):
        scene.tick()
    assert scene.fetcher.rescued == 1
    while scene.deliver(2):
        pass
    # Everything is there, although lane 1 has delivered a quarter of its range.
    assert len(scene.file.unchecked) == 16
    (withdrawn,) = scene.abandoned
    assert withdrawn not in scene.fetcher.requests
    # Until the slow lane's thread is surely done with the file, the file is not taken for idle.
    assert scene.file.open_ranges == 1
    assert scene.deliver(1)
    assert scene.file.open_ranges == 0
    assert scene.disk.written.total() == 16


def test_what_a_slow_lane_cannot_get_any_more_is_the_other_ones() -> None:
    """The other one may have brought the last of the file, which has its name then: it must not be tried again, too."""
    scene = _slow_and_idle()
    while not scene.fetcher.rescued:
        scene.tick()
    scene.deliver(2)
    scene.fail(1)
    assert not scene.file.failed
    while scene.deliver(2):
        pass
    assert len(scene.file.unchecked) == 16
    assert (scene.file.failed, scene.file.error, scene.file.open_ranges) == (False, None, 0)
    assert (scene.lost, scene.given_back) == (0, 0)


def test_equal_lanes_do_not_ask_twice() -> None:
    scene = Scene(honours_abandon=True)
    scene.file.job = _Job  # type: ignore[assignment]
    for number in (1, 2):
        scene.open(number)
    for index in range(4):
        scene.fetcher.submit_range(scene.file, index * 8 * BLOCK, 8 * BLOCK)
    for _ in range(16):
        scene.deliver(1)
        scene.deliver(2)
        scene.tick()
    assert scene.fetcher.rescued == 0


def test_a_lane_from_which_nothing_comes_is_given_up_only_while_others_move() -> None:
    scene = Scene(honours_abandon=True)
    scene.file.job = _Job  # type: ignore[assignment]
    for number in (1, 2):
        scene.open(number)
    for index in range(5):
        scene.fetcher.submit_range(scene.file, index * 8 * BLOCK, 8 * BLOCK)
    for _ in range(60):
        scene.now += 1
        assert scene.fetcher.measure(scene.now) == []
    for _ in range(int(end_game.STALLED) + 2):
        scene.now += 1
        stalled = scene.fetcher.measure(scene.now)
    assert stalled == []
    scene.deliver(2)
    scene.now += 1
    assert scene.fetcher.measure(scene.now) == [1]


# --- the whole engine ----------------------------------------------------------------------------------------


def _throttled(slow: socket.socket, rate: int, cut: threading.Event, threads: list[threading.Thread]) -> socket.socket:
    """Another end of a connection, through which bytes come towards it at a low rate."""
    near, far = socket.socketpair()

    def forth() -> None:
        with contextlib.suppress(OSError):
            while not cut.is_set() and (data := slow.recv(rate // 20)):
                near.sendall(data)
                cut.wait(1 / 20)
        for each in (near, slow):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        threads[-1].join(10)
        near.close()
        slow.close()

    def back() -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(4096):
                slow.sendall(data)
        with contextlib.suppress(OSError):
            slow.shutdown(socket.SHUT_RDWR)

    threads += [threading.Thread(target=target, daemon=True) for target in (forth, back)]
    for thread in threads:
        thread.start()
    return far


async def test_the_tail_is_not_one_slow_lane(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "MEASURE_EVERY", 0.02)
    monkeypatch.setattr(lane_count, "SPAN", 0.02)
    monkeypatch.setattr(lane_count, "GAIN", 0.0)
    monkeypatch.setattr(end_game, "LEAST_WAIT", 0.1)
    engine = engine_inside.Engine(quick_path, lanes_wanted=2)
    content = os.urandom(96 * 1024 * 1024)
    (engine.source / "large").write_bytes(content)
    cut = threading.Event()
    plain = engine_inside.Line.lane
    opened = 0
    threads: list[threading.Thread] = []

    async def lane_of(line: Any) -> socket.socket:
        nonlocal opened
        sock: socket.socket = await plain(line)
        opened += 1
        # At this rate one range takes more than a minute.
        return InRecords(_throttled(sock, 60_000, cut, threads)) if opened == 1 else sock

    monkeypatch.setattr(engine_inside.Line, "lane", lane_of)
    began = time.monotonic()
    try:
        observed = await engine.run(60)
    finally:
        cut.set()
        for thread in threads:
            thread.join(10)
    assert observed.state == "SUCCEEDED", observed
    assert (engine.destination / "large").read_bytes() == content
    assert observed.counters.bytes_transferred == len(content)
    assert time.monotonic() - began < 60


def test_what_waits_goes_on_when_a_request_is_left_whose_last_block_has_come() -> None:
    """The last block and the word that the request is left cross, and the lane had nothing to do from then on, however
    much there was."""
    scene = Scene(honours_abandon=True)
    scene.file.job = _Job  # type: ignore[assignment]
    left: list[int] = []
    elsewhere: Any = SimpleNamespace(expect=lambda _request: None, withdraw=left.append)
    for number in (1, 2):
        scene.asked[number] = deque()
        scene.fetcher.add_lane(number, SimpleNamespace(content=0), elsewhere)
        if number == 1:
            scene.fetcher.submit_range(scene.file, 0, LANE_WINDOW)
    while not left:
        scene.tick()
    scene.fetcher.drop_lane(2)
    scene.fetcher.submit_pack(_small_jobs(2))
    (request,) = scene.fetcher.outstanding(1)
    assert left == [request.r]
    assert isinstance(request, RangeRequest)
    request.arrived = request.length
    scene.fetcher.relinquished(1, request.r)
    scene.fetcher.done(1, request.r)
    assert [type(request) for request in scene.fetcher.outstanding(1)] == [PackRequest]
    assert (scene.file.open_ranges, scene.idle_files) == (0, 1)
