"""Writes the audit log while requests are answered: an entry for each that changes something.

What a request changes and its entry are one transaction, so that there is never one without the other. What was refused
or changed nothing in the database is recorded before the answer leaves; what many requests have to say of that at the
same time is written in one transaction.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import trio
from sqlalchemy import Connection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protocol.errors import TowpathError
from relay.audit import trail
from relay.audit.notes import notes
from relay.audit.trail import Entry
from relay.store.database import Store, companion, for_all

logger = logging.getLogger("relay.audit")

_READING = frozenset({"GET", "HEAD", "OPTIONS"})
# Requests that look something up by POST.
_LOOKING = frozenset({"/v2/oauth2/token/validate", "/v2/oauth2/token/introspect"})
# Requests of nobody in particular that were refused, or that tell nothing of what they did, are recorded up to this
# many a minute; the others are counted.
STRANGERS = 60


@dataclass(frozen=True)
class AuditStatistics:
    """Entries written since the start, requests only counted, entries that could not be written."""

    written: int
    suppressed: int
    failed: int


class Recorder:
    """Takes entries from many tasks at once. ``clock`` gives Unix seconds."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._waiting: list[tuple[Entry, trio.Event]] = []
        self._writing = False
        self._minute = -math.inf
        self._strangers = self._untold = 0
        self._written = self._suppressed = self._failed = 0

    def statistics(self) -> AuditStatistics:
        """What was recorded."""
        return AuditStatistics(self._written, self._suppressed, self._failed)

    async def record(self, entry: Entry) -> None:
        """Write an entry; it is on disk when this returns. Cancellation does not lose it.

        An entry that cannot be written goes to the relay's log instead, and the request is answered all the same: it
        has been carried out.
        """
        done = trio.Event()
        self._waiting.append((entry, done))
        with trio.CancelScope(shield=True):
            if self._writing:
                await done.wait()
                return
            self._writing = True
            try:
                while self._waiting:
                    batch, self._waiting = self._waiting, []
                    await self._write([one for one, _ in batch])
                    for _, event in batch:
                        event.set()
            finally:
                self._writing = False

    async def _write(self, entries: list[Entry]) -> None:
        try:
            with for_all():
                await self._store.write(lambda connection: trail.append(connection, entries))
            self._written += len(entries)
        except TowpathError as error:
            self._failed += len(entries)
            for entry in entries:
                logger.error("Not in the audit log (%s): %s", error.sentence, entry.canonical())
        except Exception:
            self._failed += len(entries)
            logger.exception("Not in the audit log: %s", [entry.canonical() for entry in entries])

    def note_written(self, entries: int) -> None:
        """Entries were written in the transactions of what they tell of."""
        self._written += entries

    def entry_of(self, scope: Scope, status: int) -> Entry | None:
        """What to record of an answered request; None for what changes nothing."""
        told = notes(scope)
        facts: dict[str, str] = dict(told.get("facts", {}))
        if not facts and (scope["method"] in _READING or scope["path"] in _LOOKING):
            return None
        route = scope.get("route")
        if route is None or told.get("quiet"):
            return None
        template = str(getattr(route, "path", None) or scope["path"])
        parameters: Mapping[str, Any] = scope.get("path_params", {})
        peer = scope.get("client")
        return Entry(
            time=self._clock(),
            action=facts.pop("action", "") or getattr(scope.get("endpoint"), "__name__", "request"),
            outcome="done" if status < 400 else "refused" if status < 500 else "failed",
            who=told.get("who"),
            client=told.get("client"),
            origin=peer[0] if peer else "",
            request=scope["state"].get("request_id", ""),
            facts={
                "route": f"{scope['method']} {template}",
                "status": str(status),
                # Parameters of other kinds could be secrets, as in links that work once.
                **{key: str(value) for key, value in parameters.items() if key.endswith("_id")},
                **facts,
            },
        )

    def admitted(self, scope: Scope, entry: Entry) -> Entry | None:
        """The entry as it is to be written; None for one that is only counted, or strangers could fill the disk. To be
        asked once for each."""
        if entry.who is not None or entry.client is not None:
            return entry
        if entry.outcome == "done" and notes(scope).get("facts"):
            return entry
        now = self._clock()
        if not self._minute <= now < self._minute + 60:
            self._minute, self._strangers = now, 0
        self._strangers += 1
        if self._strangers > STRANGERS:
            self._suppressed += 1
            self._untold += 1
            return None
        if self._untold:
            entry = replace(entry, facts={**entry.facts, "only_counted": str(self._untold)})
            self._untold = 0
        return entry


class AuditMiddleware:
    """ASGI middleware that records each request before its answer leaves."""

    def __init__(self, app: ASGIApp, *, recorder: Recorder) -> None:
        self._app = app
        self._recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        deed = _Deed(self._recorder, scope)

        async def recording(message: Message) -> None:
            if message["type"] == "http.response.start":
                await deed.end(message["status"])
            await send(message)

        mark = companion.set(deed.accompany)
        try:
            await self._app(scope, receive, recording)
        except Exception:
            await deed.end(500)
            raise
        finally:
            companion.reset(mark)


class _Deed:
    """What one request does, from its first transaction to its answer."""

    def __init__(self, recorder: Recorder, scope: Scope) -> None:
        self._recorder = recorder
        self._scope = scope
        self._told: Entry | None = None
        self._over = False

    def accompany(self, connection: Connection, result: object) -> None:
        """Record what a transaction of the request is about to change, in that transaction."""
        if self._over:
            return
        # An exception that is returned refuses the request, though what was written stays: a stolen code ends tokens.
        entry = self._recorder.entry_of(self._scope, 400 if isinstance(result, Exception) else 200)
        if entry is None or self._is_told(entry):
            return
        # Which status the answer will have is not known yet.
        self._told = entry = replace(entry, facts=_without_status(entry))
        if (admitted := self._recorder.admitted(self._scope, entry)) is None:
            self._over = True
            return
        trail.append(connection, [admitted])
        self._recorder.note_written(1)

    async def end(self, status: int) -> None:
        """The answer has this status; record it unless all was said."""
        if self._over:
            return
        self._over = True
        entry = self._recorder.entry_of(self._scope, status)
        if entry is None or self._is_told(entry):
            return
        if (admitted := self._recorder.admitted(self._scope, entry)) is not None:
            await self._recorder.record(admitted)

    def _is_told(self, entry: Entry) -> bool:
        told = self._told
        return told is not None and (told.outcome, _without_status(told)) == (entry.outcome, _without_status(entry))


def _without_status(entry: Entry) -> dict[str, str]:
    """What a transaction knows of the facts."""
    return {key: value for key, value in entry.facts.items() if key != "status"}
