"""What the names of a large folder cost where they are kept in memory, and where they are put aside on disk.

    python benchmarks/names_aside.py [--names 1000000] [--directory DIR]

CPU time of one thread for each name, in and back, the most resident memory, and bytes on disk; each in a process of its
own. `held` and `aside` are a mirror's names in a folder that both ends have (first the source's come, then all are
compared), `folding` the same where case does not count, `rows` those of a folder whose names may be one name.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path

from agent.storage.folding import fold_key
from agent.transfer.planning import source_names
from agent.transfer.planning.gathered_names import GatheredNames, pieces
from agent.transfer.planning.source_names import SourceNames
from protocol.session import FILE, Row

KINDS = ("held", "aside", "folding", "rows")
NOW = 1_700_000_000_123_456_789


def batches(count: int) -> Iterator[list[bytes]]:
    """Names in no order, as many at a time as come with a message."""
    for start in range(0, count, 1000):
        yield [b"%08d.dat" % ((number * 7919 + 13) % count) for number in range(start, min(count, start + 1000))]


def compare(kind: str, count: int, directory: Path) -> tuple[float, float, int]:
    if kind == "held":
        source_names.HELD = sys.maxsize
    with closing(SourceNames(directory, fold_key if kind == "folding" else bytes)) as names:
        began = time.process_time()
        for some in batches(count):
            names.add(some)
        added = time.process_time()
        assert not any(True for _ in names.lacking(chain.from_iterable(batches(count))))
        ended = time.process_time()
        return added - began, ended - added, 2 * names.on_disk


def gather(count: int, directory: Path) -> tuple[float, float, int]:
    with closing(GatheredNames(directory)) as rows:
        began = time.process_time()
        for some in batches(count):
            rows.add_untrusted([Row(name, FILE, 123_456, NOW, NOW, 2049, 7_654_321, 0o644) for name in some])
        added = time.process_time()
        assert sum(len(piece) for portion in rows.portions() for piece in pieces(portion)) == count
        return added - began, time.process_time() - added, rows.on_disk


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--names", type=int, default=1_000_000)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--kind", choices=KINDS)
    options = parser.parse_args()
    if options.kind is None:
        for kind in KINDS:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--kind", kind], check=True)
        return
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = options.names
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        measured = gather(count, Path(folder)) if options.kind == "rows" else compare(options.kind, count, Path(folder))
    into, back, disk = measured
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{options.kind}: {into / count * 1e6:.2f} and {back / count * 1e6:.2f} us of CPU a name, "
        f"{grown:.0f} MiB more memory, {disk / count:.1f} bytes of disk a name"
    )


if __name__ == "__main__":
    main()
