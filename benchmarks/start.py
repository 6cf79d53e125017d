"""What starting costs: processor seconds of the relay, of an agent and of a worker until each can do its work.

    python benchmarks/start.py [--rounds 5]

A relay and two agents on this machine, one of which is stopped and started again and again, then the relay. Counted is
the processor time, user and system, of the process itself and of those it has started: of a relay until it is ready,
of an agent until it is linked, of a worker until it waits for its task. Processor seconds mean something on a loaded
machine as well; the seconds beside them do not.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import trio

from agent.demo.children import Child, warden
from agent.demo.world import AGENTS, open_world

PATIENCE = 60.0


@dataclass(frozen=True)
class Cost:
    """One start."""

    own: float
    below: float
    seconds: float


def _used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def start_once(child: Child, word: str) -> Cost:
    """Stop a process, start it again, and wait until its log says ``word``."""
    await child.stop()
    length = child.log_file.stat().st_size
    began = time.monotonic()
    await child.start()
    with trio.fail_after(PATIENCE):
        while True:
            with child.log_file.open("rb") as log:
                log.seek(length)
                if word.encode() in log.read():
                    break
            child.raise_if_ended()
            await trio.sleep(0.005)
    seconds = time.monotonic() - began
    process = psutil.Process(child.pid)
    below = 0.0
    for other in process.children(recursive=True):
        try:
            below += _used(other)
        except psutil.Error:
            continue
    return Cost(_used(process), below, seconds)


def import_once(module: str) -> Cost:
    """Have a fresh interpreter import a module and end."""
    began = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", f"import os, {module}; print(sum(os.times()[:2]))"], stdout=-1) as run:
        answer = run.communicate()[0]
    return Cost(float(answer), 0.0, time.monotonic() - began)


def _show(name: str, costs: list[Cost]) -> None:
    own, below, seconds = (statistics.median(getattr(cost, field) for cost in costs) for field in Cost.__annotations__)
    print(f"| {name} | {own:.2f} | {below:.2f} | {seconds:.2f} |", flush=True)


async def measure(directory: Path, rounds: int) -> None:
    """Every process in turn; prints a table."""
    roots = {name: directory / "roots" / name for name in AGENTS}
    for root in roots.values():
        root.mkdir(parents=True)
    print("| started | CPU s | of those below it | s |\n| --- | --- | --- | --- |")
    for module in ("agent.transfer.worker", "agent.daemon", "relay.server", "protocol.websocket.process"):
        _show(f"import {module}", [import_once(module) for _ in range(rounds)])
    async with warden() as guard, open_world(directory, roots, guard, lambda _line: None) as world:
        agent = world.sites[AGENTS[1]].child
        _show("agent, until it serves", [await start_once(agent, "Serving") for _ in range(rounds)])
        _show("agent, until it is linked", [await start_once(agent, "Linked to") for _ in range(rounds)])
        _show("relay, until it is ready", [await start_once(world.relay, "Ready") for _ in range(rounds)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="start-") as directory:
        trio.run(measure, Path(directory), rounds)


if __name__ == "__main__":
    main()
