"""Processes beside ours that stand still are ended, so that whoever needs one starts another."""

from __future__ import annotations

import errno
import itertools
import signal
import sys
from collections.abc import Iterator

import psutil
import pytest
import trio
import trio.testing

from protocol import line_process as here
from protocol import standstill
from protocol.line_process import line_process
from protocol.signs_of_life import Posture, Signs
from protocol.standstill import HANGS_FOR, LOOK_EVERY, STOPPED_FOR
from protocol.websocket.carrier import Carrier

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="these processes take descriptors of POSIX")

MODULE = "protocol.websocket.process"


class Played:
    """A process that is only looked at, and killed or not."""

    pid, returncode = 1, None

    def __init__(self) -> None:
        self.killed_at: float | None = None

    def kill(self) -> None:
        self.killed_at = trio.current_time()


async def looked_at(monkeypatch: pytest.MonkeyPatch, signs: Iterator[Signs], seconds: float) -> float | None:
    """After how long (seconds) it is ended, if it is."""
    monkeypatch.setattr(here, "signs_of", lambda _pid: next(signs))
    process, begun = Played(), trio.current_time()
    with trio.move_on_after(seconds):
        await here._end_when_it_stands_still(process, MODULE)  # type: ignore[arg-type]
    return None if process.killed_at is None else process.killed_at - begun


@pytest.mark.parametrize(
    ("posture", "bound", "how"),
    [
        (Posture.STOPPED, STOPPED_FOR, "was stopped by a signal"),
        (Posture.WAITS, HANGS_FOR, "hangs"),
        (Posture.IN_STORAGE, HANGS_FOR, "hangs"),
    ],
)
async def test_one_that_stands_still_is_ended(
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
    posture: Posture,
    bound: float,
    how: str,
) -> None:
    ended = await looked_at(monkeypatch, itertools.repeat(Signs(posture, (1.0,))), 300)
    assert ended is not None
    assert bound <= ended <= bound + 2 * LOOK_EVERY
    assert how in caplog.text


@pytest.mark.parametrize(
    "signs",
    [
        itertools.repeat(Signs(Posture.RUNS, (1.0,))),
        itertools.repeat(Signs(Posture.TRACED, (1.0,))),
        itertools.repeat(None),
        # Its loop turns.
        (Signs(Posture.WAITS, (float(number // 5),)) for number in itertools.count()),
        itertools.cycle([*[Signs(Posture.STOPPED, (1.0,))] * 5, Signs(Posture.RUNS, (2.0,))]),
    ],
    ids=["computes", "in a debugger", "nothing is told", "waits", "goes on"],
)
async def test_any_other_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock, signs: Iterator[Signs]
) -> None:
    assert await looked_at(monkeypatch, signs, 3600) is None


async def test_what_fails_inside_comes_out_as_it_is() -> None:
    with pytest.raises(OSError, match="line") as caught:
        async with line_process(MODULE):
            raise OSError(errno.EPIPE, "the line is gone")
    assert caught.value.errno == errno.EPIPE


def process() -> psutil.Process:
    """The one that was started here."""
    (found,) = (child for child in psutil.Process().children() if MODULE in child.cmdline())
    return found


async def test_another_one_carries_websocket_connections_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # In place of 5 and 30 seconds.
    for module, name, seconds in ((here, "LOOK_EVERY", 0.02), (standstill, "LOOK_EVERY", 0.02)):
        monkeypatch.setattr(module, name, seconds)
    monkeypatch.setattr(standstill, "STOPPED_FOR", 0.2)
    carrier = Carrier()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(carrier.run)
        carrier.want()
        with trio.fail_after(20):
            while not carrier.is_up:
                await trio.sleep(0.02)
            first = process()
            first.send_signal(signal.SIGSTOP)
            while not carrier.statistics().restarts or not carrier.is_up:
                await trio.sleep(0.02)
        assert process().pid != first.pid
        nursery.cancel_scope.cancel()
    assert "was stopped by a signal" in caplog.text
    assert "another one is started" in caplog.text
