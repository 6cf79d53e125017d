"""A machine that gives no more threads or processes for a while: what needs one waits, says so, and goes on."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from agent.transfer.lane_processes import lane_forks
from protocol import threads
from protocol.threads import NoThread, check_room, wait_for_threads
from tests.agent.engine_inside import Engine, contents, quick_path

__all__ = ["quick_path"]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    # Put back at the end of the test.
    monkeypatch.setattr(trio.to_thread, "run_sync", trio.to_thread.run_sync)
    monkeypatch.setattr(threads, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(threads, "_lack", threads._Lack())
    # None of before is idle.
    monkeypatch.setattr(trio._core._thread_cache, "THREAD_CACHE", trio._core._thread_cache.ThreadCache())


def refuse(monkeypatch: pytest.MonkeyPatch, which: Callable[[threading.Thread], bool]) -> list[str]:
    """Threads that cannot be started, as long as ``which`` says so; their names."""
    start, refused = threading.Thread.start, list[str]()

    def starting(thread: threading.Thread) -> None:
        if which(thread):
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", starting)
    return refused


async def test_who_needs_a_thread_waits_until_there_is_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[int] = []
    wait_for_threads(lambda: told.append(1))
    refused = refuse(monkeypatch, lambda _: len(refused) < 3)
    with caplog.at_level(logging.WARNING, "towpath.threads"), trio.fail_after(10):
        assert await trio.to_thread.run_sync(lambda: 7) == 7
    assert len(refused) == 3
    assert ["no more threads" in record.getMessage() for record in caplog.records] == [True]
    assert told == [1]


async def test_who_waits_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for_threads()
    refused = refuse(monkeypatch, lambda _: True)
    with trio.move_on_after(0.05) as scope:
        await trio.to_thread.run_sync(lambda: 7)
    assert scope.cancelled_caught and refused


async def test_what_has_begun_is_not_begun_again() -> None:
    wait_for_threads()
    calls = []

    def fail() -> None:
        calls.append(1)
        raise RuntimeError("can't start new thread")

    with pytest.raises(RuntimeError, match="can't start"):
        await trio.to_thread.run_sync(fail)
    assert calls == [1]


def test_room_for_threads_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    check_room(3)
    before = threading.active_count()
    refused = refuse(monkeypatch, lambda _: threading.active_count() >= before + 2)
    with pytest.raises(NoThread):
        check_room(3)
    assert len(refused) == 1
    assert threading.active_count() == before


@pytest.mark.parametrize("name", ["sync", "fsync", "flush", "check"])
async def test_a_task_without_threads_says_so_and_goes_on(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Those of the settler; the worker ended by it, and its successor did."""
    engine = Engine(quick_path)
    for small in ("one", "two", "three"):
        (engine.source / small).write_bytes(b"small")
    (engine.source / "large").write_bytes(os.urandom(3 << 20))
    refused = refuse(monkeypatch, lambda thread: thread.name.partition("_")[0] == name and len(refused) < 2)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)
    assert [thread.partition("_")[0] for thread in refused] == [name, name]
    told = [event.details for event in engine.events if event.code == "BUSY"]
    assert told
    for details in told:
        assert details.startswith("No more threads or processes are to be had on the machine at the destination")


def test_a_session_has_as_many_lane_processes_as_there_are_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fork(*_: object) -> object:
        asked.append(1)
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(lane_forks, "fork_into", fork)
    monkeypatch.setattr(lane_forks, "FORKS", True)
    assert lane_forks.fork_lane_processes(3, close=-1) == []
    assert asked == [1]
