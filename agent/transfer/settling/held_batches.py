"""Batches of small files that are read back by the processes that wrote them."""

from __future__ import annotations

import itertools

from agent.transfer.settling.held import HeldChecked, Holder, places_of
from agent.transfer.settling.small_files import Temporary


class HeldBatches:
    """What was asked and not answered. The settler's thread calls."""

    def __init__(self) -> None:
        self._asked: dict[int, tuple[Holder, list[Temporary]]] = {}
        self._numbers = itertools.count(1)

    def __bool__(self) -> bool:
        return bool(self._asked)

    def check(self, files: list[Temporary], *, in_memory: bool) -> None:
        """Have files read back and closed where they are held. ``in_memory``: they have no copy but the one in the
        page cache."""
        for holder, items in _by_holder(files).items():
            batch = next(self._numbers)
            self._asked[batch] = (holder, items)
            holder.check(batch, places_of([(item.r, item.index) for item in items]), in_memory=in_memory)

    def release(self, files: list[Temporary]) -> None:
        """Have files closed where they are held."""
        for holder, items in _by_holder(files).items():
            holder.release(places_of([(item.r, item.index) for item in items]))

    def answered(self, answer: HeldChecked) -> list[tuple[Temporary, int | None]]:
        """The files of a batch, each with the system's number (0: other content) if it does not read back."""
        _, items = self._asked.pop(answer.batch, (None, []))
        bad = {(r, index): number for r, index, number in answer.bad}
        return [(item, bad.get((item.r, item.index))) for item in items]

    def lost(self, holder: Holder) -> list[Temporary]:
        """A process is gone: what it was to read back."""
        found = []
        for batch in [batch for batch, (asked, _) in self._asked.items() if asked is holder]:
            found += self._asked.pop(batch)[1]
        return found


def _by_holder(files: list[Temporary]) -> dict[Holder, list[Temporary]]:
    found: dict[Holder, list[Temporary]] = {}
    for item in files:
        if item.holder is not None:
            found.setdefault(item.holder, []).append(item)
    return found
