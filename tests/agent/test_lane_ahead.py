"""A lane that is opened while its session begins: taken, failed, or ended with it, it leaves nothing behind."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
import trio
import trio.testing

from agent.transfer.lane_processes.lane_ahead import LaneAhead
from protocol.errors import RetryLater


class Opening:
    """Stands for dialling and the handshake: goes on when it is told to, or when its socket is shut down."""

    def __init__(self, error: Exception | None = None) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.error = error
        self.asked = trio.Event()

    async def __call__(self, dialled: Callable[[socket.socket], None]) -> socket.socket:
        dialled(self.ours)
        self.asked.set()
        if not await trio.to_thread.run_sync(self.ours.recv, 1):
            self.ours.close()
            raise RetryLater("The handshake was broken off.")
        if self.error is not None:
            self.ours.close()
            raise self.error
        return self.ours

    def finish(self) -> None:
        self.theirs.sendall(b".")

    def closed(self) -> bool:
        """Every descriptor of our end is gone: the other one reads the end."""
        self.theirs.settimeout(5)
        ended = self.theirs.recv(1) == b""
        self.theirs.close()
        return ended


async def test_it_is_taken_once_ready(nursery: trio.Nursery) -> None:
    opening = Opening()
    ahead = LaneAhead(opening)  # type: ignore[arg-type]
    nursery.start_soon(ahead.run)
    await opening.asked.wait()
    opening.finish()
    taken: object = await ahead.take()
    assert taken is opening.ours
    ahead.close()
    # It is the taker's now.
    opening.ours.sendall(b"x")
    opening.ours.close()
    assert opening.theirs.recv(1) == b"x"
    assert opening.closed()


async def test_what_goes_wrong_is_left_to_the_next_one(nursery: trio.Nursery) -> None:
    opening = Opening(RetryLater("No."))
    ahead = LaneAhead(opening)  # type: ignore[arg-type]
    nursery.start_soon(ahead.run)
    opening.finish()
    assert await ahead.take() is None
    assert opening.closed()


@pytest.mark.parametrize("ready", [False, True])
async def test_it_ends_with_a_session_that_took_none(nursery: trio.Nursery, ready: bool) -> None:
    """Also while a thread waits for the other side in the handshake."""
    opening = Opening()
    ahead = LaneAhead(opening)  # type: ignore[arg-type]
    nursery.start_soon(ahead.run)
    await opening.asked.wait()
    if ready:
        opening.finish()
        await trio.testing.wait_all_tasks_blocked()
        while not ahead._ready.is_set():
            await trio.sleep(0.001)
    with trio.fail_after(5):
        ahead.close()
        ahead.close()
        assert await ahead.take() is None
    assert opening.closed()
