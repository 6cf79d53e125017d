"""Few threads look at storage that answers at once, many at one that has to be waited for."""

from __future__ import annotations

import itertools
import sys
import threading
from functools import partial

import pytest
import trio
import trio.testing

from agent.transfer.basis import storage_threads
from agent.transfer.basis.storage_threads import CALM, StorageThreads

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts reads by thread")
PATIENCE = 10.0


async def _held(threads: StorageThreads, nursery: trio.Nursery) -> threading.Event:
    """Keep a thread busy until the event is set."""
    begun, go = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert go.wait(PATIENCE)

    nursery.start_soon(threads.run, hold)
    await trio.to_thread.run_sync(begun.wait, PATIENCE)
    return go


async def test_one_thread_does_what_several_ask_of_a_fast_file_system() -> None:
    threads = StorageThreads("tmpfs")
    idents: list[int] = []
    answers: dict[int, int] = {}

    def look(number: int) -> int:
        idents.append(threading.get_ident())
        return number * number

    async def ask(number: int) -> None:
        answers[number] = await threads.run(partial(look, number))

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            go = await _held(threads, nursery)
            for number in range(20):
                nursery.start_soon(ask, number)
            await trio.testing.wait_all_tasks_blocked()
            go.set()
    assert answers == {number: number * number for number in range(20)}
    assert len(idents) == 20
    assert len(set(idents)) == 1


async def _side_by_side(threads: StorageThreads) -> int:
    """In how many threads four calls are that wait for each other."""
    barrier = threading.Barrier(4)
    idents = set[int]()

    def meet() -> None:
        barrier.wait(PATIENCE)
        idents.add(threading.get_ident())

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(threads.run, meet)
    return len(idents)


async def test_a_thread_each_for_what_may_have_to_be_waited_for() -> None:
    assert await _side_by_side(StorageThreads("nfs4")) == 4


async def test_more_threads_once_the_disk_was_waited_for_and_one_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = StorageThreads("ext4")
    reads = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(storage_threads, "_reads", lambda: next(reads))
        await threads.run(lambda: None)
    assert await _side_by_side(threads) == 4
    for _ in range(CALM):
        await threads.run(lambda: None)
    idents: list[int] = []
    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            go = await _held(threads, nursery)
            for _ in range(4):
                nursery.start_soon(threads.run, lambda: idents.append(threading.get_ident()))
            await trio.testing.wait_all_tasks_blocked()
            assert not idents
            go.set()
    assert len(set(idents)) == 1


async def test_an_error_goes_to_who_asked() -> None:
    threads = StorageThreads("tmpfs")
    answers: list[int] = []

    def fail() -> None:
        raise FileNotFoundError

    async def ask_in_vain() -> None:
        with pytest.raises(FileNotFoundError):
            await threads.run(fail)

    async def ask() -> None:
        answers.append(await threads.run(lambda: 1))

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            go = await _held(threads, nursery)
            nursery.start_soon(ask_in_vain)
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            go.set()
    assert answers == [1]


async def test_what_is_cancelled_is_not_begun_and_what_has_begun_is_waited_for() -> None:
    threads = StorageThreads("tmpfs")
    done: list[str] = []
    begun, go = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert go.wait(PATIENCE)
        done.append("begun")

    async def ask(scope: trio.CancelScope, ended: list[str]) -> None:
        with scope:
            await threads.run(work)
        ended.append("ended")

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            first = await _held(threads, nursery)
            running, waiting = trio.CancelScope(), trio.CancelScope()
            ended: list[str] = []
            # Not the one that has the thread: what it asked is done by the thread of another.
            nursery.start_soon(ask, running, ended)
            await trio.testing.wait_all_tasks_blocked()
            first.set()
            await trio.to_thread.run_sync(begun.wait, PATIENCE)

            async def never() -> None:
                with waiting:
                    await threads.run(lambda: done.append("never"))

            nursery.start_soon(never)
            await trio.testing.wait_all_tasks_blocked()
            waiting.cancel()
            running.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert not ended
            go.set()
    assert ended == ["ended"]
    assert done == ["begun"]
