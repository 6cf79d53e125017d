"""Many small tasks: submitted, run and cancelled; CPU seconds for each by the processes that used them.

    python benchmarks/many_tasks.py [--tasks 1000] [--seconds 60] [--submitters 1] [--directory DIR]

A task is one file of 100 bytes from alpha to beta, submitted through the relay. All are submitted, those that are over
within ``--seconds`` after that are counted, and `towpath task cancel --all` ends the others. On a machine that does
anything else the CPU seconds count, not the rates. Of a worker that still runs only what it has used so far is known.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from globus_sdk import TransferData
from little_world import little_world

from agent.cli.profile import Profile
from agent.cli.relay_client import Relay

LOOK_EVERY = 0.5


class Processes:
    """The relay and both daemons, found below this process by what they were started with."""

    def __init__(self) -> None:
        self._heads: dict[str, psutil.Process] = {}
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                words = child.cmdline()
                name = next((Path(word).parent.name for word in words if word.endswith((".yml", ".yaml"))), "")
                name = "relay" if any(word.endswith("towpath-relay") for word in words) else name
                if name in ("relay", "alpha", "beta"):
                    self._heads.setdefault(name, child)
        if len(self._heads) != 3:
            raise SystemExit(f"Not all processes were found, only {sorted(self._heads)}.")

    def used(self) -> dict[str, float]:
        """CPU seconds so far: of each head, and of what it has started, also of what has ended."""
        found = {}
        for name, head in self._heads.items():
            times = head.cpu_times()
            found[name] = times.user + times.system
            below = times.children_user + times.children_system
            for child in head.children(recursive=True):
                with suppress(psutil.Error):
                    of_child = child.cpu_times()
                    below += of_child.user + of_child.system + of_child.children_user + of_child.children_system
            found[f"{name}'s workers" if name != "relay" else "relay's others"] = below
        return found

    @property
    def pids(self) -> dict[str, int]:
        return {name: head.pid for name, head in self._heads.items()}


@contextmanager
def counted(processes: Processes, what: str) -> Iterator[list[int]]:
    """Print what a step cost; the block puts into the list how many there were."""
    before, started, amount = processes.used(), time.monotonic(), [0]
    yield amount
    elapsed, after = time.monotonic() - started, processes.used()
    number = max(1, amount[0])
    each = {name: 1000 * (after[name] - before[name]) / number for name in after}
    shares = ", ".join(f"{name} {value:.1f}" for name, value in each.items() if value >= 0.05)
    print(
        f"{what}: {amount[0]} in {elapsed:.1f} s, {amount[0] / elapsed:.2f}/s; CPU-ms each: "
        f"{sum(each.values()):.1f} ({shares})",
        flush=True,
    )


def profile_of(world: dict[str, Any]) -> Profile:
    return Profile(
        relay_url=world["relay_url"],
        ca_file=world["ca_file"],
        client_id=world["client_id"],
        client_secret=world["client_secret"],
    )


def submit(world: dict[str, Any], number: int, submitters: int) -> None:
    """So many tasks, by so many clients beside one another."""
    ends, clients = world["endpoints"], threading.local()
    made: list[Relay] = []

    def one(index: int) -> None:
        if not hasattr(clients, "relay"):
            clients.relay = Relay(profile_of(world))
            made.append(clients.relay)
        data = TransferData(ends["alpha"]["collection_id"], ends["beta"]["collection_id"])
        data.add_item(f"/many/{index}", f"/many/{index}")
        clients.relay.transfer.submit_transfer(data)

    with ThreadPoolExecutor(submitters) as pool:
        list(pool.map(one, range(number)))
    for relay in made:
        relay.close()


def over(relay: Relay) -> int:
    """How many tasks have succeeded. Raises SystemExit when one has failed, which none should before the cancelling."""
    if relay.transfer.task_list(filter="status:FAILED", limit=1)["total"]:
        raise SystemExit("A task has failed.")
    return int(relay.transfer.task_list(filter="status:SUCCEEDED", limit=1)["total"])


def measure(world: dict[str, Any], options: argparse.Namespace) -> None:
    processes = Processes()
    print(f"processes: {processes.pids}", flush=True)
    folder = Path(world["endpoints"]["alpha"]["root"]) / "many"
    folder.mkdir()
    for index in range(options.tasks):
        (folder / str(index)).write_bytes(b"%99d\n" % index)
    with Relay(profile_of(world)) as relay:
        with counted(processes, "submitted (and what ran meanwhile)") as amount:
            submit(world, options.tasks, options.submitters)
            amount[0] = options.tasks
        before = over(relay)
        with counted(processes, "succeeded") as amount:
            until = time.monotonic() + options.seconds
            while (done := over(relay)) < options.tasks and time.monotonic() < until:
                time.sleep(LOOK_EVERY)
            amount[0] = done - before
        if done == options.tasks:
            return
        environment = {
            **os.environ,
            "TOWPATH_RELAY_URL": world["relay_url"],
            "TOWPATH_CA_FILE": world["ca_file"],
            "TOWPATH_CLIENT_ID": world["client_id"],
            "TOWPATH_CLIENT_SECRET": world["client_secret"],
        }
        with counted(processes, "cancelled or over by then") as amount:
            command = [str(Path(sys.executable).with_name("towpath")), "task", "cancel", "--all"]
            with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as canceller:
                try:
                    if canceller.wait(options.patience):
                        raise SystemExit("The tasks could not be cancelled.")
                except subprocess.TimeoutExpired:
                    print(f"not all are cancelled after {options.patience:g} s", flush=True)
                    canceller.kill()
            amount[0] = int(relay.transfer.task_list(filter="status:SUCCEEDED,FAILED", limit=1)["total"]) - done


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="how long they may run before the rest is cancelled"
    )
    parser.add_argument("--submitters", type=int, default=1, help="clients beside one another")
    parser.add_argument("--patience", type=float, default=120.0, help="how long the cancelling may take (seconds)")
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="many-tasks-", dir=options.directory) as name,
        little_world(Path(name)) as world,
    ):
        measure(world, options)


if __name__ == "__main__":
    main()
