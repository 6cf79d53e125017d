"""Every kind of path over the same long and lossy distance, beside one another. Needs root and /dev/net/tun.

    python benchmarks/long_paths.py [--rtt 100] [--loss 0.1] [--mib 24] [--limit 3] [--kinds direct …] [--runs 1]

The network lab of `tests/network`: two agents --rtt milliseconds apart, half of it each to the relay; --loss percent
of the packets are lost on the way, for a tunnel on each of its two legs. One file of --mib MiB with a limit of --limit
MB/s for the task, below what the lab's emulator carries on this machine, so that it is the path that decides and not
the emulator (0: no limit). The rate is that from a tenth of the file to all of it, so a burst at the beginning shows.
Ratios to the direct path of the same run are what counts; the goal is that tunnelled and punched transfers reach what
the direct one does.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
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


async def reached(lab: laboratory.Lab, task_id: str, size: int) -> float:
    """The moment at which so many bytes have arrived."""
    with trio.fail_after(150):
        while True:
            tasks = lab.sites["b"].status()["tasks"]
            task = next((row for row in tasks if row["task_id"] == task_id), None)
            if task is not None and task["counters"]["bytes_transferred"] >= size:
                return trio.current_time()
            await trio.sleep(0.05)


async def rate(lab: laboratory.Lab, kind: str, number: int, options: argparse.Namespace) -> tuple[float, str]:
    """MB/s of one transfer, and its path."""
    _, _, demands = KINDS[kind]
    name, size = f"{kind}-{number}", options.mib * MIB
    (lab.sites["a"].root / name).write_bytes(random.Random(name).randbytes(size))
    limit = {"towpath_bandwidth_limit": int(options.limit * 1e6)} if options.limit else {}
    task_id = await lab.submit("a", "b", name, **limit, **demands)
    begun = await reached(lab, task_id, size // 10)
    ended = await reached(lab, task_id, size)
    task = await lab.finished(task_id)
    if task["status"] != "SUCCEEDED":
        raise SystemExit(f"A transfer failed: {task}")
    return 0.9 * size / (ended - begun) / 1e6, lab.path_of("b", task_id)


async def measure(lab: laboratory.Lab, kind: str, options: argparse.Namespace) -> tuple[list[float], str]:
    """One kind of path, each run a file of its own."""
    boxes = {site: matrix.boxes(site, KINDS[kind][0]) for site in ("a", "b")}
    for site in boxes:
        gateway = boxes[site][0]["gateway"] if boxes[site] else None
        lab.sites[site].host.use([matrix.address(site, KINDS[kind][0])], gateway)
    lab.emulator.use(lab.describe(boxes, loss=options.loss / 100))
    await lab.start()
    try:
        found = [await rate(lab, kind, number, options) for number in range(options.runs)]
    finally:
        await lab.stop()
    return [each for each, _ in found], found[-1][1]


async def run(options: argparse.Namespace) -> None:
    """All kinds, the direct one first."""
    laboratory.DELAY = options.rtt / 4000
    direct = 0.0
    print(f"| path | MB/s at {options.rtt:g} ms and {options.loss:g} % | beside direct | as the task tells it |")
    print("| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as directory:
        async with laboratory.open_lab(Path(directory)) as lab:
            for kind in options.kinds:
                rates, path = await measure(lab, kind, options)
                middle = statistics.median(rates)
                direct = middle if kind == "direct" else direct
                ratio = f"{middle / direct:.2f}" if direct else ""
                wrong = "" if path.startswith(KINDS[kind][1]) else " (not the path that was meant)"
                print(f"| {kind} | {middle:.2f} | {ratio} | {path}{wrong} |", flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtt", type=float, default=100.0, help="milliseconds between the two agents")
    parser.add_argument("--loss", type=float, default=0.1, help="percent of the packets")
    parser.add_argument("--mib", type=int, default=24)
    parser.add_argument("--limit", type=float, default=3.0, help="MB/s of the task; 0 for none")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    options = parser.parse_args()
    if why_not := laboratory.why_not():
        raise SystemExit(f"Not here: {why_not}.")
    trio.run(run, options)


if __name__ == "__main__":
    main()
