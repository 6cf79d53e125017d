"""The wall clock jumps by a day, forwards or backwards, and a machine sleeps, while real processes move data.

libfaketime stands between the processes and the clock: a file for each machine says how far its wall clock is off, and
is read at each look. The monotonic clock and the times of files stay what they are; the real clock is not touched.
A machine that sleeps is one whose processes all stand still (SIGSTOP) and whose wall clock has moved on afterwards; its
monotonic clock has moved on too, which a real one's has not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import trio
from globus_sdk import GlobusError

from tests.agent.engine_inside import contents
from tests.system.stopped_world import MIB, StoppedWorld, fill, stopped_world

DAY = 86400
LARGE = 24 * MIB
# Seconds that a source needs for each block: the transfer takes a few seconds, in whose middle the clock jumps.
SLOW = 0.5
# Seconds for which one machine's clock is wrong, and for which a machine sleeps.
WRONG_FOR, ASLEEP_FOR = 20.0, 40.0
# A task that waits does so with growing pauses.
MOST_FAULTS = 25
MACHINES = ("relay", "alpha", "beta")


def _library() -> Path:
    spec = importlib.util.find_spec("libfaketime")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package libfaketime")
    library = Path(spec.origin).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
    if not library.exists():
        pytest.skip("libfaketime is not built for this system")
    return library


class Clocks:
    """The wall clocks of the three machines."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def file(self, machine: str) -> Path:
        return self._directory / f"clock-{machine}"

    def jump(self, machine: str, seconds: int) -> None:
        """Set how far a machine's clock is off; ``all`` for every machine."""
        for one in MACHINES if machine == "all" else (machine,):
            draft = self._directory / "draft"
            draft.write_text(f"{seconds:+d}")
            draft.rename(self.file(one))


@asynccontextmanager
async def clocked_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[StoppedWorld, Clocks]]:
    """A world each of whose machines has a clock of its own."""
    clocks = Clocks(tmp_path)
    clocks.jump("all", 0)
    library = _library()
    async with stopped_world(tmp_path, monkeypatch) as world:
        for machine, child in zip(MACHINES, world.world.children, strict=True):
            child.environment = {
                **child.environment,
                "LD_PRELOAD": str(library),
                "FAKETIME_TIMESTAMP_FILE": str(clocks.file(machine)),
                "FAKETIME_NO_CACHE": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "NO_FAKE_STAT": "1",
            }
            await child.stop()
        for child in world.world.children:
            await child.start()
        with trio.fail_after(60):
            for name in ("alpha", "beta"):
                while True:
                    # The relay is being started.
                    with contextlib.suppress(GlobusError):
                        await world.world.until_connected(name)
                        break
                    await trio.sleep(0.2)
        yield world, clocks


async def _begun(world: StoppedWorld, place: str) -> str:
    world.slow(SLOW)
    task_id = await world.submit("tree", place)
    with trio.fail_after(60):
        while await world.known_to_beta(task_id) < LARGE // 4:
            await trio.sleep(0.05)
    return task_id


async def _ended(world: StoppedWorld, task_id: str, place: str, expected: dict[str, bytes | str]) -> str:
    """See a task to its end; what it told."""
    document = await world.until_ended(task_id)
    assert document["status"] == "SUCCEEDED", document
    assert contents(world.destination / place) == expected
    assert document["faults"] < MOST_FAULTS, document
    codes = await world.codes(task_id)
    for once in ("STARTED", "SUCCEEDED"):
        assert codes.count(once) == 1, codes
    assert (codes[0], codes[-1]) == ("STARTED", "SUCCEEDED"), codes
    return f"{document['faults']} faults, {codes}"


async def _never_failed(world: StoppedWorld, task_id: str, seconds: float) -> str:
    """What a task says of itself for so long, or until its end: it may wait, it may not fail."""
    said = ""
    with trio.move_on_after(seconds):
        while True:
            document = await world.show(task_id)
            assert document["status"] in ("ACTIVE", "SUCCEEDED"), document
            said = str(document["nice_status"])
            if document["status"] == "SUCCEEDED":
                return "SUCCEEDED"
            await trio.sleep(0.5)
    return said


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seconds", [DAY, -DAY], ids=["forwards", "backwards"])
@pytest.mark.parametrize("machine", [*MACHINES, "all"])
async def test_the_clock_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, seconds: int) -> None:
    """Of every machine at once: the task gets to its end at that time. Of one of them: it goes on or waits, and gets to
    its end when the clock is right again."""
    async with clocked_world(tmp_path, monkeypatch) as (world, clocks):
        expected = fill(world.source / "tree", LARGE)
        task_id = await _begun(world, "copy")
        clocks.jump(machine, seconds)
        if machine != "all":
            said = await _never_failed(world, task_id, WRONG_FOR)
            clocks.jump(machine, 0)
            print(f"{machine} {seconds:+d} s, {WRONG_FOR:g} s later: {said}")
        began = time.monotonic()
        told = await _ended(world, task_id, "copy", expected)
        print(f"{machine} {seconds:+d} s: ended after {time.monotonic() - began:.1f} s more; {told}")
        # What is submitted afterwards, at the time that it is now, is as good as ever.
        world.slow(0)
        later = await world.submit("tree", "later")
        print(f"submitted afterwards: {await _ended(world, later, 'later', expected)}")


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("machine", ["alpha", "beta"])
async def test_a_machine_sleeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    """Longer than its peers wait for a sign of life; then it is a day later everywhere."""
    async with clocked_world(tmp_path, monkeypatch) as (world, clocks):
        expected = fill(world.source / "tree", LARGE)
        task_id = await _begun(world, "copy")
        head = psutil.Process(world.child(machine).pid)
        asleep = [head, *head.children(recursive=True)]
        for process in asleep:
            process.suspend()
        said = await _never_failed(world, task_id, ASLEEP_FOR)
        clocks.jump("all", DAY)
        for process in asleep:
            process.resume()
        began = time.monotonic()
        told = await _ended(world, task_id, "copy", expected)
        print(f"{machine} slept, meanwhile: {said}; ended {time.monotonic() - began:.1f} s after; {told}")
