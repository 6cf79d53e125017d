"""G5: long, lossy paths. Ours beside iperf3 with the same congestion control, on an emulated path, in one run.

    python benchmarks/wan.py [--mib 256] [--rtt 100] [--rate 200] [--loss 0 0.1 1] [--files 20000] [--text 128]
        [--json FILE] [--results FILE]
    python benchmarks/wan.py --mib 0 --files 0 --text 256 --results FILE

Root, network namespaces and /dev/net/tun are needed; iperf3 is left out where it is not installed. Each cell moves
one file of --mib MiB from memory to memory, encrypted, digested and read back; its rate counts from the first content
byte to the end of the task. iperf3 sends as many bytes over one connection; GridFTP, in the clear and whole commands,
has its best number of streams. Then --files files of 4 KiB go over the path, and over one without a round-trip time,
and --text MiB of program text without compression and with it, which the second command does alone; --results
adds what was measured to the results of `run.py`, for the tables of `report.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import trio
from ours import Engine, engine
from report import Measure, Result, Row, store
from wan_path import ADDRESSES, Shape, long_path, namespace, why_not, within

from protocol.control import Compression

MIB = 1024 * 1024
FAST = Path("/dev/shm")
SOURCE, DESTINATION = 0, 1
GRIDFTP_STREAMS = (1, 4, 8)


@dataclass
class Cell:
    """What one path gave; rates in Mbit/s, times in seconds."""

    rtt_ms: float
    rate_mbit: float
    loss_percent: float
    ours: float = 0.0
    iperf3: float | None = None
    gridftp: float | None = None
    gridftp_streams: int = 0
    first_byte: float = 0.0
    lanes: int = 0
    again_mib: float = 0.0
    limited_by: str = ""
    files: int = 0
    files_seconds: float = 0.0
    # Mbit/s of program text, as it is and compressed where that pays.
    plain: float = 0.0
    compressed: float = 0.0

    @property
    def ratio(self) -> float | None:
        return self.ours / self.iperf3 if self.iperf3 else None


def congestion_control() -> str:
    """What the engine would choose for a long path here."""
    allowed = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control").read_text().split()
    return "bbr" if "bbr" in allowed else Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()


def measure_iperf3(mib: int) -> float | None:
    """Mbit/s of one connection that sends as much the same way."""
    if shutil.which("iperf3") is None:
        return None
    server = subprocess.Popen(
        ["ip", "netns", "exec", namespace(SOURCE), "iperf3", "-s", "-1", "-B", ADDRESSES[SOURCE]],
        stdout=subprocess.DEVNULL,
    )
    time.sleep(0.5)
    client = ["iperf3", "-c", ADDRESSES[SOURCE], "-R", "-n", f"{mib}M", "-C", congestion_control(), "-J"]
    try:
        done = subprocess.run(
            ["ip", "netns", "exec", namespace(DESTINATION), *client],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        end = json.loads(done.stdout).get("end", {})
        return float(end["sum_received"]["bits_per_second"]) / 1e6
    except (KeyError, ValueError, subprocess.TimeoutExpired) as error:
        print(f"iperf3 failed: {error!r}", file=sys.stderr)
        return None
    finally:
        server.terminate()
        server.wait()


def _wait_for(address: str, port: int) -> None:
    def try_it() -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection((address, port), 1).close()
            except OSError:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.1)
            else:
                return

    within(SOURCE, try_it)


def measure_gridftp(folder: Path, mib: int) -> tuple[float | None, int]:
    """Mbit/s of GridFTP in the clear with its best number of streams, whole commands; and that number."""
    if not shutil.which("globus-url-copy") or not shutil.which("globus-gridftp-server"):
        return None, 0
    address, content = ADDRESSES[SOURCE], folder / "gridftp-source"
    with content.open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(MIB))
    command = ["globus-gridftp-server", "-p", "2811", "-aa", "-anonymous-user", "root", "-allow-root", "-s"]
    command += [
        "-control-interface",
        address,
        "-data-interface",
        address,
        "-log-level",
        "ERROR",
        "-logfile",
        str(folder / "gridftp.log"),
    ]
    server = subprocess.Popen(["ip", "netns", "exec", namespace(SOURCE), *command], stderr=subprocess.DEVNULL)
    _wait_for(address, 2811)
    found: dict[int, float] = {}
    try:
        for streams in GRIDFTP_STREAMS:
            target = folder / f"gridftp-{streams}"
            client = ["globus-url-copy", "-p", str(streams), "-nodcau", "-tcp-bs", str(8 * MIB)]
            client += [f"ftp://{address}:2811{content}", f"file://{target}"]
            begun = time.monotonic()
            done = subprocess.run(
                ["ip", "netns", "exec", namespace(DESTINATION), *client], capture_output=True, timeout=300, check=False
            )
            if done.returncode:
                print(f"GridFTP failed: {done.stderr.decode(errors='replace').strip()}", file=sys.stderr)
                continue
            found[streams] = mib * MIB * 8 / (time.monotonic() - begun) / 1e6
            target.unlink()
    finally:
        server.terminate()
        server.wait()
        content.unlink()
    best = max(found, key=lambda streams: found[streams], default=0)
    return found.get(best), best


def far_source(made: Engine) -> None:
    """Have the source listen in its own namespace; everything else of this process is the destination's."""
    bind = made.source.service._bind

    def bind_there() -> Any:
        sockets: list[Any] = []
        within(SOURCE, lambda: sockets.append(bind()))
        return sockets[0]

    made.source.service._bind = bind_there  # type: ignore[method-assign]


