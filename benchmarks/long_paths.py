"""Every kind of path over the same long and lossy distance, in turns. Needs root and /dev/net/tun.

    python benchmarks/long_paths.py [--rtt 100] [--loss 0.1] [--mib 64] [--limit 0] [--kinds direct …] [--rounds 3]

The network lab of `tests/network`: two agents --rtt milliseconds apart, half of it each to the relay; --loss percent
of the segments are lost on the way, for a tunnel on each of its two legs. In each round one file of --mib MiB takes
each kind of path, one after the other. The emulator carries packets of many segments (`tests/network/large.py`); all
processes together still share this machine, so --limit (MB/s, 0: none) makes a run in which the path decides for sure.
The rate is that from a quarter of the file to all of it, so that it is the path's and not the beginning's. Ratios to
the direct path of the same round are what counts; the goal is that tunnelled and punched transfers reach what the
direct one does. With --facts each transfer's sockets are shown as they are in the middle of it (`ss -tin`).
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "network"))

import lab as laboratory
import matrix

MIB = 2**20
# The boxes of both sites, how the path of the task begins, and what the task demands.
KINDS: dict[str, tuple[str, str, dict[str, str]]] = {
    "direct": ("none", "direct", {}),
    "punched": ("port", "punched", {}),
    "tunnel": ("symmetric", "tunnel tcp", {}),
    "websocket": ("https", "tunnel over WebSocket", {}),
    "quic": ("port", "quic", {"towpath_transport": "quic"}),
}


@dataclass
class Run:
    """What was measured of one transfer."""

    rate: float
    path: str


async def reached(lab: laboratory.Lab, task_id: str, size: float) -> float:
    """The moment at which so many bytes have arrived."""
    with trio.fail_after(150):
        while True:
            tasks = lab.sites["b"].status()["tasks"]
            task = next((row for row in tasks if row["task_id"] == task_id), None)
            if task is not None and task["counters"]["bytes_transferred"] >= size:
                return trio.current_time()
            await trio.sleep(0.02)


async def transfer(lab: laboratory.Lab, kind: str, number: int, options: argparse.Namespace) -> Run:
    """One file over one kind of path, between agents that were started for it."""
    network, _, demands = KINDS[kind]
    boxes = {site: matrix.boxes(site, network) for site in ("a", "b")}
    for site in boxes:
        gateway = boxes[site][0]["gateway"] if boxes[site] else None
        lab.sites[site].host.use([matrix.address(site, network)], gateway)
    lab.emulator.use(lab.describe(boxes, loss=options.loss / 100, seed=number + 1))
    await lab.start()
    try:
        name, size = f"{kind}-{number}", options.mib * MIB
        (lab.sites["a"].root / name).write_bytes(random.Random(name).randbytes(size))
        limit = {"towpath_bandwidth_limit": int(options.limit * 1e6)} if options.limit else {}
        task_id = await lab.submit("a", "b", name, **limit, **demands)
        begun = await reached(lab, task_id, size / 4)
        if options.facts:
            await reached(lab, task_id, size / 2)
            await trio.to_thread.run_sync(show_sockets, lab)
        ended = await reached(lab, task_id, size)
        task = await lab.finished(task_id)
        if task["status"] != "SUCCEEDED":
            raise SystemExit(f"A transfer failed: {task}")
        (lab.sites["a"].root / name).unlink()
        (lab.sites["b"].root / name).unlink()
        path = lab.path_of("b", task_id)
    finally:
        await lab.stop()
    return Run(0.75 * size / (ended - begun) / 1e6, path)


def show_sockets(lab: laboratory.Lab) -> None:
    """What the kernel tells of every connection that has moved something lately."""
    for name, host in [("relay", lab.relay_host), *((name, site.host) for name, site in lab.sites.items())]:
        command = ["ip", "netns", "exec", host.namespace, "ss", "-tinH", "state", "established"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        for line, facts in zip(lines[::2], lines[1::2], strict=False):
            if re.search(r"bytes_(sent|received):\d{7}", facts):
                print(f"  {name}: {' '.join(line.split())} {facts.strip()}", file=sys.stderr)


async def run(options: argparse.Namespace) -> None:
    """All rounds, then the table."""
    laboratory.DELAY = options.rtt / 4000
    found: dict[str, list[Run]] = {kind: [] for kind in options.kinds}
    with tempfile.TemporaryDirectory() as directory:
        async with laboratory.open_lab(Path(directory), many=True) as lab:
            for number in range(options.rounds):
                for kind in options.kinds:
                    made = await transfer(lab, kind, number, options)
                    found[kind].append(made)
                    print(f"round {number + 1}, {kind}: {made.rate:.2f} MB/s, {made.path}", file=sys.stderr, flush=True)
    print(f"| path | MB/s at {options.rtt:g} ms and {options.loss:g} %, median (range) | beside direct | as told |")
    print("| --- | --- | --- | --- |")
    for kind, runs in found.items():
        rates = [each.rate for each in runs]
        ratios = [each.rate / direct.rate for each, direct in zip(runs, found.get("direct", []), strict=False)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
        wrong = "" if all(each.path.startswith(KINDS[kind][1]) for each in runs) else " (not always what was meant)"
        middle = f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"
        print(f"| {kind} | {middle} | {ratio} | {runs[-1].path}{wrong} |", flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtt", type=float, default=100.0, help="milliseconds between the two agents")
    parser.add_argument("--loss", type=float, default=0.1, help="percent of the segments")
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--limit", type=float, default=0.0, help="MB/s of the task; 0 for none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["direct", "punched", "tunnel", "websocket"], choices=list(KINDS))
    parser.add_argument("--facts", action="store_true", help="show sockets in the middle of each transfer")
    options = parser.parse_args()
    if why_not := laboratory.why_not():
        raise SystemExit(f"Not here: {why_not}.")
    trio.run(run, options)


if __name__ == "__main__":
    main()
