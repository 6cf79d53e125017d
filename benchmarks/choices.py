"""What a task's, or an owner's, choices cost: each is measured with and without, one after the other, in one run.

    python benchmarks/choices.py attributes lists links twice sparse [--directory DIR] [--files N] [--names N] [--mib N]

attributes   small files with two extended attributes each, taken over or not: CPU time a file
lists        small files with an access list each that names two accounts, and as many without any, kept or not: CPU
             time a file
links        many names of a third as many empty files (`--each`), kept as names of one file or not: CPU time a name,
             memory of all processes of both ends (highest seen), and state on disk
twice        one large file and small ones from a source that reads everything once, or twice (`reading: twice`)
sparse       a file of 1 TB with some data in it, in large and in small pieces, beside a file of so much data

CPU time counts all processes of both ends; it means something on a busy machine, too, where seconds do not. Everything
is encrypted, digested and read back.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import trio
from ours import engine
from trees import FAST, MIB
from usage import cpu_used, used_memory

from agent.storage.access_lists import AccessList

TB = 10**12
ACCESS = b"system.posix_acl_access"


class Cost:
    """Of one transfer: seconds, CPU-seconds, the most memory that was seen, and the destination's state (bytes)."""

    def __init__(self) -> None:
        self.seconds = self.cpu = 0.0
        self.memory = self.state = 0

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s, {self.cpu:.2f} CPU-s"


async def cost(
    base: Path,
    source: Path,
    *,
    links: bool = False,
    attributes: bool = False,
    lists: int = 0,
    twice: bool = False,
) -> Cost:
    """Transfer a whole folder once, to a new place that is removed afterwards. ``lists``: so many access lists are
    kept; -1: they are looked for, and there are none."""
    place = Path(tempfile.mkdtemp(dir=base))
    (place / "destination").mkdir()
    found = Cost()
    try:
        async with engine(
            place / "agents", source, place / "destination", read_twice=twice, numbered_accounts=bool(lists)
        ) as made:
            began, used = time.perf_counter(), cpu_used()
            task = await made.transfer(
                "/",
                "/",
                recursive=True,
                preserve_hard_links=links,
                preserve_xattrs=attributes,
                preserve_acls=bool(lists),
            )
            while not made.destination.service.get_task(task).completion_time:
                found.memory = max(found.memory, used_memory())
                await trio.sleep(0.05)
            found.seconds, found.cpu = time.perf_counter() - began, cpu_used() - used
            observed = await made.wait(task)
            kept = observed.counters
            assert (kept.xattrs_left_out, kept.acls_kept, kept.acls_not_kept) == (0, max(0, lists), 0)
            assert bool(kept.hard_links_kept) == links
            for path in (place / "agents" / "destination").rglob("*"):
                with suppress(FileNotFoundError):
                    found.state += path.stat().st_size if path.is_file() else 0
    finally:
        shutil.rmtree(place)
    return found


def small_files(folder: Path, count: int, *, attributes: int = 0, access: bytes = b"") -> None:
    """Files of 4 KiB, a hundred in a folder, with so many attributes of 32 bytes each, and an access list."""
    for number in range(count):
        path = folder / f"{number // 100:05d}" / f"{number:07d}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(os.urandom(4096))
        for name in range(attributes):
            os.setxattr(path, f"user.attribute{name}", os.urandom(32))
        if access:
            os.setxattr(path, ACCESS, access)