async def move(
    made: Engine, name: str, cell: Cell, *, recursive: bool, compression: Compression = "auto"
) -> tuple[float, float]:
    """Move something: seconds from submission to the first byte, and from there to the end."""
    begun = time.monotonic()
    target = f"/{name}-{time.monotonic_ns()}"
    task = await made.transfer(f"/{name}", target, recursive=recursive, compression=compression)
    counter = made.destination.directory / "tasks" / task / "received"
    first = None
    while first is None:
        if counter.exists() and int.from_bytes(counter.read_bytes(), "little"):
            first = time.monotonic()
        await trio.sleep(0.002)
    seen: dict[str, int] = {}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch, made, task, cell, seen)
        observed = await made.wait(task)
        nursery.cancel_scope.cancel()
    cell.again_mib = max(cell.again_mib, observed.counters.bytes_sent_again / MIB)
    cell.limited_by = max(seen, key=lambda key: seen[key], default="")
    return first - begun, time.monotonic() - first


async def _watch(made: Engine, task: str, cell: Cell, seen: dict[str, int]) -> None:
    while True:
        flow = made.destination.service.get_task(task).flow
        if flow is not None:
            cell.lanes = max(cell.lanes, len(flow.lanes))
            seen[flow.limited_by] = seen.get(flow.limited_by, 0) + 1
        await trio.sleep(1)


def write_text(path: Path, mib: int) -> None:
    """The text of Python's own library, again and again, each time differently shuffled."""
    random, texts = Random(1), [each.read_bytes() for each in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    with path.open("wb") as file:
        while file.tell() < mib * MIB:
            random.shuffle(texts)
            file.write(b"".join(texts)[: mib * MIB - file.tell()])


async def measure_ours(directory: Path, cell: Cell, mib: int, files: int, text: int) -> None:
    source, destination = directory / "source", directory / "destination"
    destination.mkdir()
    source.mkdir()
    with (source / "large").open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(MIB))
    for number in range(files):
        folder = source / "small" / f"{number // 100:05d}"
        if not number % 100:
            folder.mkdir(parents=True)
        (folder / f"{number:07d}").write_bytes(os.urandom(4096))
    made = engine(directory / "state", source, destination, address=ADDRESSES[SOURCE], prepare=far_source)
    async with made as both:
        if mib:
            cell.first_byte, seconds = await move(both, "large", cell, recursive=False)
            cell.ours = mib * MIB * 8 / seconds / 1e6
        if files:
            before, seconds = await move(both, "small", cell, recursive=True)
            cell.files, cell.files_seconds = files, before + seconds
        if text:
            write_text(source / "text", text)
            _, seconds = await move(both, "text", cell, recursive=False, compression="off")
            cell.plain = text * MIB * 8 / seconds / 1e6
            _, seconds = await move(both, "text", cell, recursive=False)
            cell.compressed = text * MIB * 8 / seconds / 1e6


def run_cell(shape: Shape, mib: int, files: int, text: int = 0) -> Cell:
    """One path: iperf3, then ours."""
    cell = Cell(shape.rtt * 1000, shape.rate / 1e6, shape.loss * 100)
    with (
        long_path(shape, congestion_control()),
        tempfile.TemporaryDirectory(dir=FAST if FAST.is_dir() else None) as folder,
    ):
        if mib:
            cell.iperf3 = measure_iperf3(mib)
            cell.gridftp, cell.gridftp_streams = measure_gridftp(Path(folder), mib)
        # In a thread of its own, so that this one stays outside; workers that it starts are inside, too.
        within(DESTINATION, lambda: trio.run(measure_ours, Path(folder), cell, mib, files, text))
    return cell


