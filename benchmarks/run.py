"""Measures Towpath beside the programs people would use instead, in one run on one machine.

    python benchmarks/run.py G1 [G1d G2 G2d G3 G4 G6 G7 G8] [--runs 3] [--json FILE] [--chart FILE.svg]

G1   one large file in memory (tmpfs)          G4   a tree of small files again, nothing changed
G1d  the same, durable on disk                 G6   memory of all processes of an end, by number of files
G2   20,000 files of 4 KiB in memory           G7   from submit to the first byte under its name
G2d  the same, durable on disk                 G8   listing a folder through the relay while a transfer runs
G3   100 files of 10 MiB; a Python installation, both durable

Ours is always encrypted, digested at both ends and read back. On disk every peer's command is followed by a sync, so
that both sides of a ratio are durable. Before each run the source is read once, and as much as will be written is
written and removed, so that neither side pays for cold pages; every run writes to a new place and nothing is removed
before the end. Peers that are not installed are left out (`install-peers.sh`).

G5, long and lossy paths: `wan.py`, which makes network namespaces and needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import trio
from ours import Engine, engine
from peers import Peer, peers
from report import Goal, Row, chart, table, to_json

MIB = 1024 * 1024
NAME = "Towpath"
FAST = Path("/dev/shm")


def cpu_used() -> float:
    """CPU-seconds of this process, its living descendants and those it has waited for."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    waited = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = own.ru_utime + own.ru_stime + waited.ru_utime + waited.ru_stime
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


