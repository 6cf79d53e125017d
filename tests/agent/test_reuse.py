"""Large files that changed: what is the same is copied here, what is not is sent, and the result is the source's."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.storage.faulty import Call, fail_nth
from agent.transfer.reuse import SAMPLES, Reuse
from tests.agent.engine_inside import Crashed, Engine, contents, quick_path

__all__ = ["quick_path"]

MIB = 1024 * 1024
SIZE = 40 * MIB + 12345
OLD = os.urandom(SIZE)


def flip(body: bytearray) -> None:
    for place in (5 * MIB, 17 * MIB + 1, SIZE - 1):
        body[place] ^= 1


def append(body: bytearray) -> None:
    body += os.urandom(2 * MIB)


def cut(body: bytearray) -> None:
    del body[20 * MIB :]


def touch(_body: bytearray) -> None:
    return


def all_else(body: bytearray) -> None:
    body[:] = os.urandom(SIZE)


CASES = [(flip, 3 * MIB), (append, 3 * MIB), (cut, 0), (touch, 0), (all_else, SIZE)]


@pytest.mark.parametrize(("change", "most"), CASES)
async def test_only_what_differs_is_sent(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytearray], None], most: int
) -> None:
    asked: list[int] = []
    digests = Reuse._digests

    async def counting(self: Reuse, first: int, count: int) -> list[bytes]:
        asked.append(count)
        return await digests(self, first, count)

    monkeypatch.setattr(Reuse, "_digests", counting)
    engine = Engine(quick_path)
    body = bytearray(OLD)
    change(body)
    (engine.source / "file").write_bytes(body)
    (engine.destination / "file").write_bytes(OLD)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    received = int.from_bytes((engine.state / "received").read_bytes()[:8], "little")
    assert received <= most
    assert observed.counters.bytes_transferred == len(body)
    assert engine.temporaries() == []
    if change is all_else:
        # Digests of all blocks would cost the source as much as sending them, for nothing.
        assert sum(asked) <= SAMPLES + 1
    print(f"{change.__name__}: {len(body)} bytes, {received} sent, digests asked for: {sum(asked)}")


async def changed(base: Path, **fields: object) -> Engine:
    engine = Engine(base, **fields)  # type: ignore[arg-type]
    body = bytearray(OLD)
    flip(body)
    (engine.source / "file").write_bytes(body)
    (engine.destination / "file").write_bytes(OLD)
    return engine


async def test_crashes_and_faults_on_the_way(quick_path: Path) -> None:
    plain = await changed(quick_path / "plain")
    await plain.run()
    numbers = range(1, len(plain.calls), 37)
    for number in numbers:

        def die(call: Call, number: int = number) -> int | None:
            if call.number == number:
                raise Crashed
            return None

        for plan in (die, fail_nth(number, errno.EIO)):
            engine = await changed(quick_path / f"{number} {plan is die}", plan=plan)
            try:
                await engine.run()
            except Crashed:
                assert (engine.destination / "file").read_bytes() in (OLD, (engine.source / "file").read_bytes())
                engine = engine.revived()
                await engine.run()
            assert contents(engine.destination) == contents(engine.source), number
            assert engine.temporaries() == []
    print(f"calls: {len(plain.calls)}, crashes and faults: {2 * len(numbers)}")
