"""What a peer may name as an address, and what of it may be dialled."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.candidates import (
    MAX_CANDIDATES,
    MAX_SLOTS,
    Candidate,
    Rules,
    check_candidates_untrusted,
    usable_untrusted,
    verdict_untrusted,
)
from protocol.errors import ProtocolError

NOWHERE = Rules()
HERE = Rules(loopback=True)


def host(text: str, port: int = 1234, kind: str = "host", slot: int = 0) -> Candidate:
    return Candidate(kind=kind, host=text, port=port, slot=slot)


def dialled(candidates: list[Candidate], rules: Rules) -> list[tuple[str, int]]:
    return [(row.host, row.port) for row in usable_untrusted(candidates, rules)]


@pytest.mark.parametrize("text", ["192.0.2.7", "8.8.8.8", "2001:db8::1"])
def test_addresses_that_mean_something_everywhere_may_be_dialled(text: str) -> None:
    assert dialled([host(text)], NOWHERE) == [(text, 1234)]


@pytest.mark.parametrize(
    "text", ["10.1.2.3", "172.31.255.255", "192.168.1.1", "100.64.0.1", "fd00::1", "::ffff:10.1.2.3"]
)
def test_inside_addresses_are_for_peers_that_may_see_them(text: str) -> None:
    assert verdict_untrusted(text, NOWHERE) == "inside address"
    plain = text.removeprefix("::ffff:")
    assert verdict_untrusted(text, Rules(same_site=True)) == "ok"
    assert verdict_untrusted(text, Rules(observed=plain)) == "ok"
    prefix = "/64" if ":" in plain else "/24"
    assert verdict_untrusted(text, Rules(networks=(ipaddress.ip_network(plain + prefix, strict=False),))) == "ok"
    other = "10.99.0.0/24" if ":" not in plain else "fd99::/64"
    assert verdict_untrusted(text, Rules(networks=(ipaddress.ip_network(other),))) == "inside address"


@pytest.mark.parametrize("text", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_loopback_is_dialled_only_where_the_owner_allows_it(text: str) -> None:
    assert dialled([host(text)], Rules(same_site=True, observed=text)) == []
    assert dialled([host(text)], HERE) == [(text.removeprefix("::ffff:"), 1234)]


def test_our_own_addresses_are_never_dialled() -> None:
    rules = Rules(own=frozenset({"192.0.2.7", "10.0.0.1"}), same_site=True)
    assert dialled([host("192.0.2.7"), host("10.0.0.1"), host("10.0.0.2")], rules) == [("10.0.0.2", 1234)]


@pytest.mark.parametrize(
    "candidate",
    [
        host("0.0.0.0"),
        host("0.1.2.3"),
        host("::"),
        host("224.0.0.1"),
        host("ff02::1"),
        host("169.254.169.254"),
        host("fe80::1"),
        host("255.255.255.255"),
        host("::ffff:169.254.169.254"),
        host("::ffff:0.0.0.0"),
        host("::ffff:224.0.0.1"),
        host("localhost"),
        host("example.org"),
        host("2130706433"),
        host("127.1"),
        host("0177.0.0.1"),
        host("192.0.2.7:80"),
        host("[::1]"),
        host(" 192.0.2.7"),
        host("fe80::1%eth0"),
        host("2001:db8::1%eth0"),
        host(""),
        host("192.0.2.7\n"),
        host("192.0.2.7", 0),
        host("192.0.2.7", -1),
        host("192.0.2.7", 65536),
        host("192.0.2.7", slot=-1),
        host("192.0.2.7", slot=MAX_SLOTS + 1),
        host("192.0.2.7", kind="relayed"),
        host("/run/socket"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("rules", [NOWHERE, HERE, Rules(same_site=True)], ids=["elsewhere", "here", "same site"])
def test_everything_else_is_never_dialled(candidate: Candidate, rules: Rules) -> None:
    assert usable_untrusted([candidate], rules) == []


def test_candidates_are_bounded_and_stay_in_order() -> None:
    many = [host(f"192.0.{n // 250}.{n % 250 + 1}") for n in range(1000)]
    assert usable_untrusted([host("bad"), *many, *many], NOWHERE) == many[:MAX_CANDIDATES]


def test_a_place_at_the_tunnel_is_no_address_and_passes() -> None:
    place = Candidate(kind="relay-tunnel", host="relay.example.org", port=443, token="half")
    assert usable_untrusted([place, host("relay.example.org")], NOWHERE) == [place]


KINDS = st.sampled_from(["host", "mapped-tcp", "mapped-udp", "portmap", "relay-tunnel", "else"])
ANYTHING = st.builds(
    Candidate,
    kind=KINDS,
    host=st.one_of(st.text(max_size=30), st.ip_addresses().map(str)),
    port=st.integers(),
    slot=st.integers(-3, 20),
)


@given(st.lists(ANYTHING, max_size=100))
def test_whatever_a_peer_names_raises_nothing_and_hits_nothing_forbidden(candidates: list[Candidate]) -> None:
    kept = usable_untrusted(candidates, NOWHERE)
    assert len(kept) <= MAX_CANDIDATES
    for row in kept:
        if row.kind != "relay-tunnel":
            address = ipaddress.ip_address(row.host)
            assert not (address.is_loopback or address.is_multicast or address.is_link_local or address.is_unspecified)
            assert verdict_untrusted(row.host, NOWHERE) == "ok"


@given(st.lists(ANYTHING, max_size=100))
def test_the_relay_passes_on_only_what_has_the_form_of_candidates(candidates: list[Candidate]) -> None:
    try:
        check_candidates_untrusted(candidates)
    except ProtocolError:
        return
    assert all(0 < row.port < 65536 and 0 <= row.slot <= MAX_SLOTS for row in candidates)
