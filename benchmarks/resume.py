"""What a kill costs: SIGKILL in the middle of a large file, a start, and the first new byte after it.

    python benchmarks/resume.py [--directory DIR] [--mib 1024] [--rounds 5] [--victims relay alpha ...]

A relay and two agents on this machine; each kill has a transfer of its own. A third of the way the victim is killed,
with all its processes, and started again as soon as it is gone, as a service manager would. Two figures count: the
seconds from the start of the new process (for workers, whom the daemon replaces, from the kill) to the first content
byte that the destination takes from the network, and the bytes that came over the network more than once by the end of
the task. Where the relay is the victim nothing should stop: there the longest time without a byte is given. A byte that
was on its way at the kill is no new one: before the start nothing must have come for a moment.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import struct
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import trio
from globus_sdk import GlobusError, TransferData

from agent.cli.relay_client import document_of
from agent.demo.children import Child, descendants_of, warden
from agent.demo.world import AGENTS, World, open_world

MIB = 1024 * 1024
VICTIMS = ("relay", "alpha", "beta", "alpha's workers", "beta's workers", "all")
# Seconds without a byte after which nothing is on its way any more.
REST = 0.05
# How often (seconds) it is looked whether a byte has come; looking costs processor time that a start needs.
LOOK = 0.005
PATIENCE = 120.0
# Seconds from a restart within which data must move again.
GOAL = 3.0


@dataclass(frozen=True)
class Cost:
    """What one kill did."""

    killed: int
    seconds: float
    # Processor seconds between start and first byte: of everything this benchmark runs, and of the rest of the machine.
    ours: float
    others: float
    again: int
    whole: float


class Arrivals:
    """The count of content bytes that a task's destination has taken from the network."""

    def __init__(self, world: World, task_id: str) -> None:
        self._file = world.sites["beta"].state_dir / "tasks" / task_id / "received"

    def value(self) -> int:
        """So far; repeats count."""
        try:
            return int(struct.unpack("<Q", self._file.read_bytes())[0])
        except (FileNotFoundError, struct.error):
            return 0

    async def until(self, least: int) -> None:
        """Wait until so much has arrived."""
        while self.value() < least:
            await trio.sleep(LOOK)

    async def at_rest(self) -> int:
        """Wait until nothing comes any more; what has come."""
        value, since = self.value(), time.monotonic()
        while time.monotonic() - since < REST:
            await trio.sleep(LOOK)
            now = self.value()
            if now != value:
                value, since = now, time.monotonic()
        return value

    async def longest_pause(self, seconds: float, whole: int) -> float:
        """The longest time without a byte in the next seconds, or until all is there."""
        began = last = time.monotonic()
        value, longest = self.value(), 0.0
        while time.monotonic() - began < seconds and value < whole:
            await trio.sleep(LOOK)
            now, moment = self.value(), time.monotonic()
            if now != value:
                longest, value, last = max(longest, moment - last), now, moment
        return longest


class Processors:
    """Who has used the processors since this was made."""

    def __init__(self) -> None:
        self._ours, self._all = self._used_by_us(), self._used_by_all()

    @staticmethod
    def _used_by_us() -> dict[int, float]:
        """Processor seconds of this process and all below it."""
        used = {}
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):
            with suppress(psutil.Error):
                times = process.cpu_times()
                used[process.pid] = float(times.user + times.system)
        return used

    @staticmethod
    def _used_by_all() -> float:
        times = psutil.cpu_times()
        # Linux counts guests' time as the user's already.
        idle = ("idle", "iowait", "guest", "guest_nice")
        return float(sum(value for name, value in times._asdict().items() if name not in idle))

    def since(self) -> tuple[float, float]:
        """Ours, and those of the rest of the machine."""
        whole, used = self._used_by_all() - self._all, self._used_by_us()
        ours = sum(seconds - self._ours.get(pid, 0.0) for pid, seconds in used.items())
        return ours, max(0.0, whole - ours)


def _workers(child: Child) -> list[int]:
    """All workers of an agent; the one that waits as a spare as well, so that nothing is prepared."""
    found = []
    for pid in descendants_of(child.pid):
        try:
            if "agent.transfer.worker" in psutil.Process(pid).cmdline():
                found.append(pid)
        except psutil.Error:
            continue
    return found


