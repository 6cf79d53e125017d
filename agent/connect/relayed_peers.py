"""Peers to which nothing but the relay's tunnel led lately, so that it need not stand by the next time. Sans I/O."""

from __future__ import annotations

from collections import OrderedDict

# So long it is remembered (seconds): then a direct path has its chance again.
LIFE = 1800.0
MOST = 1000


class RelayedPeers:
    """Peers by their addresses as the relay sees them."""

    def __init__(self) -> None:
        # Address → when that was found; the oldest first.
        self._since: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._since)

    def note(self, now: float, peer: str, *, relayed: bool) -> None:
        """A race for a peer, in which the tunnel had to stand by, ended with nothing but the tunnel, or with more."""
        self._since.pop(peer, None)
        if relayed and peer:
            self._since[peer] = now
            if len(self._since) > MOST:
                self._since.popitem(last=False)

    def has(self, now: float, peer: str) -> bool:
        """Whether only the tunnel is to be expected."""
        return now - self._since.get(peer, -LIFE) < LIFE

    def forget(self) -> None:
        """The network is another one."""
        self._since.clear()
