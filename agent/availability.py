"""Whether the collections can be used, looked at again and again: what hello, status and the relay are told.

The relay says which of them it has no more. The owner is told, and nothing else comes of it: whoever speaks for the
relay can take nothing away here.

A file server that does not answer leaves one thread waiting and one collection unavailable; nothing else notices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import msgspec
import trio

from agent.collections import Collections, for_others, report_of
from agent.config.keys import CollectionConfig
from agent.policy import Policy
from protocol.control import CollectionReport

logger = logging.getLogger("towpath.collections")

LOOK_EVERY = 30.0
PATIENCE = 10.0
MISSING = (
    "The relay does not have it any more: it was deleted there, another machine serves it, or the relay was restored "
    "from a backup older than it. Nothing was touched here; `towpath collection remove` takes it out of the "
    "configuration."
)


class OwnersReport(CollectionReport, frozen=True, kw_only=True):
    """A report with reasons that name places on this machine. ``missing``: the relay does not have the collection."""

    missing: bool = False


class Availability:
    """The last look at every collection. ``announce`` is called with all reports when one has changed."""

    def __init__(
        self, policy: Policy, collections: Collections, announce: Callable[[Sequence[CollectionReport]], None]
    ) -> None:
        self._policy = policy
        self._collections = collections
        self._announce = announce
        self._seen: dict[str, CollectionReport] = {}
        self._missing: set[str] = set()
        self._limiters: dict[str, trio.CapacityLimiter] = {}

    def reports(self) -> list[CollectionReport]:
        """What was seen last, in the owner's order, for the relay."""
        return [for_others(report) for report in self._last()]

    def owners_reports(self) -> list[OwnersReport]:
        """The same for the owner. What the relay does not have can be used by nobody."""
        return [_for_owner(report, missing=report.id in self._missing) for report in self._last()]

    def _last(self) -> list[CollectionReport]:
        return [
            self._seen.get(config.id) or report_of(config, "It has not been looked at yet.")
            for config in self._policy.collections
        ]

    def relay_lacks(self, ids: Iterable[str]) -> None:
        """The relay does not have these collections as this agent's. Others than are offered here are nothing to it."""
        offered = {config.id: config.name for config in self._policy.collections}
        for collection_id in offered.keys() & set(ids) - self._missing:
            self._missing.add(collection_id)
            logger.warning("Collection %s: %s", offered[collection_id], MISSING)

    def is_linked_anew(self) -> None:
        """A relay says at each link what it lacks, if anything: it may have been restored from a backup meanwhile."""
        self._missing.clear()

    async def run(self) -> None:
        """Look every now and then until cancelled."""
        while True:
            await trio.sleep(LOOK_EVERY)
            await self.look()

    async def look(self) -> list[CollectionReport]:
        """Look at all collections now; takes `PATIENCE` seconds at most."""
        async with trio.open_nursery() as nursery:
            for config in self._policy.collections:
                nursery.start_soon(self._look_at, config)
        reports = self._last()
        current = {report.id: report for report in reports}
        if current != self._seen:
            # Collections that the owner has removed are forgotten here.
            self._seen = current
        return self.reports()

    async def _look_at(self, config: CollectionConfig) -> None:
        limiter = self._limiters.setdefault(config.id, trio.CapacityLimiter(1))
        report = report_of(config, f"The root {config.root} does not answer.")
        with trio.move_on_after(PATIENCE):
            # One look at a time: as long as the last one hangs, no second thread joins it.
            report = await trio.to_thread.run_sync(
                self._collections.report, config, limiter=limiter, abandon_on_cancel=True
            )
        before = self._seen.get(config.id)
        self._seen[config.id] = report
        if before is None or before == report:
            return
        if before.available != report.available:
            logger.warning(
                "Collection %s %s", config.name, "is available again." if report.available else f": {report.reason}"
            )
        self._announce(self.reports())


def _for_owner(report: CollectionReport, *, missing: bool) -> OwnersReport:
    told = OwnersReport(**msgspec.structs.asdict(report), missing=missing)
    return msgspec.structs.replace(told, available=False, reason=MISSING) if missing else told