class Place:
    """A directory to measure in: what is written goes below it and stays until the end."""

    def __init__(self, directory: Path, *, durable: bool) -> None:
        self.directory = directory
        self.durable = durable
        self.source = directory / "source"
        self.destination = directory / "destination"
        self.source.mkdir()
        self.destination.mkdir()
        self._number = 0

    def fresh(self) -> Path:
        self._number += 1
        return self.destination / f"{self._number:03d}"

    def settle(self) -> None:
        if self.durable:
            os.sync()

    def warm(self, name: str) -> None:
        """Read the source and touch as much memory as a copy needs."""
        total = 0
        for path in (self.source / name).rglob("*") if (self.source / name).is_dir() else [self.source / name]:
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_size
                with path.open("rb", buffering=0) as file:
                    while file.read(MIB):
                        continue
        scratch = self.directory / "scratch"
        block = bytes(MIB)
        with scratch.open("wb", buffering=0) as file:
            for _ in range(total // MIB + 1):
                file.write(block)
        scratch.unlink()
        os.sync()


def make_large(place: Place, mib: int) -> str:
    block = os.urandom(64 * MIB)
    with (place.source / "large").open("wb") as file:
        for start in range(0, mib, 64):
            file.write(block[: min(64, mib - start) * MIB])
    return "large"


def make_small(place: Place, files: int) -> str:
    for number in range(files):
        folder = place.source / "small" / f"{number // 100:05d}"
        if not number % 100:
            folder.mkdir(parents=True)
        (folder / f"{number:07d}").write_bytes(os.urandom(4096))
    return "small"


def make_middle(place: Place) -> str:
    (place.source / "middle").mkdir()
    for number in range(100):
        (place.source / "middle" / f"{number:03d}").write_bytes(os.urandom(10 * MIB))
    return "middle"


def make_mixed(place: Place) -> str:
    """A real tree: this Python's standard library, without what is installed beside it."""
    library = Path(sysconfig.get_paths()["stdlib"])
    shutil.copytree(library, place.source / "mixed", symlinks=True, ignore=shutil.ignore_patterns("site-packages"))
    return "mixed"


async def timed(row: Row, work: Callable[[], Awaitable[None]]) -> None:
    before, started = cpu_used(), time.monotonic()
    await work()
    row.seconds.append(time.monotonic() - started)
    row.cpu.append(cpu_used() - before)


async def ours_once(
    made: Engine, place: Place, row: Row, name: str, *, to: Path | None = None, sync: int | None = None
) -> Path:
    place.warm(name)
    target = to or place.fresh()
    recursive = (place.source / name).is_dir()

    async def work() -> None:
        task = await made.transfer(f"/{name}", f"/{target.name}", recursive=recursive, sync_level=sync)
        await made.wait(task)

    await timed(row, work)
    return target


async def peer_once(peer: Peer, place: Place, row: Row, name: str, *, to: Path | None = None) -> Path | None:
    source = place.source / name
    make = peer.folder if source.is_dir() else peer.file
    if make is None:
        return None
    place.warm(name)
    target = to or place.fresh()
    if source.is_dir():
        target.mkdir(exist_ok=True)
    command = make(source, target)

    async def work() -> None:
        subprocess.run(["sh", "-c", command], check=True, stdout=subprocess.DEVNULL)
        place.settle()

    try:
        await timed(row, work)
    except subprocess.CalledProcessError as error:
        print(f"  {peer.name} failed ({error}); left out", file=sys.stderr)
        return None
    return target


async def compare(
    key: str, place: Place, name: str, amount: float, unit: str, runs: int, *, lane: bool = False, again: bool = False
) -> list[Row]:
    """Ours and every peer at one piece of work, taking turns."""
    rows = {NAME: Row(key, NAME, "TLS 1.3", amount, unit)}
    with peers(place.directory / "peers", place.source) as found:
        async with engine(place.directory / "agents", place.source, place.destination) as made:
            copies: dict[str, Path] = {}
            for _ in range(runs):
                if again and NAME not in copies:
                    copies[NAME] = await ours_once(made, place, Row("", "", "", 1, ""), name)
                await ours_once(made, place, rows[NAME], name, to=copies.get(NAME), sync=2 if again else None)
                if lane:
                    row = rows.setdefault("bare lane", Row(key, "bare lane", "TLS 1.3", amount, unit))
                    place.warm(name)
                    result = await trio.to_thread.run_sync(_reference, place.source / name, place.fresh())
                    place.settle()
                    row.seconds.append(result["seconds"])
                    row.cpu.append(result["cpu"])
                for peer in found:
                    if again and not peer.name.startswith("rsync"):
                        continue
                    if again and peer.name not in copies:
                        first = await peer_once(peer, place, Row("", "", "", 1, ""), name)
                        if first is None:
                            continue
                        copies[peer.name] = first
                    row = rows.get(peer.name) or Row(key, peer.name, peer.wire, amount, unit)
                    if await peer_once(peer, place, row, name, to=copies.get(peer.name)) is not None:
                        rows[peer.name] = row
    return [row for row in rows.values() if row.seconds]


def _reference(source: Path, destination: Path) -> dict[str, float]:
    # In a process of its own: this one has threads, which a fork must not meet.
    command = [sys.executable, str(Path(__file__).with_name("lane_reference.py")), str(source), str(destination)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


async def memory(place: Place, files: int) -> None:
    """G6: print the memory of all processes, the destination's state on disk, and the manifest, as files go by."""
    name = make_small_empty(place, files)
    async with engine(place.directory / "agents", place.source, place.destination) as made:
        task = await made.transfer(f"/{name}", "/copy", recursive=True)
        print("| files | RSS of all processes MiB | state MiB | of it manifest MiB |\n| --- | --- | --- | --- |")
        step = max(files // 10, 1)
        shown = 0
        while True:
            observed = made.destination.service.get_task(task)
            done = observed.counters.files_transferred
            if done >= shown + step or observed.completion_time:
                shown = done
                state = [path for path in (place.directory / "agents").rglob("*") if path.is_file()]
                manifest = sum(path.stat().st_size for path in state if path.suffix == ".manifest")
                total = sum(path.stat().st_size for path in state)
                print(f"| {done} | {rss() / MIB:.0f} | {total / MIB:.1f} | {manifest / MIB:.1f} |", flush=True)
            if observed.completion_time:
                return
            await trio.sleep(0.1)


def make_small_empty(place: Place, files: int) -> str:
    for number in range(files):
        folder = place.source / "empty" / f"{number // 1000:06d}"
        if not number % 1000:
            folder.mkdir(parents=True)
        (folder / f"{number:08d}").touch()
    return "empty"


def rss() -> int:
    own = psutil.Process()
    return sum(process.memory_info().rss for process in [own, *own.children(recursive=True)])


async def latency(place: Place, runs: int) -> None:
    """G7: from submit to a byte under its final name, with a spare worker waiting at both ends."""
    (place.source / "byte").write_bytes(b"1")
    measured = []
    async with engine(place.directory / "agents", place.source, place.destination) as made:
        for _ in range(runs):
            target = place.fresh()
            started = time.monotonic()
            task = await made.transfer("/byte", f"/{target.name}", recursive=False)
            while not target.exists():
                await trio.sleep(0.001)
            measured.append(time.monotonic() - started)
            await made.wait(task)
            # Until the next spare workers wait.
            await trio.sleep(4)
    median = statistics.median(measured) * 1000
    print(f"G7 submit to first byte under its name: {median:.0f} ms, median of {runs} (goal: under 150)")


def listing_under_load(directory: Path, mib: int) -> None:
    """G8: `ls` through a real relay while a large transfer runs between the same agents."""
    from first_light import little_world, make_sources
    from globus_sdk import TransferData

    from agent.cli.profile import Profile
    from agent.cli.relay_client import Relay

    with little_world(directory) as world:
        ends = world["endpoints"]
        make_sources(Path(ends["alpha"]["root"]), mib, 2000)
        profile = Profile(
            relay_url=world["relay_url"],
            ca_file=world["ca_file"],
            client_id=world["client_id"],
            client_secret=world["client_secret"],
        )
        with Relay(profile) as relay:
            source, destination = ends["alpha"]["collection_id"], ends["beta"]["collection_id"]
            data = TransferData(source_endpoint=source, destination_endpoint=destination, verify_checksum=True)
            data.add_item("/large", "/large-copy", recursive=True)
            data.add_item("/small", "/small-copy", recursive=True)
            task = relay.transfer.submit_transfer(data)["task_id"]
            times = []
            while relay.transfer.get_task(task)["status"] == "ACTIVE" and len(times) < 500:
                for collection in (source, destination):
                    started = time.monotonic()
                    relay.transfer.operation_ls(collection, path="/")
                    times.append(time.monotonic() - started)
    if len(times) < 20:
        print("G8: the transfer was over too soon; give it a larger --large-mib")
        return
    worst, median = statistics.quantiles(times, n=20)[-1] * 1000, statistics.median(times) * 1000
    print(f"G8 ls during a transfer: p95 {worst:.0f} ms, median {median:.0f} ms of {len(times)} (goal: p95 under 150)")


LARGE_GOALS = [Goal("curl from nginx", 1.0), Goal("GridFTP private", 1.5), Goal("scp", 2.0), Goal("bare lane", 0.9)]
SMALL_GOALS = [Goal("rsync over ssh", 1.5), Goal("GridFTP private", 5.0), Goal("rsync daemon", 1.0)]
GOALS = {
    "G1": LARGE_GOALS,
    "G1d": [Goal("bare lane", 0.85), Goal("GridFTP private, checksum", 4.0)],
    "G2": SMALL_GOALS,
    "G2d": [Goal("cp", 0.9), Goal("rsync over ssh", 1.0)],
    "G3 files of 10 MiB": [
        Goal(name, 1.2) for name in ("scp", "rsync over ssh", "tar over TLS (socat)", "GridFTP private")
    ],
    "G3 mixed tree": [Goal(name, 1.2) for name in ("scp", "rsync over ssh", "tar over TLS (socat)", "GridFTP private")],
    "G4": [Goal("rsync over ssh", 1.0)],
}


async def measure(key: str, place: Place, options: argparse.Namespace) -> dict[str, list[Row]]:
    runs = options.runs
    if key in ("G1", "G1d"):
        name = make_large(place, options.large_mib)
        return {key: await compare(key, place, name, options.large_mib, "MiB", runs, lane=True)}
    if key in ("G2", "G2d", "G4"):
        name = make_small(place, options.files)
        return {key: await compare(key, place, name, options.files, "files", runs, again=key == "G4")}
    if key == "G3":
        middle = "G3 files of 10 MiB"
        results = {middle: await compare(middle, place, make_middle(place), 1000, "MiB", runs)}
        shutil.rmtree(place.directory / "peers")
        shutil.rmtree(place.directory / "agents")
        mixed = make_mixed(place)
        files = sum(path.is_file() for path in (place.source / mixed).rglob("*"))
        results["G3 mixed tree"] = await compare("G3 mixed tree", place, mixed, files, "files", runs)
        return results
    if key == "G6":
        await memory(place, options.files)
    elif key == "G7":
        await latency(place, max(runs, 5))
    else:
        await trio.to_thread.run_sync(listing_under_load, place.directory / "world", options.large_mib)
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("goals", nargs="+", choices=["G1", "G1d", "G2", "G2d", "G3", "G4", "G6", "G7", "G8"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--large-mib", type=int, default=4096)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chart", type=Path)
    options = parser.parse_args()
    results: dict[str, list[Row]] = {}
    for key in options.goals:
        durable = key not in ("G1", "G2")
        base = options.directory if durable or not FAST.is_dir() else FAST
        with tempfile.TemporaryDirectory(prefix="towpath-benchmark-", dir=base) as name:
            found = trio.run(measure, key, Place(Path(name), durable=durable), options)
        results.update(found)
        for work, rows in found.items():
            print(table(work, rows, GOALS.get(work, [])), end="\n\n", flush=True)
    if options.json:
        options.json.write_text(to_json(results))
    if options.chart and results:
        chart(results, options.chart)


if __name__ == "__main__":
    main()
