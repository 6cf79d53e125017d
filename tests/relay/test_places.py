"""Places for callers of whom nothing is known: bounded in all, and never all of them one caller's."""

from __future__ import annotations

import ssl
from collections import Counter

import trio
from hypothesis import example, given
from hypothesis import strategies as st

from protocol.places import Places
from relay.proxies import Proxies


@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.sampled_from(["", "a", "b", "c"])), max_size=200))
@example(most=4, moves=[(True, "a")] * 5)
@example(most=40, moves=[(True, "a")] * 40)
def test_whoever_holds_none_gets_in_while_there_is_any(most: int, moves: list[tuple[bool, str]]) -> None:
    places, held = Places(most), Counter[str]()
    for comes, who in moves:
        if comes:
            free = most - held.total()
            given = places.take(who)
            assert given == (free > 0 and (not who or held[who] < 3 * free))
            held[who] += given
        elif held[who]:
            places.leave(who)
            held[who] -= 1
        assert places.taken == held.total() <= most
        # One alone gets three quarters of what the others leave, and no more.
        assert all(4 * number <= 3 * most + 3 for who, number in held.items() if who)
    if places.taken < most:
        assert places.take("a newcomer")
        places.leave("a newcomer")
    for who in held.elements():
        places.leave(who)
    # Of whoever holds nothing nothing is kept: made-up addresses would fill the memory.
    assert (places.taken, len(places._held)) == (0, 0)


async def test_connections_are_counted_by_address_and_those_of_proxies_are_not() -> None:
    counted, trusted = Proxies(), Proxies(["127.0.0.1"])
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1]):
        async with await listener.accept() as stream:
            secured = trio.SSLStream(stream, ssl.create_default_context(), server_hostname="relay")
            assert (counted.caller_at(secured), trusted.caller_at(secured)) == ("127.0.0.1", "")
        assert counted.caller_at(secured) == ""
    assert counted.caller_at(object()) == ""
    assert counted.caller_at(_From("2001:db8:0:1::5")) == "2001:db8::/56", "a customer's whole network"
    assert counted.caller_at(_From("::ffff:192.0.2.7")) == "192.0.2.7"


class _From:
    """A connection from an IPv6 address."""

    def __init__(self, address: str) -> None:
        self.socket, self._address = self, address

    def getpeername(self) -> tuple[str, int, int, int]:
        return self._address, 4711, 0, 0
