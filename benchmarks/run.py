"""Measures Towpath beside the programs people would use instead, in one run on one machine.

    python benchmarks/run.py G1 [G1d G2 G2d G3 G3m G4 G6 G7 G8] [--runs 3] [--json FILE]
    python benchmarks/report.py FILE --markdown docs/benchmarks.md --chart docs/benchmarks.svg

G1   one large file in memory (tmpfs)          G4   a tree of small files again, nothing changed, in memory
G1d  the same, durable on disk                 G6   memory of all processes of an end, by number of files
G2   20,000 files of 4 KiB in memory           G7   from submit to the first byte under its name
G2d  the same, durable on disk                 G8   listing a folder through the relay while a transfer runs
G3   100 files of 10 MiB, durable              G3m  a real tree (Python's standard library), durable

Ours is always encrypted and digested at both ends. Peers do not read back what they have written, so where they are
what it is compared with (G1, G2, G2d, G3, G3m) ours has two rows, and the one that is not read back is held against
the goal; the durable goal whose own words ask for read-back (G1d) is held against the row with it, which is the only
one, as is G4's, where nothing is written. On disk every peer's command is followed by a sync, so that both sides of a
ratio are durable. Before each run the source is read once, and as much as will be written is written and removed, so
that neither side pays for cold pages. Every run writes to a new place; trees stay until the end, single files are
removed after each run. Peers that are not installed are left out (`install-peers.sh`). ``--json`` adds to what the file
holds of other goals.

G5, long and lossy paths, and G5z, compression on one: `wan.py`, which makes network namespaces and needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import trio
from ours import Engine, engine
from peers import Peer, peers
from report import DISK, GOALS, LANE, NAME, Measure, Result, Row, store, table
from trees import FAST, MIB, Place, make_empty, make_large, make_middle, make_mixed, make_small
from usage import cpu_used, larger_end, used_memory

# Goals that `wan.py` measures.
ELSEWHERE = ("G5z",)


async def timed(row: Row, work: Callable[[], Awaitable[None]]) -> None:
    before, started = cpu_used(), time.monotonic()
    await work()
    row.seconds.append(time.monotonic() - started)
    row.cpu.append(cpu_used() - before)


async def ours_once(
    made: Engine,
    place: Place,
    row: Row,
    name: str,
    *,
    to: Path | None = None,
    sync: int | None = None,
    read_back: bool = True,
) -> Path:
    place.warm(name)
    target = to or place.fresh()
    recursive = (place.source / name).is_dir()

    async def work() -> None:
        task = await made.transfer(
            f"/{name}", f"/{target.name}", recursive=recursive, sync_level=sync, verify_checksum=read_back
        )
        await made.wait(task)

    await timed(row, work)
    await made.rest()
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


@dataclass(frozen=True)
class Work:
    """One piece of work. ``lane``: beside the bare lane; ``disk``: and what the disk alone can do. ``again``: into a
    tree that is there already. ``read_back`` None: ours once without, which counts, and once with it."""

    key: str
    name: str
    amount: float
    unit: str
    peers: tuple[str, ...]
    lane: bool = False
    disk: bool = False
    again: bool = False
    read_back: bool | None = True


async def compare(work: Work, place: Place, runs: int) -> list[Row]:
    """Ours and every peer at one piece of work, taking turns."""
    key, name = work.key, work.name
    rows: dict[str, Row] = {}
    one_file = not (place.source / name).is_dir()

    def row_of(title: str, wire: str) -> Row:
        return rows.setdefault(title, Row(key, title, wire, work.amount, work.unit))

    def done_with(target: Path | None) -> None:
        # Memory and disk would not hold all copies of a large file.
        if one_file and target is not None:
            target.unlink(missing_ok=True)
            place.settle()

    with peers(place.directory / "peers", place.source) as found:
        async with engine(place.directory / "agents", place.source, place.destination) as made:
            copies: dict[str, Path] = {}
            for _ in range(runs):
                for title, read_back in _variants(work.read_back):
                    if work.again and title not in copies:
                        copies[title] = await ours_once(made, place, Row("", "", "", 1, ""), name)
                    sync = 2 if work.again else None
                    row = row_of(title, "TLS 1.3")
                    done_with(
                        await ours_once(made, place, row, name, to=copies.get(title), sync=sync, read_back=read_back)
                    )
                for title, command in _references(work):
                    place.warm(name)
                    target = place.fresh()
                    result = await trio.to_thread.run_sync(command, place.source / name, target)
                    row = row_of(title, "TLS 1.3" if title == LANE else "local")
                    row.seconds.append(result["seconds"])
                    row.cpu.append(result["cpu"])
                    done_with(target)
                for peer in found:
                    if peer.name not in work.peers:
                        continue
                    if work.again and peer.name not in copies:
                        first = await peer_once(peer, place, Row("", "", "", 1, ""), name)
                        if first is None:
                            continue
                        copies[peer.name] = first
                    row = row_of(peer.name, peer.wire)
                    done_with(await peer_once(peer, place, row, name, to=copies.get(peer.name)))
    return [row for row in rows.values() if row.seconds]


def _variants(read_back: bool | None) -> list[tuple[str, bool]]:
    if read_back is None:
        return [(f"{NAME}, not read back", False), (f"{NAME}, read back", True)]
    return [(f"{NAME}, read back" if read_back else NAME, read_back)]


def _references(work: Work) -> list[tuple[str, Callable[[Path, Path], dict[str, float]]]]:
    return [*([(LANE, _reference)] if work.lane else []), *([(DISK, disk_alone)] if work.disk else [])]


def disk_alone(source: Path, destination: Path) -> dict[str, float]:
    """The disk's own durable write-and-read-back: a copy in blocks, synced, dropped from the cache and read, where
    every 16 MiB are read while the next are written."""
    used, started = time.process_time(), time.monotonic()
    buffer, check = memoryview(bytearray(16 * MIB)), memoryview(bytearray(16 * MIB))
    written: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
    target = os.open(destination, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)

    def read() -> None:
        while (part := written.get()) is not None:
            os.fdatasync(target)
            os.posix_fadvise(target, *part, os.POSIX_FADV_DONTNEED)
            os.preadv(target, [check[: part[1]]], part[0])

    with source.open("rb", buffering=0) as file:
        reader = threading.Thread(target=read)
        reader.start()
        offset = 0
        while count := file.readinto(buffer):
            offset += os.pwrite(target, buffer[:count], offset)
            written.put((offset - count, count))
        written.put(None)
        reader.join()
    os.fsync(target)
    os.close(target)
    return {"seconds": time.monotonic() - started, "cpu": time.process_time() - used}


def _reference(source: Path, destination: Path) -> dict[str, float]:
    # In a process of its own: this one has threads, which a fork must not meet.
    command = [sys.executable, str(Path(__file__).with_name("lane_reference.py")), str(source), str(destination)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


async def memory(place: Place, files: int, *, flat: bool, mirror: bool, there: bool) -> list[Measure]:
    """G6: the memory of all processes, the destination's state on disk, and the manifest, as files go by. ``flat``: all
    of them are in one directory. ``mirror``: what the destination has and the source has not is deleted at the end.
    ``there``: the destination has all of them."""
    in_one = 1000 if not flat else files
    name = make_empty(place.source, files, in_one)
    if there:
        make_empty(place.destination / "copy", files, in_one)
    found = []
    async with engine(place.directory / "agents", place.source, place.destination) as made:
        used = cpu_used()
        task = await made.transfer(
            f"/{name}", f"/copy/{name}", recursive=True, mirror=mirror, sync_level=0 if there else None
        )
        step = max(files // 10, 1)
        shown = 0
        while True:
            observed = made.destination.service.get_task(task)
            done = observed.counters.files_skipped if there else observed.counters.files_transferred
            if done >= shown + step or observed.completion_time:
                shown = done
                state = [path for path in (place.directory / "agents").rglob("*") if path.is_file()]
                manifest = sum(path.stat().st_size for path in state if path.suffix == ".manifest")
                total = sum(path.stat().st_size for path in state)
                both, larger = used_memory() / MIB, larger_end() / MIB
                each = f"{(cpu_used() - used) / max(done, 1) * 1e6:.1f} us of CPU a file"
                print(f"{done} files: {both:.0f} MiB, state {total / MIB:.1f} MiB, {each}", flush=True)
                found.append(Measure(f"memory of all processes of both ends at {done} files", both, "MiB"))
                found.append(Measure(f"memory of the larger end at {done} files", larger, "MiB", 250))
                if done:
                    beside = (total - manifest) / done
                    found.append(Measure(f"state beside the manifest at {done} files", beside, "bytes a file", 120))
            if observed.completion_time:
                return found
            await trio.sleep(0.1)


async def latency(place: Place, runs: int) -> list[Measure]:
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
            await made.rest()
    median = statistics.median(measured) * 1000
    return [Measure(f"from submit to the first byte under its name, warm, median of {runs}", median, "ms", 150)]


def listing_under_load(directory: Path, options: argparse.Namespace) -> list[Measure]:
    """G8: `ls` through a real relay while a large transfer runs between the same agents."""
    from globus_sdk import TransferData
    from little_world import little_world

    from agent.cli.profile import Profile
    from agent.cli.relay_client import Relay

    with little_world(directory) as world:
        ends = world["endpoints"]
        root = Path(ends["alpha"]["root"])
        make_large(root, options.large_mib)
        make_small(root, 2000)
        profile = Profile(
            relay_url=world["relay_url"],
            ca_file=world["ca_file"],
            client_id=world["client_id"],
            client_secret=world["client_secret"],
        )
        with Relay(profile) as relay:
            source, destination = ends["alpha"]["collection_id"], ends["beta"]["collection_id"]
            data = TransferData(source_endpoint=source, destination_endpoint=destination, verify_checksum=True)
            data.add_item("/large", "/large-copy")
            data.add_item("/small", "/small-copy", recursive=True)
            task = relay.transfer.submit_transfer(data)["task_id"]
            times: list[float] = []
            while relay.transfer.get_task(task)["status"] == "ACTIVE" and len(times) < 500:
                for collection in (source, destination):
                    started = time.monotonic()
                    relay.transfer.operation_ls(collection, path="/")
                    times.append(time.monotonic() - started)
    if len(times) < 20:
        raise SystemExit("The transfer was over too soon; give it a larger --large-mib.")
    worst, median = statistics.quantiles(times, n=20)[-1] * 1000, statistics.median(times) * 1000
    return [
        Measure(f"ls through the relay during a transfer, p95 of {len(times)}", worst, "ms", 150),
        Measure("the same, median", median, "ms"),
    ]


ENCRYPTED = ("scp", "rsync over ssh", "tar over TLS (socat)", "GridFTP private")
SMALL = ("cp", "tar over TLS (socat)", "rsync over ssh", "rsync daemon", "GridFTP private", "scp")


async def measure(key: str, place: Place, options: argparse.Namespace) -> Result:
    runs = options.runs
    if key in ("G1", "G1d"):
        name = make_large(place.source, options.large_mib)
        if key == "G1":
            chosen: tuple[str, ...] = ("curl from nginx", "GridFTP private", "scp")
        else:
            chosen = ("cp", "GridFTP private, checksum")
        read_back = None if key == "G1" else True
        work = Work(key, name, options.large_mib, "MiB", chosen, lane=True, disk=key == "G1d", read_back=read_back)
        return Result(key, await compare(work, place, runs))
    if key in ("G2", "G2d", "G4"):
        name = make_small(place.source, options.files)
        chosen = ("rsync over ssh", "rsync daemon") if key == "G4" else SMALL
        read_back = True if key == "G4" else None
        work = Work(key, name, options.files, "files", chosen, again=key == "G4", read_back=read_back)
        return Result(key, await compare(work, place, runs))
    if key == "G3":
        work = Work(key, make_middle(place.source), 1000, "MiB", ENCRYPTED, read_back=None)
        return Result(key, await compare(work, place, runs))
    if key == "G3m":
        mixed = make_mixed(place.source, options.tree)
        files = sum(path.is_file() for path in (place.source / mixed).rglob("*"))
        return Result(key, await compare(Work(key, mixed, files, "files", ENCRYPTED, read_back=None), place, runs))
    if key == "G6":
        return Result(
            key, [], await memory(place, options.files, flat=options.flat, mirror=options.mirror, there=options.there)
        )
    if key == "G7":
        return Result(key, [], await latency(place, max(runs, 5)))
    return Result(key, [], await trio.to_thread.run_sync(listing_under_load, place.directory, options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("goals", nargs="+", choices=[key for key in GOALS if key not in ELSEWHERE])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--large-mib", type=int, default=4096)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--tree", type=Path, help="G3m: another Python's library (Debian's lacks most of the files)")
    parser.add_argument("--flat", action="store_true", help="G6: all files in one directory")
    parser.add_argument("--mirror", action="store_true", help="G6: as a mirror")
    parser.add_argument("--there", action="store_true", help="G6: the destination has all files already")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--json", type=Path, help="add the results to this file")
    options = parser.parse_args()
    for key in options.goals:
        durable = key not in ("G1", "G2", "G4")
        base = options.directory if durable or not FAST.is_dir() else FAST
        with tempfile.TemporaryDirectory(prefix="towpath-benchmark-", dir=base) as name:
            result = trio.run(measure, key, Place(Path(name), durable=durable), options)
        print(table(result), end="\n\n", flush=True)
        if options.json:
            store(options.json, result)


if __name__ == "__main__":
    main()
