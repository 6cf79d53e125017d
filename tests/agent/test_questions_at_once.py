"""A destination that asks its source more than it waits for answers to: what is worked on there is bounded."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import trio
import trio.testing

from agent.storage.posix import open_root
from agent.transfer.source import lane_queues, serve
from agent.transfer.source.serve import QUESTIONS_AT_ONCE, Control, SourceSide
from protocol import session
from protocol.errors import ProtocolError
from tests.agent.engine_inside import OpenPolicy

QUESTIONS = 500


async def test_questions_wait_where_they_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = most = answered = 0
    go_on = trio.Event()
    real = serve._QUESTIONS[session.StatPaths]

    async def slowly(control: Control, request: session.StatPaths) -> None:
        nonlocal now, most, answered
        now += 1
        most = max(most, now)
        await go_on.wait()
        await real(control, request)
        now -= 1
        answered += 1

    monkeypatch.setitem(serve._QUESTIONS, session.StatPaths, slowly)
    (tmp_path / "file").write_bytes(b"")
    ours, theirs = trio.testing.memory_stream_pair()
    with open_root(os.fspath(tmp_path)) as root:
        side = SourceSide(root, OpenPolicy(), None)  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: side.serve_control(theirs, "", ahead=True))
            greeting = session.Hello("", b"i" * 16)
            await ours.send_all(session.encode(greeting))
            for number in range(QUESTIONS):
                await ours.send_all(session.encode(session.StatPaths(number, [b"file"])))
            await trio.testing.wait_all_tasks_blocked()
            assert now == QUESTIONS_AT_ONCE
            go_on.set()
            while answered < QUESTIONS:
                await trio.sleep(0)
            assert most == QUESTIONS_AT_ONCE
            await ours.aclose()


@pytest.mark.parametrize("same", [True, False], ids=["one number", "many numbers"])
async def test_listings_are_bounded_whatever_their_numbers(tmp_path: Path, *, same: bool) -> None:
    """Each holds a folder open until its rows are taken."""
    (tmp_path / "file").write_bytes(b"")
    for number in range(session.ROWS_IN_MESSAGE * (session.LISTING_WINDOW + 1)):
        (tmp_path / f"{number}").touch()
    ours, theirs = trio.testing.memory_stream_pair()
    refused: list[ProtocolError] = []

    async def serve_it() -> None:
        try:
            await side.serve_control(theirs, "", ahead=True)
        except* ProtocolError as group:
            refused.extend(error for error in group.exceptions if isinstance(error, ProtocolError))

    with open_root(os.fspath(tmp_path)) as root:
        side = SourceSide(root, OpenPolicy(), None)  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_it)
            await ours.send_all(session.encode(session.Hello("", b"i" * 16)))
            # It may be refused before all of them are sent.
            with contextlib.suppress(trio.BrokenResourceError):
                for number in range(1, 40):
                    await ours.send_all(session.encode(session.ListDirectory(1 if same else number, b"")))
            with trio.fail_after(10):
                while not refused:
                    await trio.sleep(0.01)
            await ours.aclose()
    assert "listings" in refused[0].sentence


async def test_what_waits_for_lanes_is_bounded_by_the_memory_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred thousand requests may each name a thousand files with long paths."""
    monkeypatch.setattr(lane_queues, "MAX_WAITING_BYTES", 1 << 20)
    version = (0, 0, 0, 0, 0)
    ours, theirs = trio.testing.memory_stream_pair()
    with open_root(os.fspath(tmp_path)) as root:
        side = SourceSide(root, OpenPolicy(), None)  # type: ignore[arg-type]
        control = Control(side, theirs, ahead=True)
        lane = control.lanes.add(1, None)  # type: ignore[arg-type]

        async def fill(name: bytes) -> int:
            for number in range(10_000):
                try:
                    files = [session.PackFile(name, version)]
                    await control._queue_for_lane(session.ReadPack(number, 1, b"", files))
                except ProtocolError:
                    return number
            raise AssertionError("no bound")

        short = await fill(b"file")
        assert 500 < short < 1000
        # What was taken counts no more.
        for _ in range(short):
            assert lane.get() is not None
        assert lane.size == 0
        assert await fill(b"a/" * 1000 + b"file") < short / 40
    await ours.aclose()