async def _kill(world: World, victims: str) -> tuple[int, list[Child]]:
    """How many processes were killed, and whom to start again."""
    if victims.endswith("'s workers"):
        pids = _workers(world.sites[victims.removesuffix("'s workers")].child)
        for pid in pids:
            os.kill(pid, 9)
        return len(pids), []
    children = (
        world.children if victims == "all" else [world.relay if victims == "relay" else world.sites[victims].child]
    )
    doomed = [pid for child in children for pid in (child.pid, *descendants_of(child.pid))]
    for pid in doomed:
        os.kill(pid, 9)
    for child in children:
        assert child.process is not None
        await child.process.wait()
    return len(doomed), list(children)


async def _submit(world: World, to: str) -> str:
    data = TransferData(*(world.sites[name].collection_id for name in AGENTS), verify_checksum=True)
    data.add_item("/large", f"/{to}")
    document = await world.call(lambda relay: document_of(relay.transfer.submit_transfer(data)))
    return str(document["task_id"])


async def _document(world: World, task_id: str) -> Mapping[str, Any]:
    while True:
        try:
            return await world.call(lambda relay: document_of(relay.transfer.get_task(task_id)))
        except GlobusError:
            # It is being started.
            await trio.sleep(0.05)


async def kill_once(world: World, victims: str, size: int, number: int) -> Cost:
    """One transfer with one kill."""
    to = f"copy-{number}"
    started = time.monotonic()
    task_id = await _submit(world, to)
    arrivals = Arrivals(world, task_id)
    with trio.fail_after(PATIENCE):
        await arrivals.until(size // 3)
        processors, moment = Processors(), time.monotonic()
        killed, again = await _kill(world, victims)
        if victims == "relay":
            for child in again:
                await child.start()
            seconds = await arrivals.longest_pause(5.0, size)
        else:
            before = await arrivals.at_rest()
            if again:
                processors, moment = Processors(), time.monotonic()
            for child in again:
                await child.start()
            await arrivals.until(before + 1)
            seconds = time.monotonic() - moment
        ours, others = processors.since()
        while (document := await _document(world, task_id))["status"] == "ACTIVE":
            await trio.sleep(0.05)
    if document["status"] != "SUCCEEDED":
        raise SystemExit(f"The task failed: {document['fatal_error']}")
    whole = time.monotonic() - started
    again_bytes = arrivals.value() - size
    (world.sites["beta"].root / to).unlink()
    return Cost(killed, seconds, ours, others, again_bytes, whole)


async def measure(directory: Path, size: int, rounds: int, victims: list[str]) -> None:
    """Every victim in every round; prints as it goes."""
    roots = {name: directory / "roots" / name for name in AGENTS}
    for root in roots.values():
        root.mkdir(parents=True)
    block = os.urandom(64 * MIB)
    with (roots["alpha"] / "large").open("wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: min(len(block), size - start)])
    costs: dict[str, list[Cost]] = {name: [] for name in victims}
    async with warden() as guard, open_world(directory, roots, guard, lambda _line: None) as world:
        for number in range(rounds * len(victims)):
            name = victims[number % len(victims)]
            # Spares start two seconds after they are needed, and nobody is killed that soon by bad luck alone.
            for site in AGENTS:
                await world.until_connected(site)
            await trio.sleep(4.0)
            cost = await kill_once(world, name, size, number)
            costs[name].append(cost)
            print(
                f"{name:16} {cost.killed} processes killed, first new byte after {cost.seconds:5.2f} s "
                f"({cost.ours:4.2f} CPU-s ours, {cost.others:4.2f} others'), "
                f"{cost.again / MIB:6.2f} MiB sent again, task {cost.whole:5.1f} s",
                flush=True,
            )
    print(f"\n{size // MIB} MiB, {rounds} kills of each; median (and worst)")
    print("| killed | first new byte, s | round by round | within 3 s | CPU-s, ours | others' | sent again, MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, rows in costs.items():
        _show(name, rows)


def _show(name: str, rows: list[Cost]) -> None:
    seconds, again = [row.seconds for row in rows], [row.again / MIB for row in rows]
    ours, others = (statistics.median(getattr(row, field) for row in rows) for field in ("ours", "others"))
    print(
        f"| {name} | {statistics.median(seconds):.2f} ({max(seconds):.2f}) "
        f"| {', '.join(f'{each:.2f}' for each in seconds)} "
        f"| {sum(each <= GOAL for each in seconds)} of {len(seconds)} | {ours:.2f} | {others:.2f} "
        f"| {statistics.median(again):.1f} ({max(again):.1f}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=list(VICTIMS))
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="resume-", dir=options.directory))
    try:
        trio.run(measure, directory, options.mib * MIB, options.rounds, options.victims)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
