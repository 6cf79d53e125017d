"""Where a request comes from behind reverse proxies: whose word counts, and what is made of hostile words."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from relay import server
from relay.proxies import MAX_HOPS, OriginMiddleware, Proxies
from relay.store.audit_tables import audit_log
from tests.relay.relay_world import RelayWorld, SetClock
from tests.relay.sign_in_world import Person, add_person, forms_of

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from relay.settings import Settings
    from relay.store.database import Store

OURS = Proxies(["127.0.0.1", "10.0.0.0/8", "2001:db8:1::/48"])
THEIRS = Proxies(["127.0.0.1", "10.0.0.0/8"], "forwarded")


@pytest.mark.parametrize(
    ("peer", "values", "origin"),
    [
        ("198.51.100.9", ["203.0.113.5"], "198.51.100.9"),
        ("127.0.0.1", ["203.0.113.5"], "203.0.113.5"),
        # What stands to the left came from the caller.
        ("127.0.0.1", ["1.1.1.1, 127.0.0.1, 203.0.113.5"], "203.0.113.5"),
        ("127.0.0.1", ["1.1.1.1", "203.0.113.5"], "203.0.113.5"),
        # Proxies in a row.
        ("127.0.0.1", ["1.1.1.1, 203.0.113.5, 10.2.3.4"], "203.0.113.5"),
        ("2001:db8:1::7", ["2001:db8:9::1,10.0.0.1"], "2001:db8:9::1"),
        ("::ffff:127.0.0.1", ["::ffff:203.0.113.5"], "203.0.113.5"),
        ("127.0.0.1", ["203.0.113.5:4711"], "203.0.113.5"),
        ("127.0.0.1", ["[2001:db8:9::1]:4711"], "2001:db8:9::1"),
        # Not said, or not in a way that can be understood.
        ("127.0.0.1", [], None),
        ("127.0.0.1", [""], None),
        ("127.0.0.1", ["203.0.113.5, unknown"], None),
        ("127.0.0.1", ["203.0.113.5,"], None),
        ("127.0.0.1", ["203.0.113.5:x"], None),
        ("127.0.0.1", ["[2001:db8:9::1"], None),
        ("127.0.0.1", ["10.0.0.1, 10.0.0.2"], None),
        ("127.0.0.1", ["203.0.113.5," + ",".join(["10.0.0.1"] * MAX_HOPS)], None),
    ],
)
def test_the_list_is_read_from_the_right_as_long_as_our_own_proxies_speak(
    peer: str, values: list[str], origin: str | None
) -> None:
    assert OURS.origin_untrusted(peer, values) == origin


@pytest.mark.parametrize(
    ("value", "origin"),
    [
        ("for=203.0.113.5;proto=https", "203.0.113.5"),
        ('proto=https; For="[2001:db8:9::1]:4711"', "2001:db8:9::1"),
        ('for=1.1.1.1, for="203.0.113.5:80", for=10.0.0.1', "203.0.113.5"),
        ("for=1.1.1.1;for=203.0.113.5", None),
        ("for=_hidden", None),
        ("by=203.0.113.5", None),
    ],
)
def test_the_standard_header_where_it_is_chosen(value: str, origin: str | None) -> None:
    assert THEIRS.origin_untrusted("127.0.0.1", [value]) == origin


@given(
    st.lists(st.one_of(st.text(max_size=80), st.ip_addresses().map(str)), max_size=40),
    st.sampled_from([OURS, THEIRS]),
)
def test_whatever_a_caller_writes_the_proxys_own_word_decides(said: list[str], proxies: Proxies) -> None:
    word = "203.0.113.5" if proxies is OURS else "for=203.0.113.5"
    assert proxies.origin_untrusted("127.0.0.1", [*said, word]) == "203.0.113.5"
    assert proxies.origin_untrusted("198.51.100.9", said) == "198.51.100.9"
    found = proxies.origin_untrusted("127.0.0.1", said)
    assert found is None or str(ipaddress.ip_address(found)) == found


def test_long_lists_are_looked_at_from_the_right_only() -> None:
    assert OURS.origin_untrusted("127.0.0.1", ["x" * 10_000_000 + ",203.0.113.5"]) == "203.0.113.5"
    # The first of what is left may be half an address: it never counts.
    cut = "203.0.113.55" + "," + "10.0.0.1," * 3 + " " * 4090
    assert OURS.origin_untrusted("127.0.0.1", [cut]) is None


async def _client_seen(proxies: Proxies, peer: tuple[str, int] | None, headers: list[tuple[bytes, bytes]]) -> object:
    seen: list[object] = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope.get("client"))

    scope: Scope = {"type": "http", "client": peer, "headers": headers}
    await OriginMiddleware(app, proxies=proxies)(scope, None, None)  # type: ignore[arg-type]
    assert scope["client"] == peer
    return seen[0]


async def test_requests_carry_who_called_the_proxy() -> None:
    both = [(b"x-forwarded-for", b"203.0.113.5"), (b"forwarded", b"for=1.1.1.1")]
    assert await _client_seen(OURS, ("127.0.0.1", 9), both) == ("203.0.113.5", 0)
    # A proxy that writes one of the headers passes the other one on as its caller wrote it.
    assert await _client_seen(THEIRS, ("127.0.0.1", 9), both[:1]) == ("127.0.0.1", 9)
    assert await _client_seen(THEIRS, ("127.0.0.1", 9), both) == ("1.1.1.1", 0)
    assert await _client_seen(OURS, ("198.51.100.9", 9), both) == ("198.51.100.9", 9)
    assert await _client_seen(OURS, None, both) is None
    assert await _client_seen(Proxies(), ("127.0.0.1", 9), both) == ("127.0.0.1", 9)


async def _sign_in(world: RelayWorld, forwarded: str, password: str) -> int:
    """The status of a try to sign in as ada, from an address that a proxy names."""
    person, headers = Person(world), {"X-Forwarded-For": forwarded}
    page = await person.get("/sign-in", **headers)
    form = next(form for form in forms_of(page.text) if form.action == "/sign-in")
    fields = {**form.fields, "username": "ada", "password": password}
    return (await person.request("POST", form.action, fields, **headers)).status_code


@pytest.mark.parametrize("trusted", [True, False])
async def test_guesses_are_counted_for_who_called_the_proxy(
    relay_settings: Settings, relay_store: Store, *, trusted: bool
) -> None:
    listen = msgspec.structs.replace(relay_settings.listen, proxies=["127.0.0.1"] if trusted else [])
    sign_in = msgspec.structs.replace(relay_settings.sign_in, failures=2)
    settings = msgspec.structs.replace(relay_settings, listen=listen, sign_in=sign_in)
    relay = server.build(settings, relay_store, SetClock())
    transport = httpx.ASGITransport(app=relay.app)
    async with httpx.AsyncClient(transport=transport, base_url=settings.public_url) as http:
        world = RelayWorld(relay, settings, relay_store, SetClock(), http)
        await add_person(world)
        # The guesser tries to look like many, and like somebody else.
        for number in range(settings.sign_in.failures):
            assert await _sign_in(world, f"192.0.2.{number}, 203.0.113.5", "wrong wrong") == 401
        assert await _sign_in(world, "198.51.100.1, 203.0.113.5", "wrong wrong") == 429
        # Others behind the same proxy are not locked out, where its word counts.
        assert await _sign_in(world, "198.51.100.1", "wrong wrong") == (401 if trusted else 429)
        origins = await relay_store.read(
            lambda connection: "".join(connection.execute(select(audit_log.c.entry)).scalars())
        )
        assert ('"origin":"203.0.113.5"' in origins) is trusted
        assert "192.0.2." not in origins
