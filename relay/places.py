"""A bounded number of places for callers of whom nothing is known yet, shared so that one caller cannot take them all.

The more somebody holds already, the more places must be free for them to get another (Choudhury and Hahne, Dynamic
queue length thresholds, 1998): one alone gets three quarters of all, and whoever holds none gets in while there is any.
"""

from __future__ import annotations

from collections import Counter

import trio

from relay.proxies import Proxies, neighbourhood

_FREE_SHARE = 3


class Places:
    """``most`` places. Callers behind ``proxies``, the operator's own, look all alike and take what there is."""

    def __init__(self, most: int, proxies: Proxies | None = None) -> None:
        self._most = most
        self._proxies = proxies or Proxies()
        self._held: Counter[str] = Counter()
        self.taken = 0

    def take(self, caller: str) -> bool:
        """Give a caller (`caller_at`) one more place; False when there is none for them. Whoever has got one gives it
        back with `leave`."""
        free = self._most - self.taken
        if free <= 0 or (caller and self._held[caller] >= _FREE_SHARE * free):
            return False
        self.taken += 1
        if caller:
            self._held[caller] += 1
        return True

    def leave(self, caller: str) -> None:
        """A place is free again."""
        self.taken -= 1
        if caller:
            self._held[caller] -= 1
            if not self._held[caller]:
                del self._held[caller]

    def caller_at(self, stream: object) -> str:
        """As whom a connection is counted, by its socket; empty for one that is like no other, or a proxy's."""
        while not isinstance(stream, trio.SocketStream):
            stream = getattr(stream, "transport_stream", None)
            if stream is None:
                return ""
        try:
            name = stream.socket.getpeername()
        except OSError:
            return ""
        if not isinstance(name, tuple) or self._proxies.trusts(str(name[0])):
            return ""
        return neighbourhood(str(name[0]))
