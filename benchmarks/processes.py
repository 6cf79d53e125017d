"""One process for a session beside several: ours alone, in turns, in one run.

    python benchmarks/processes.py G1 [G1d G2 G2d G3m] [--with auto] [--runs 5] [--large-mib 1024] [--directory DIR]

The goals' work is that of `run.py`. A line for each way gives the median, the range, and the CPU-seconds of each end:
they say which end a further process could help. ``--with`` is what `limits.workers_per_session` is beside 1.
``--not-read-back`` is as in the rows of `run.py`; without compression (``--compression off``) the source's part is the
same whether or not it takes a destination that writes for a slow network. On a disk, ``--directory`` should be on a
file system made for this (`mkfs.ext4` on a file, `mount -o loop`): see freed inodes in `docs/performance.md`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import trio
from ours import Engine, engine
from trees import FAST, Place, make_large, make_mixed, make_small

LOOK_EVERY = 0.01


@dataclass
class Way:
    """One setting, and what was measured with it."""

    name: str
    made: Engine
    seconds: list[float] = field(default_factory=list)
    source: list[float] = field(default_factory=list)
    destination: list[float] = field(default_factory=list)

    def line(self, key: str) -> str:
        low, high = min(self.seconds), max(self.seconds)
        ends = f"{statistics.median(self.source):.2f} + {statistics.median(self.destination):.2f}"
        middle = statistics.median(self.seconds)
        return f"{key} workers_per_session {self.name}: {middle:.2f} s ({low:.2f} to {high:.2f}), CPU-s {ends}"


class Ends:
    """CPU time of the workers that wait now, and of what they fork, by the end they work for: a destination's have its
    books open. What is started meanwhile waits for the next transfer."""

    def __init__(self, books: Path) -> None:
        self._books = str(books)
        self._used: dict[tuple[int, float], float] = {}
        self._receives: set[tuple[int, float]] = set()
        self._workers: set[int] | None = None
        self.look()
        self._workers = {pid for pid, _ in self._used}
        # Spare workers, that do not know yet what they will be.
        self._before = dict(self._used)

    def look(self) -> None:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess, OSError):
                if self._workers is not None and not self._workers & {child.pid, child.ppid()}:
                    continue
                key = (child.pid, child.create_time())
                times = child.cpu_times()
                self._used[key] = times.user + times.system
                if key not in self._receives and self._has_books(child.pid):
                    self._receives.add(key)

    def _has_books(self, pid: int) -> bool:
        folder = f"/proc/{pid}/fd"
        return any(os.readlink(f"{folder}/{fd}").startswith(self._books) for fd in os.listdir(folder))

    def totals(self) -> tuple[float, float]:
        """Of the source and of the destination, so far."""
        since = {key: used - self._before.get(key, 0.0) for key, used in self._used.items()}
        received = sum(used for key, used in since.items() if key in self._receives)
        return sum(since.values()) - received, received


async def once(way: Way, place: Place, name: str, books: Path, options: argparse.Namespace) -> None:
    place.warm(name)
    target = place.fresh()
    ends = Ends(books)
    started = time.monotonic()
    task = await way.made.transfer(
        f"/{name}",
        f"/{target.name}",
        recursive=(place.source / name).is_dir(),
        verify_checksum=not options.not_read_back,
        compression=options.compression,
    )
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            while True:
                ends.look()
                await trio.sleep(LOOK_EVERY)

        nursery.start_soon(watch)
        await way.made.wait(task)
        way.seconds.append(time.monotonic() - started)
        nursery.cancel_scope.cancel()
    for end, used in zip((way.source, way.destination), ends.totals(), strict=True):
        end.append(used)
    if target.is_file():
        target.unlink()
        place.settle()
    await way.made.rest()


async def measure(key: str, place: Place, options: argparse.Namespace) -> None:
    if key in ("G1", "G1d"):
        name = make_large(place.source, options.large_mib)
    else:
        name = make_mixed(place.source) if key == "G3m" else make_small(place.source, options.files)
    async with AsyncExitStack() as stack:
        ways = []
        for setting in ("1", options.beside):
            books = place.directory / f"agents-{setting}"
            count = None if setting == "auto" else int(setting)
            made = engine(books, place.source, place.destination, workers_per_session=count)
            ways.append((Way(setting, await stack.enter_async_context(made)), books / "destination"))
        for turn in range(options.runs):
            # Who begins has the disk as the one before left it: they take turns in that, too.
            for way, books in ways if turn % 2 else reversed(ways):
                await once(way, place, name, books, options)
        for way, _ in ways:
            print(way.line(key), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("goals", nargs="+", choices=["G1", "G1d", "G2", "G2d", "G3m"])
    parser.add_argument("--with", dest="beside", default="auto")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--large-mib", type=int, default=1024)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--not-read-back", action="store_true")
    parser.add_argument("--compression", default="auto", choices=["auto", "off"])
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    options = parser.parse_args()
    for key in options.goals:
        durable = key not in ("G1", "G2")
        base = options.directory if durable or not FAST.is_dir() else FAST
        with tempfile.TemporaryDirectory(prefix="towpath-benchmark-", dir=base) as name:
            trio.run(measure, key, Place(Path(name), durable=durable), options)


if __name__ == "__main__":
    main()
