"""How this agent's connections to the relay are wrapped: raw, in protocols of their own, or inside WebSocket.

Raw is first: it is cheaper for everybody. Where a firewall or a proxy lets only real HTTPS pass, raw connections are
broken off or come to nothing in the TLS handshake; then the same is tried inside WebSocket, after a moment's head start
for raw, and what has worked in this network is remembered, so that only the first connection pays for finding out.
"""

from __future__ import annotations

import math
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar, cast

import trio

from protocol.errors import RetryLater, TowpathError

Way = Literal["raw", "websocket"]
T = TypeVar("T")

# Raw connections have this long (seconds) before WebSocket is tried beside them.
HEAD_START = 4.0
# That WebSocket is needed is found out again after this long: the firewall may have been changed.
REMEMBERED = 3600.0
# So many raw connections in a row must be broken off where raw has passed before, until that counts no more.
DOUBTS = 2


class CannotConnect(RetryLater):
    """The relay could not be reached or could not show that it is the one this agent is enrolled with."""

    default_code = "RELAY_UNREACHABLE"


class Blocked(CannotConnect):
    """A connection was made, and its TLS handshake broke off or chose something else: other wrapping may pass."""


class RelayWay:
    """``transport`` is ``auto``, ``raw`` or ``websocket`` as configured; ``network`` names the network this machine is
    in now, in any form that can be compared; ``now`` gives monotonic seconds."""

    def __init__(
        self,
        transport: str = "auto",
        network: Callable[[], object] = lambda: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.transport = transport
        self._network = network
        self._now = now
        self._found: Way | None = None
        self._where: object = None
        self._until = math.inf
        self._doubts = 0

    @property
    def known(self) -> Way | None:
        """What passes in this network as far as known, or what the configuration demands."""
        if self.transport in ("raw", "websocket"):
            return cast("Way", self.transport)
        if self._now() >= self._until or self._where != self._network():
            self._found = None
        return self._found

    def passed(self, way: Way) -> None:
        """A connection was made this way."""
        if self.known != way:
            self._found, self._where = way, self._network()
            # Raw is what is wanted; only the other one is a makeshift.
            self._until = math.inf if way == "raw" else self._now() + REMEMBERED
        self._doubts = 0

    def blocked(self) -> None:
        """A connection was broken off the way that is known to pass. One may break for any reason."""
        self._doubts += 1
        if self._doubts >= DOUBTS:
            self._found = None

    async def first(
        self, raw: Callable[[], Awaitable[T]], websocket: Callable[[], Awaitable[T]], discard: Callable[[T], None]
    ) -> tuple[T, Way]:
        """What passes of the two, and which it was. ``discard`` takes a result that came too late.

        Raises what the known way raised; else what raw raised when neither passes. Both raise `Blocked` where the
        other one may pass, and other errors of the project where not.
        """
        known = self.known
        if known is not None:
            try:
                result = await (raw() if known == "raw" else websocket())
            except Blocked:
                self.blocked()
                raise
            self.passed(known)
            return result, known
        result, way = await self._race(raw, websocket, discard)
        self.passed(way)
        return result, way

    async def _race(
        self, raw: Callable[[], Awaitable[T]], websocket: Callable[[], Awaitable[T]], discard: Callable[[T], None]
    ) -> tuple[T, Way]:
        won: list[tuple[T, Way]] = []
        failures: dict[Way, TowpathError] = {}
        raw_blocked = trio.Event()

        async def attempt(way: Way, connect: Callable[[], Awaitable[T]]) -> None:
            try:
                result = await connect()
            except Blocked as error:
                failures[way] = error
                raw_blocked.set()
                return
            except TowpathError as error:
                failures[way] = error
                if way == "raw":
                    # Nothing that WebSocket would mend.
                    nursery.cancel_scope.cancel()
                return
            if won:
                discard(result)
            else:
                won.append((result, way))
                nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(attempt, "raw", raw)
                with trio.move_on_after(HEAD_START):
                    await raw_blocked.wait()
                await attempt("websocket", websocket)
        except BaseException:
            for result, _ in won:
                discard(result)
            raise
        if won:
            return won[0]
        raise failures.get("raw") or failures["websocket"]


def tls_context(ca_pem: str | None, *alpn: str, least: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """TLS to the relay's port; with a pinned CA nothing else is trusted."""
    context = ssl.create_default_context(cadata=ca_pem) if ca_pem else ssl.create_default_context()
    context.minimum_version = least
    context.set_alpn_protocols(list(alpn))
    return context
