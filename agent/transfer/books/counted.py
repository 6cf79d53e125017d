"""What groups, single items and what earlier runs settled add to the task's counters, and how items are counted once
that must come again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter

import msgspec

from agent.transfer.basis.jobs import Counts, ListFate
from agent.transfer.basis.journal_rows import BARE, FAILED, KEPT, LINKED, LIST_FATE, SKIPPED, TRANSFERRED, UNCHANGED
from agent.transfer.books.journal import Journal
from agent.transfer.books.journal_file import COUNTED
from protocol.control import Counters
from protocol.session import FILE, SYMLINK, Row

# What files have together may be more than can be written down: a sparse one may be of this size by itself.
MOST_BYTES = (1 << 63) - 1
# What a group adds to the task's counters, by name.
_COUNTS = {name: attrgetter(name) for name in Counts.__slots__ if name != "bytes_shared"}
_Kept = dict[int, list[int]]


def add_counts(counters: Counters, counts: Sequence[Counts]) -> Counters:
    """Task counters with the counts of groups added; counts of errors met during the scan are part of the group."""
    changes = {name: getattr(counters, name) + sum(map(count, counts)) for name, count in _COUNTS.items()}
    total = changes["bytes_total"] + sum(count.bytes_shared for count in counts)
    changes["bytes_total"] = max(0, min(total, MOST_BYTES))
    return msgspec.structs.replace(counters, **changes)


def keep_counted(journal: Journal, counts: Mapping[int, Counts]) -> None:
    """Write down what single items have added to the task's counters; durable with the next commit."""
    if not counts:
        return
    key = f"{COUNTED}{min(counts)}"
    before = journal.get(key)
    # Others of a group of before; agents that know nothing of such keys pass them over.
    rows = {} if before is None else msgspec.msgpack.decode(before, type=_Kept)
    rows.update({item: [getattr(each, name) for name in Counts.__slots__] for item, each in counts.items()})
    journal.put(key, msgspec.msgpack.encode(rows))


def uncount(journal: Journal, items: Collection[int]) -> None:
    """These single items are counted anew: take away from the journal's counters what they have added; durable with
    the next commit. Nothing of items that an agent of before has counted."""
    wanted = set(items)
    for key, value in journal.all_counted() if wanted else ():
        # Of as many items as are planned together.
        rows = msgspec.msgpack.decode(value, type=_Kept)
        if wanted.isdisjoint(rows):
            continue
        found = [rows.pop(item) for item in sorted(wanted & rows.keys())]
        less = [Counts(*(-count for count in counts)) for counts in found]
        journal.put_counters(add_counts(journal.counters(), less))
        journal.put_settled(max(0, journal.settled() + sum(each.bytes_transferred for each in less)))
        journal.put(key, msgspec.msgpack.encode(rows))


def bytes_settled(row: Row, outcome: int) -> int:
    """What a file that an earlier run has ended with ``outcome`` counts among the bytes that are durable."""
    return row.size if outcome % LIST_FATE in (TRANSFERRED, BARE) and row.kind == FILE else 0


def count_finished(counts: Counts, row: Row, outcome: int, *, verified: bool, shared: bool = False) -> None:
    """Settled in an earlier run: only the counts of its group must know."""
    fate, outcome = divmod(outcome, LIST_FATE)
    counts.add_list(ListFate(fate))
    if shared and outcome not in (LINKED, KEPT):
        counts.bytes_total += row.size
    if outcome == FAILED:
        counts.failed += 1
    elif outcome == SKIPPED:
        counts.skipped_errors += 1
    elif outcome in (UNCHANGED, KEPT):
        counts.files_skipped += 1
        counts.hard_links_kept += outcome == KEPT
    elif outcome == LINKED:
        counts.files_transferred += 1
        counts.hard_links_kept += 1
    elif row.kind == SYMLINK:
        counts.symlinks += 1
        counts.symlinks_transferred += 1
    else:
        counts.files_transferred += 1
        counts.xattrs_left_out += outcome == BARE
        counts.bytes_transferred += row.size
        if verified:
            counts.bytes_checksummed += row.size
