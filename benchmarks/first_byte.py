"""From a task that the relay has accepted to its first content byte, by the kind of path. Needs root and /dev/net/tun.

    python benchmarks/first_byte.py [--delay 15 50] [--triangle] [--runs 5] [--pairs none-none …] [--json FILE]

The network lab of `tests/network`: two agents behind the boxes of a pair (SOURCE-DESTINATION), --delay milliseconds one
way between each of them and the relay. The agents are as far from one another as their ways to the relay together, or
with --triangle as each of them is from the relay. The clock runs from the answer to the submission, which is asked
beside the relay, to the first byte that the destination has received. The goal on a direct path is three round trips to
the relay and 0.3 s, and one second where only the tunnel works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "network"))

import lab as laboratory
import matrix
from test_matrix import arrange

PAIRS = ["none-none", "port-none", "none-port", "port-port", "no-crossing-no-crossing", "symmetric-symmetric"]
# Less than a packet: what is counted is counted when a file, or a block of it, is there as a whole.
SIZE = 1000
# A spare worker waits again this long after a task (seconds); what an agent starts anew for each task is not counted.
REST = 4.0


@dataclass
class Row:
    """One pair at one delay; times in milliseconds."""

    pair: str
    delay: float
    triangle: bool
    path: str
    times: list[float]

    @property
    def goal(self) -> float:
        return 1000.0 if self.path == "tunnel" else 3 * 2 * self.delay + 300


def kinds(pair: str) -> tuple[str, str]:
    """Both halves of a pair's name; the kinds' names may have hyphens themselves."""
    known = {kind for cell in matrix.cells() for kind in cell} | {"https"}
    for kind in known:
        if pair.startswith(f"{kind}-") and pair.removeprefix(f"{kind}-") in known:
            return kind, pair.removeprefix(f"{kind}-")
    raise SystemExit(f"{pair} is no pair of {', '.join(sorted(known))}.")


async def one(lab: laboratory.Lab, name: str) -> tuple[float, str]:
    """Milliseconds to the first byte of one transfer, and the kind of its path."""
    (lab.sites["a"].root / name).write_bytes(b"x" * SIZE)
    task_id = await lab.submit("a", "b", name)
    begun = time.monotonic()
    counter = lab.sites["b"].state_dir / "tasks" / task_id / "received"
    with trio.fail_after(60):
        while not (counter.exists() and int.from_bytes(counter.read_bytes(), "little")):
            await trio.sleep(0.002)
    took = 1000 * (time.monotonic() - begun)
    task = await lab.finished(task_id)
    if task["status"] != "SUCCEEDED":
        raise SystemExit(f"A transfer failed: {task}")
    return took, lab.path_of("b", task_id).split()[0]


async def measure(lab: laboratory.Lab, pair: str, delay: float, runs: int, *, triangle: bool) -> Row:
    """One pair; its first transfer is left out."""
    source, destination = kinds(pair)
    laboratory.DELAY = (delay / 2 if triangle else delay) / 1000
    laboratory.RELAY_DELAY = delay / 2 / 1000 if triangle else 0.0
    arrange(lab, {"a": source, "b": destination})
    await lab.start()
    try:
        found = []
        for number in range(runs + 1):
            await trio.sleep(REST)
            found.append(await one(lab, f"{pair}-{delay:g}-{number}-{time.monotonic_ns()}"))
    finally:
        await lab.stop()
    paths = dict.fromkeys(path for _, path in found[1:])
    return Row(pair, delay, triangle, ", ".join(paths), [took for took, _ in found[1:]])


async def run(options: argparse.Namespace) -> list[Row]:
    """All rows."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        async with laboratory.open_lab(Path(directory)) as lab:
            for pair in options.pairs:
                for delay in options.delay:
                    row = await measure(lab, pair, delay, options.runs, triangle=options.triangle)
                    print(
                        f"| {row.pair} | {2 * delay:.0f} ms | {row.path} | {statistics.median(row.times):.0f} ms "
                        f"| {min(row.times):.0f} to {max(row.times):.0f} ms | {row.goal:.0f} ms |",
                        flush=True,
                    )
                    rows.append(row)
    return rows


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, nargs="+", default=[15, 50], help="one way to the relay, milliseconds")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--pairs", nargs="+", default=PAIRS)
    parser.add_argument("--triangle", action="store_true", help="agents as near to one another as to the relay")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if why_not := laboratory.why_not():
        raise SystemExit(f"Not here: {why_not}.")
    print("| source-destination | round trip to the relay | path | median | least to most | goal |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = trio.run(run, options)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
