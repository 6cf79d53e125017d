"""One bit changes on the way: in a lane below TLS, behind TLS, at the source while it is read. It is found and named,
only what it concerns is sent again, and nothing wrong has a final name. No peer may offer a weaker digest."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio

from agent.storage.base import Root
from agent.storage.faulty import FaultyRoot
from agent.storage.posix import open_root
from agent.transfer.source import send
from protocol import lane, session
from protocol.control import TaskItem, TaskOptions
from tests.agent.engine_inside import CHECKED, Engine, contents, quick_path
from tests.agent.engine_world import world
from tests.agent.flipping_proxy import FlippingProxy

__all__ = ["quick_path"]

pytestmark = pytest.mark.usefixtures("workers_forked")

MIB = 1024 * 1024


def fill(folder: Path, large: int = 5 * MIB + 3) -> None:
    (folder / "large").write_bytes(os.urandom(large))
    for number in range(40):
        (folder / f"small-{number}").write_bytes(os.urandom(5000 + number))


# --- below TLS -------------------------------------------------------------------------------------------


async def test_a_bit_flipped_below_tls_costs_a_lane_and_nothing_else(tmp_path: Path) -> None:
    size = 96 * MIB
    async with world(tmp_path) as made, trio.open_nursery() as nursery:
        fill(made.alpha.root, size)
        # The first lanes, and those that replace them.
        proxy = FlippingProxy(nursery, {1: 3 * MIB, 2: 2 * MIB, 3: MIB})
        assert made.alpha.service is not None
        for candidate in await made.alpha.service._node.network.host_candidates(loopback=True):
            await proxy.stand_before(candidate.host, candidate.port)
        made.detour = proxy.detour
        task = await made.submit([TaskItem(source_path="/", destination_path="/", recursive=True)])
        observed = await made.wait(task)
        assert observed.state == "SUCCEEDED", observed
        assert contents(made.beta.root) == contents(made.alpha.root)
        codes = Counter(event.code for event in made.events if event.kind == "event" and event.task_id == task)
        assert len(proxy.done) >= 2, proxy.connections
        # Each lane was replaced, and the session went on.
        assert codes["CONNECTION_LOST"] >= len(proxy.done)
        assert codes["VERIFY_CHECKSUM"] == 0
        assert "A lane to the source broke" in " ".join(event.details for event in made.events)
        # What was under way on the broken lanes.
        assert observed.counters.bytes_sent_again <= len(proxy.done) * 64 * MIB
        print(
            f"bits flipped below TLS: {len(proxy.done)} in {proxy.connections} connections, "
            f"lanes replaced: {codes['CONNECTION_LOST']}, bytes sent again: {observed.counters.bytes_sent_again}"
        )
        nursery.cancel_scope.cancel()


async def test_a_bit_flipped_in_the_control_stream_begins_the_session_anew(tmp_path: Path) -> None:
    async with world(tmp_path) as made, trio.open_nursery() as nursery:
        for folder in range(20):
            (made.alpha.root / str(folder)).mkdir()
            fill(made.alpha.root / str(folder), 2 * MIB)
        # Past the handshake, in the middle of the listings.
        proxy = FlippingProxy(nursery, {0: 8000})
        assert made.alpha.service is not None
        for candidate in await made.alpha.service._node.network.host_candidates(loopback=True):
            await proxy.stand_before(candidate.host, candidate.port)
        made.detour = proxy.detour
        task = await made.submit([TaskItem(source_path="/", destination_path="/", recursive=True)])
        observed = await made.wait(task)
        assert observed.state == "SUCCEEDED", observed
        assert proxy.done == [0]
        assert contents(made.beta.root) == contents(made.alpha.root)
        codes = Counter(event.code for event in made.events if event.kind == "event" and event.task_id == task)
        assert codes["CONNECTION_LOST"] >= 1
        nursery.cancel_scope.cancel()


# --- behind TLS ------------------------------------------------------------------------------------------


class Spoiler:
    """A sender that makes a digest of what it read and then sends something else, so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int, spoil: Callable[[bytes], bytes] | None = None):
        self.left = times
        self._spoil = spoil
        self._lock = threading.Lock()
        names = {name: getattr(lane, name) for name in dir(lane) if not name.startswith("__")}
        monkeypatch.setattr(send, "lane", SimpleNamespace(**{**names, "digest": self.digest}))

    def digest(self, data: memoryview) -> bytes:
        true = lane.digest(data)
        with self._lock:
            spoil = self.left > 0 and len(data) > 0
            self.left -= spoil
        if spoil and self._spoil is not None:
            return self._spoil(bytes(data))
        if spoil:
            data[len(data) // 3] ^= 1
        return true


@pytest.mark.parametrize(("times", "names"), [(1, "large"), (4, "large"), (1, "small"), (4, "small")])
async def test_a_bit_flipped_behind_tls_costs_one_block_or_file(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, names: str
) -> None:
    spoiler = Spoiler(monkeypatch, times)
    engine = Engine(quick_path)
    fill(engine.source)
    for path in engine.source.iterdir():
        if names not in path.name:
            path.unlink()
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert spoiler.left == 0
    assert contents(engine.destination) == contents(engine.source)
    assert Counter(engine.codes())["VERIFY_CHECKSUM"] == times
    # One session, one lane, one file or block again for each.
    assert engine.sessions == 1
    assert observed.counters.bytes_sent_again <= times * MIB
    told = [event.details for event in engine.events if event.code == "VERIFY_CHECKSUM"]
    assert all("from the source" in details and "(source owner)" in details and names in details for details in told)
    print(f"bits flipped behind TLS: {times}, found: {times}, bytes sent again: {observed.counters.bytes_sent_again}")


class Misreading(FaultyRoot):
    """Storage that gives one flipped bit now and then: each n-th read with content comes wrong."""

    def __init__(self, inner: Root, every: int) -> None:
        super().__init__(inner)
        self.every, self.reads, self.wrong = every, 0, 0

    def preadv(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        count = super().preadv(descriptor, buffers, offset)
        if count:
            self.reads += 1
            if self.reads % self.every == 0:
                self.wrong += 1
                buffers[0][count // 3] ^= 4
        return count


@pytest.mark.parametrize("read_twice", [True, False])
async def test_a_misread_at_the_source_is_found_by_reading_twice(quick_path: Path, read_twice: bool) -> None:
    """Everything that comes after agrees with what was read, so that without a second read it is not found: the test
    shows that as well."""
    engine = Engine(quick_path, read_twice=read_twice)
    fill(engine.source)
    roots: list[Misreading] = []

    def misreading() -> FaultyRoot:
        roots.append(Misreading(open_root(str(engine.source)), 17))
        return roots[-1]

    engine.source_root = misreading  # type: ignore[method-assign]
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    wrong, told = sum(root.wrong for root in roots), Counter(engine.codes())["SOURCE_MISREAD"]
    print(f"misreads at the source: {wrong}, found: {told}, reads: {sum(root.reads for root in roots)}")
    assert wrong
    if read_twice:
        assert contents(engine.destination) == contents(engine.source)
        # Two reads are compared: either of them may be the wrong one.
        assert told == wrong
        assert any("(source owner)" in event.details for event in engine.events if event.code == "SOURCE_MISREAD")
    else:
        assert contents(engine.destination) != contents(engine.source)
        assert not told


WEAKER = {
    "none": lambda _data: b"",
    "MD5": lambda data: hashlib.md5(data, usedforsecurity=False).digest(),
    "SHA-256": lambda data: hashlib.sha256(data).digest(),
    "half": lambda data: lane.digest(data)[:16],
    "longer": lambda data: lane.digest(data) + b"\0",
    "zeros": lambda _data: bytes(32),
}


@pytest.mark.parametrize("weaker", WEAKER)
async def test_a_source_that_offers_a_weaker_digest_or_none_is_refused(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, weaker: str
) -> None:
    """There is one digest, and nothing to negotiate: what does not match it has no final name, however often."""
    Spoiler(monkeypatch, 10**9, WEAKER[weaker])
    engine = Engine(quick_path)
    (engine.source / "large").write_bytes(os.urandom(2 * MIB))
    (engine.source / "small").write_bytes(b"small")
    observed = await engine.run()
    assert (observed.state, observed.error_code, observed.counters.failed) == ("FAILED", "ITEMS_FAILED", 2)
    assert contents(engine.destination) == {}
    assert Counter(engine.codes())["VERIFY_CHECKSUM"] >= 2
    # Not without end, and not by beginning anew.
    assert engine.sessions == 1


async def test_a_source_cannot_talk_a_destination_out_of_comparing(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A digest of a whole file counts only when it is the one that was asked for."""
    engine = Engine(quick_path, msgspec.structs.replace(CHECKED, sync_level=3))
    (engine.source / "file").write_bytes(b"new content")
    (engine.destination / "file").write_bytes(b"old content")
    for answer in ("", "0", lane.digest(b"old content").hex()[:32], lane.digest(b"old content").hex().upper()):

        def digested(_root: Any, _path: Any, _request: session.DigestFile, answer: str = answer) -> str:
            return answer

        monkeypatch.setattr("agent.transfer.source.source_files.digest", digested)
        again = Engine(quick_path / f"digest-{len(answer)}", engine.options)
        again.source, again.destination = engine.source, engine.destination
        (engine.destination / "file").write_bytes(b"old content")
        assert (await again.run()).state == "SUCCEEDED"
        assert (engine.destination / "file").read_bytes() == b"new content", answer


async def test_abilities_that_would_weaken_the_session_mean_nothing(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = session.HelloAnswer

    def welcome(**fields: Any) -> session.HelloAnswer:
        return original(**{**fields, "abilities": ["no digests", "md5", "digests optional", *fields["abilities"]]})

    monkeypatch.setattr("agent.transfer.source.serve.session.HelloAnswer", welcome)
    monkeypatch.setattr("agent.transfer.asking.source_session.session.HelloAnswer", original)
    spoiler = Spoiler(monkeypatch, 1)
    engine = Engine(quick_path)
    fill(engine.source)
    assert (await engine.run()).state == "SUCCEEDED"
    assert spoiler.left == 0
    assert contents(engine.destination) == contents(engine.source)


# --- at the source ---------------------------------------------------------------------------------------


class Misread(Engine):
    """The source's disk gives one wrong bit when it is read, so many times, and nothing tells."""

    times = 1

    def source_root(self) -> Root:
        root = super().source_root()
        preadv = root.preadv

        def misreading(fd: int, buffers: Sequence[bytearray | memoryview], offset: int) -> int:
            count = preadv(fd, buffers, offset)
            if count and self.times > 0:
                self.times -= 1
                buffers[0][count // 2] ^= 1
            return count

        root.preadv = misreading  # type: ignore[method-assign]
        return root


def item(path: Path, algorithm: str, value: str) -> TaskItem:
    return TaskItem(
        source_path=f"/{path.name}",
        destination_path=f"/{path.name}",
        external_checksum=value,
        checksum_algorithm=algorithm,
    )


@pytest.mark.parametrize("size", [3000, 3 * MIB])
async def test_a_bit_misread_at_the_source_is_found_by_a_given_checksum_and_read_again(
    quick_path: Path, size: int
) -> None:
    engine = Misread(quick_path, msgspec.structs.replace(CHECKED, preserve_timestamp=False), items=[])
    path = engine.source / "file"
    path.write_bytes(os.urandom(size))
    engine.items = [item(path, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())]
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert engine.times == 0
    assert contents(engine.destination) == contents(engine.source)
    told = [event for event in engine.events if event.code == "VERIFY_CHECKSUM"]
    assert len(told) == 1
    assert "file" in told[0].details
    assert "(source owner)" in told[0].details
    assert "PART_LOST" not in engine.codes()


async def test_other_content_than_was_given_is_read_twice_and_no_more(quick_path: Path) -> None:
    engine = Engine(quick_path, TaskOptions(verify_checksum=True), items=[])
    path = engine.source / "file"
    path.write_bytes(b"other content")
    engine.items = [item(path, "MD5", hashlib.md5(b"content", usedforsecurity=False).hexdigest())]
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 1)
    assert Counter(engine.codes())["VERIFY_CHECKSUM"] == 2
    assert contents(engine.destination) == {}
    assert engine.temporaries() == []


@pytest.mark.parametrize(
    ("algorithm", "value"),
    [
        ("MD5", "d41d8cd98f00b204e9800998ecf8427"),
        ("SHA1", "d41d8cd98f00b204e9800998ecf8427e"),
        ("SHA256", ""),
        ("XXH3-128", "g" * 32),
        (None, "0" * 40),
    ],
)
async def test_a_checksum_that_its_algorithm_cannot_have_is_refused_before_anything_is_sent(
    quick_path: Path, algorithm: str | None, value: str
) -> None:
    engine = Engine(quick_path, items=[])
    path = engine.source / "file"
    path.write_bytes(b"")
    engine.items = [item(path, algorithm or "MD5", value)]
    if algorithm is None:
        engine.items = [msgspec.structs.replace(engine.items[0], checksum_algorithm=None)]
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 1)
    assert "BAD_CHECKSUM" in engine.codes()
    assert contents(engine.destination) == {}
