"""How many small files are asked for together, and what each costs of what may be on its way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from agent.transfer.asking.budget import charge
from agent.transfer.basis.jobs import FileJob
from agent.transfer.basis.kept_attributes import attributes_size

# A pack is asked for when it has so many bytes of content, or of paths: a message holds eight times as much, and what
# is longer than it needs to be only makes others wait.
PACK_BYTES = PATH_BYTES = 1024 * 1024
# What a file with a long path costs for each byte of it: the source holds it in components, of a byte each at worst.
PATH_CHARGE = 4


def packs(jobs: Iterable[FileJob], *, attributes: bool) -> Iterator[tuple[list[FileJob], int]]:
    """The jobs in their order, as many together as may be named in one request, and what these cost; each is charged
    with its share. ``attributes``: they may have extended attributes or access lists."""
    pack: list[FileJob] = []
    named = total = 0
    for job in jobs:
        length = len(job.group.source) + len(job.source_name) + 1
        named += length
        if named > PATH_BYTES and pack:
            yield pack, total
            pack, named, total = [], length, 0
        size = job.row.size + attributes_size(job) if attributes else job.row.size
        job.charged = charge(max(size, PATH_CHARGE * length))
        pack.append(job)
        total += job.charged
    if pack:
        yield pack, total
