"""A bounded number of places for callers of whom nothing is known yet, shared so that one caller cannot take them all.

The more somebody holds already, the more places must be free for them to get another (Choudhury and Hahne, Dynamic
queue length thresholds, 1998): one alone gets three quarters of all, and whoever holds none gets in while there is any.
"""

from __future__ import annotations

import ipaddress
from collections import Counter

_FREE_SHARE = 3
# What one customer of a network has at least (RIPE-690): whoever has it may call from any of its addresses.
_IPV6_CUSTOMER = 56


class Places:
    """``most`` places. Callers are told apart by a text (`neighbourhood`); those with an empty one look all alike, and
    take what there is."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: Counter[str] = Counter()
        self.taken = 0

    def take(self, caller: str) -> bool:
        """Give a caller one more place; False when there is none for them. Whoever has got one gives it back with
        `leave`."""
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


def neighbourhood(address: str) -> str:
    """As whom limits count a caller from this address: an IPv4 address, or the IPv6 network of one customer."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, _IPV6_CUSTOMER), strict=False))
