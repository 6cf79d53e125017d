"""Places for callers of whom nothing is known: bounded in all, and never all of them one caller's."""

from __future__ import annotations

import ssl
from collections import Counter

import trio
from hypothesis import given
from hypothesis import strategies as st

from protocol.places import Places
from relay.proxies import Proxies


@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.sampled_from(["", "a", "b", "c"])), max_size=200))
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


async def test_connections_are_counted_by_address_and_those_of_proxies_are_not() -> None:
    counted, trusted = Proxies(), Proxies(["127.0.0.1"])
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1]):
        async with await listener.accept() as stream:
            secured = trio.SSLStream(stream, ssl.create_default_context(), server_hostname="relay")
            assert (counted.caller_at(secured), trusted.caller_at(secured)) == ("127.0.0.1", "")
        assert counted.caller_at(secured) == ""
    assert counted.caller_at(object()) == ""