def keep(path: Path, cells: list[Cell], mib: int, text: int) -> None:
    """Add all cells to the results of run.py."""
    for cell in cells:
        if cell.ours:
            rates = {"Towpath": cell.ours, "iperf3": cell.iperf3, "GridFTP": cell.gridftp}
            streams = f"clear, best: {cell.gridftp_streams}"
            wires = {"Towpath": "TLS 1.3", "iperf3": "clear, one stream", "GridFTP": streams}
            key = f"G5-{cell.loss_percent:g}"
            rows = [
                Row(key, name, wires[name], mib, "MiB", [mib * MIB * 8 / rate / 1e6])
                for name, rate in rates.items()
                if rate is not None
            ]
            store(path, Result(key, rows))
        if cell.plain:
            over = f"{text} MiB at {cell.rate_mbit:.0f} Mbit/s and {cell.rtt_ms:.0f} ms"
            found = [
                Measure(f"{over}, as it is", cell.plain, "Mbit/s"),
                Measure(f"{over}, compressed where that pays", cell.compressed, "Mbit/s"),
            ]
            store(path, Result("G5z", [], found))
    small = [cell for cell in cells if cell.files]
    if small:
        near, far = small
        times = far.files_seconds / near.files_seconds
        found = [
            Measure(f"{near.files:,} files of 4 KiB without a round-trip time", near.files_seconds, "s"),
            Measure(f"the same over {far.rtt_ms:.0f} ms", far.files_seconds, "s"),
            Measure("in times of the former", times, "x", limit=1.3),
        ]
        store(path, Result("G5f", [], found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rtt", type=float, default=100.0, help="milliseconds")
    parser.add_argument("--rate", type=float, default=200.0, help="Mbit/s")
    parser.add_argument("--loss", type=float, nargs="*", default=[0.0, 0.1, 1.0], help="per cent")
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--text", type=int, default=128, help="MiB of text, to be compressed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--results", type=Path, help="add what compression gave to this file of run.py")
    options = parser.parse_args()
    reason = why_not()
    if reason:
        sys.exit(f"This measurement cannot be made here: {reason}.")
    cells = []
    losses = options.loss if options.mib else []
    if losses:
        print("| round trip, rate | loss | ours | iperf3 | ratio | GridFTP | first byte | lanes | again | limited by |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for loss in losses:
        cell = run_cell(Shape(options.rtt / 1000, options.rate * 1e6, loss / 100), options.mib, 0)
        cells.append(cell)
        iperf3 = "-" if cell.iperf3 is None else f"{cell.iperf3:.0f} Mbit/s"
        gridftp = "-" if cell.gridftp is None else f"{cell.gridftp:.0f} Mbit/s (-p {cell.gridftp_streams})"
        ratio = "-" if cell.ratio is None else f"{cell.ratio:.2f}"
        print(
            f"| {cell.rtt_ms:.0f} ms, {cell.rate_mbit:.0f} Mbit/s | {loss} % | {cell.ours:.0f} Mbit/s "
            f"| {iperf3} | {ratio} | {gridftp} | {cell.first_byte:.2f} s "
            f"| {cell.lanes} | {cell.again_mib:.1f} MiB | {cell.limited_by} |",
            flush=True,
        )
    if options.files:
        pair = [run_cell(Shape(rtt, options.rate * 1e6, 0.0), 0, options.files) for rtt in (0.0, options.rtt / 1000)]
        cells += pair
        near, far = (cell.files_seconds for cell in pair)
        link = options.files * 4096 * 8 / (options.rate * 1e6)
        print(
            f"{options.files} files of 4 KiB: {near:.2f} s without round-trip time, {far:.2f} s at "
            f"{options.rtt:.0f} ms (ratio {far / near:.2f}; the link alone takes {link:.2f} s)."
        )
    if options.text:
        cell = run_cell(Shape(options.rtt / 1000, options.rate * 1e6, 0.0), 0, 0, options.text)
        cells.append(cell)
        print(f"{options.text} MiB of text: {cell.plain:.0f} Mbit/s as it is, {cell.compressed:.0f} Mbit/s compressed.")
    if options.results:
        keep(options.results, cells, options.mib, options.text)
    if options.json:
        options.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=2))


if __name__ == "__main__":
    main()
