"""What travels of somebody's many folders fits into tickets and into questions to agents, in whatever alphabet."""

from __future__ import annotations

import time
from urllib.parse import quote, urlencode

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from protocol.names import CollectionPath, is_within, parse_path_untrusted
from protocol.reverse_http import DEFAULT_LIMITS
from protocol.reverse_http.headers import request_headers
from protocol.ticket import MAX_TOKEN, Grant, RelayRoot, Ticket, TicketSigner, TicketVerifier
from relay.refusal import ApiError
from relay.transfer.filesystem import narrowed
from relay.transfer.scopes import prefixes, reach_text

RELAY = "00000000-0000-4000-8000-00000000000a"
ROOT, KEY = RelayRoot.generate(), Ed25519PrivateKey.generate()
NOW = time.time()
SIGNER = TicketSigner(RELAY, KEY, ROOT.certify(KEY.public_key(), "k", NOW - 10, NOW + 9999), "k")
VERIFIER = TicketVerifier(RELAY, ROOT.public_pem)
LETTERS = ["a", "\\", '"', "я", "語", "😀", "\x7f"]


def folders(letter: str, count: int, length: int) -> list[CollectionPath]:
    """Folders beside one another, whose names are as long as a name may be in bytes."""
    longest = min(length, 240 // len(letter.encode()))
    return [(f"{number:05}{letter * longest}".encode(),) for number in range(count)]


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize(("count", "length"), [(900, 60), (1000, 240), (5000, 10)])
def test_a_ticket_of_many_names_can_be_read(letter: str, count: int, length: int) -> None:
    """An agent refuses a longer one, so that the task could never begin."""
    places = folders(letter, count, length)
    paths, reach = prefixes(places), reach_text(places)
    grant = Grant(node_id=RELAY, fingerprint="f" * 64, collection_id=RELAY, paths=paths, access="r", reach=reach)
    token = SIGNER.sign(
        Ticket(
            relay_id=RELAY,
            ticket_id=RELAY,
            session_id=RELAY,
            task_id=RELAY,
            source=grant,
            destination=grant,
            policy_epoch=0,
            issued=NOW,
            expires=NOW + 1000,
            owner_digest="d" * 64,
        )
    )
    assert len(token) <= MAX_TOKEN
    ticket = VERIFIER.verify_untrusted(token, NOW)
    assert ticket.source == grant
    scope = [parse_path_untrusted(path) for path in paths]
    assert all(any(is_within(place, path) for path in scope) for place in places)
    # Of where links may lead, some is left out; nothing is added.
    assert reach
    assert {parse_path_untrusted(folder) for folder in reach} <= set(places)


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_a_question_with_many_folders_fits_the_link_and_is_never_without_one(letter: str, count: int) -> None:
    query = [("path", f"/{letter * 20}"), *(("filter", "name:" + "x" * 1000) for _ in range(10))]
    asked = narrowed(query, reach_text(folders(letter, count, 240)))
    assert asked[: len(query)] == query
    # Without any, an agent takes it for somebody who may come to everything.
    assert {key for key, _ in asked[len(query) :]} == {"reach"}
    if not count:
        assert asked[len(query) :] == [("reach", query[0][1])]
    target = "/link/collections/00000000-0000-4000-8000-00000000000a/stat?" + urlencode(asked, quote_via=quote)
    request_headers("GET", target, [], None, DEFAULT_LIMITS.max_header_list)


def test_who_may_come_to_everything_is_not_narrowed() -> None:
    assert narrowed([("path", "/x")], None) == [("path", "/x")]


@pytest.mark.parametrize("reach", [None, [], ["/a"]])
def test_a_question_that_is_too_long_is_refused(reach: list[str] | None) -> None:
    with pytest.raises(ApiError, match="too long"):
        narrowed([("path", "/" + "語" * 16_000)], reach)
    longest = [("path", "/" + "a" * (60 * 1024 - 10))]
    if reach is not None:
        with pytest.raises(ApiError, match="too long"):
            narrowed(longest, reach)


names = st.text(st.sampled_from("ab語"), min_size=1, max_size=2).map(str.encode)
places = st.lists(st.lists(names, max_size=3).map(tuple), max_size=6)


@given(places, st.lists(names, max_size=4).map(tuple))
def test_what_is_left_out_for_being_inside_another_is_reached_all_the_same(
    found: list[CollectionPath], spot: CollectionPath
) -> None:
    text = reach_text(found)
    assert text is not None
    told = [parse_path_untrusted(folder) for folder in text]
    assert any(is_within(spot, folder) for folder in told) == any(is_within(spot, folder) for folder in found)