def many_names(folder: Path, count: int, each: int) -> None:
    """Names of which so many are one file, a thousand in a folder, those of one file far apart."""
    files = -(-count // each)
    for number in range(count):
        parent = folder / f"{number // 1000:06d}"
        if not number % 1000:
            parent.mkdir()
        path = parent / f"{number:08d}"
        if number < files:
            path.touch()
        else:
            first = number % files
            path.hardlink_to(folder / f"{first // 1000:06d}" / f"{first:08d}")


def pieces(path: Path, size: int, count: int, length: int) -> None:
    """A file of this size with so many pieces of data, evenly spread."""
    block = os.urandom(length)
    with path.open("wb") as file:
        file.truncate(size)
        for number in range(count):
            file.seek(size // count * number)
            file.write(block)


async def of_attributes(base: Path, options: argparse.Namespace) -> None:
    source = base / "attributes"
    source.mkdir()
    small_files(source, options.files, attributes=2)
    without, taken = [], []
    for _ in range(options.runs):
        without.append(await cost(base, source))
        taken.append(await cost(base, source, attributes=True))
        print(f"attributes, {options.files} files: without {without[-1]}; with {taken[-1]}", flush=True)
    each = (least(taken) - least(without)) / options.files * 1e6
    print(f"attributes: {each:.0f} µs CPU a file more (the best run of either)", flush=True)


async def of_lists(base: Path, options: argparse.Namespace) -> None:
    listed = AccessList(6, 4, 0, users=((54321, 4), (54322, 0)), mask=4).packed()
    for name, access in (("with a list", listed), ("without any", b"")):
        source = base / f"lists-{len(access)}"
        source.mkdir()
        small_files(source, options.files, access=access)
        without, kept = [], []
        for _ in range(options.runs):
            without.append(await cost(base, source))
            kept.append(await cost(base, source, lists=options.files if access else -1))
            print(f"lists, {options.files} files {name}: without {without[-1]}; with {kept[-1]}", flush=True)
        each = [least(costs) / options.files * 1e6 for costs in (without, kept)]
        print(
            f"lists, files {name}: {each[0]:.0f} and {each[1]:.0f} µs CPU a file (the best run of either)", flush=True
        )


def least(costs: list[Cost]) -> float:
    """CPU-seconds of the cheapest run."""
    return min(one.cpu for one in costs)


async def of_links(base: Path, options: argparse.Namespace) -> None:
    source = base / "links"
    source.mkdir()
    many_names(source, options.names, options.each)
    files = -(-options.names // options.each)
    for kept in (True,) if options.kept else (False, True):
        found = await cost(base, source, links=kept)
        print(
            f"links, {options.names} names of {files} files, {'kept' if kept else 'copied'}: {found}, "
            f"{found.cpu / options.names * 1e6:.0f} µs CPU a name, {found.memory / MIB:.0f} MiB, "
            f"state {found.state / MIB:.1f} MiB",
            flush=True,
        )


async def of_reading(base: Path, options: argparse.Namespace) -> None:
    made: list[tuple[str, Callable[[Path], None]]] = [
        (f"{options.mib} MiB in one file", lambda folder: pieces(folder / "file", options.mib * MIB, options.mib, MIB)),
        (f"{options.files} files of 4 KiB", lambda folder: small_files(folder, options.files)),
    ]
    for name, make in made:
        source = base / f"twice-{name[:3].strip()}"
        source.mkdir()
        make(source)
        once, twice = [], []
        for _ in range(options.runs):
            once.append(await cost(base, source))
            twice.append(await cost(base, source, twice=True))
            print(f"reading, {name}: once {once[-1]}; twice {twice[-1]}", flush=True)
        print(
            f"reading, {name}: {(least(twice) / least(once) - 1) * 100:+.0f} % CPU (the best run of either)", flush=True
        )
        shutil.rmtree(source)


async def of_holes(base: Path, options: argparse.Namespace) -> None:
    for name, size, count, length in (
        (f"{options.mib} MiB, no holes", options.mib * MIB, options.mib, MIB),
        (f"1 TB with {options.mib} MiB in pieces of 64 MiB", TB, options.mib // 64, 64 * MIB),
        (f"1 TB with {options.mib} MiB in pieces of 1 MiB", TB, options.mib, MIB),
    ):
        source = base / "sparse"
        source.mkdir()
        pieces(source / "file", size, count, length)
        print(f"sparse, {name}: {await cost(base, source)}", flush=True)
        shutil.rmtree(source)


CHOICES: dict[str, Callable[[Path, argparse.Namespace], Awaitable[None]]] = {
    "attributes": of_attributes,
    "lists": of_lists,
    "links": of_links,
    "twice": of_reading,
    "sparse": of_holes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("choices", nargs="+", choices=CHOICES)
    parser.add_argument("--directory", type=Path, default=FAST, help="where files are written (default: in memory)")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--names", type=int, default=300_000)
    parser.add_argument("--each", type=int, default=3, help="links: names of each file (default: 3)")
    parser.add_argument("--kept", action="store_true", help="links: measure only keeping them")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    for choice in options.choices:
        with tempfile.TemporaryDirectory(dir=options.directory, prefix="towpath-choices-") as folder:
            trio.run(CHOICES[choice], Path(folder), options)


if __name__ == "__main__":
    main()
