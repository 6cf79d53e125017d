"""Tickets: what is signed comes back, whatever is changed is refused."""

from __future__ import annotations

import base64
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import ProtocolError, TowpathError
from protocol.identity import NodeKey, fingerprint_of_certificate_untrusted
from protocol.ticket import LEEWAY, MAX_PATHS, Grant, RelayRoot, Ticket, TicketExpired, TicketSigner, TicketVerifier

NOW = 1_800_000_000.0


def make(relay_id: str = "relay") -> tuple[TicketSigner, TicketVerifier]:
    root = RelayRoot.generate()
    key = Ed25519PrivateKey.generate()
    certificate = root.certify(key.public_key(), "k1", NOW - 10, NOW + 10_000)
    return TicketSigner(relay_id, key, certificate, "k1"), TicketVerifier(relay_id, root.public_pem)


def a_ticket(**changes: object) -> Ticket:
    grant = Grant(node_id="n", fingerprint="f", collection_id="c", paths=["/a"], access="r")
    fields: dict[str, object] = {
        "relay_id": "relay",
        "ticket_id": "t",
        "session_id": "s",
        "task_id": "k",
        "source": grant,
        "destination": grant,
        "policy_epoch": 3,
        "issued": NOW,
        "expires": NOW + 3600,
    }
    return Ticket(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_ticket_comes_back_as_it_was_signed() -> None:
    signer, verifier = make()
    for ticket in (a_ticket(), a_ticket(source=None)):
        assert verifier.verify_untrusted(signer.sign(ticket), NOW + 5) == ticket


def test_a_ticket_that_does_not_say_how_far_links_lead_reaches_no_farther_than_its_paths() -> None:
    signer, verifier = make()
    for reach in (None, [], ["/a", "/b"]):
        grant = Grant(node_id="n", fingerprint="f", collection_id="c", paths=["/a"], access="r", reach=reach)
        assert verifier.verify_untrusted(signer.sign(a_ticket(source=grant)), NOW).source == grant
    claims = jwt.decode(signer.sign(a_ticket()), options={"verify_signature": False})
    del claims["src"]["reach"], claims["dst"]["reach"]
    older = verifier.verify_untrusted(signer.sign_claims(claims), NOW)
    assert older.source is not None
    assert older.source.folders() == older.destination.folders() == ((b"a",),)


def test_what_a_ticket_said_can_be_read_after_its_end_but_only_what_was_signed() -> None:
    signer, verifier = make()
    token = signer.sign(a_ticket(issued=NOW - 9, expires=NOW - 8))
    assert verifier.at_any_time_untrusted(token).expires == NOW - 8
    stranger, _ = make()
    for forged in (stranger.sign(a_ticket()), token[:-9] + "AAAAAAAAA", "", "a.b.c", token.replace(".", "")):
        with pytest.raises(ProtocolError):
            verifier.at_any_time_untrusted(forged)


def test_expired_and_not_yet_valid_are_told_apart_from_forged() -> None:
    signer, verifier = make()
    token = signer.sign(a_ticket())
    with pytest.raises(TicketExpired):
        verifier.verify_untrusted(token, NOW + 3600 + 121)
    with pytest.raises(TicketExpired):
        verifier.verify_untrusted(token, NOW - 121)


@pytest.mark.parametrize("edge", [NOW - LEEWAY, NOW + 3600 + LEEWAY])
def test_clocks_may_differ_by_the_leeway_and_no_more(edge: float) -> None:
    signer, verifier = make()
    token = signer.sign(a_ticket())
    assert verifier.verify_untrusted(token, edge).ticket_id == "t"
    with pytest.raises(TicketExpired):
        verifier.verify_untrusted(token, edge - 1 if edge < NOW else edge + 1)


@pytest.mark.parametrize("edge", [NOW - 10 - LEEWAY, NOW + 10_000 + LEEWAY])
def test_a_key_signs_for_as_long_as_it_is_certified_for(edge: float) -> None:
    signer, verifier = make()
    token = signer.sign(a_ticket(issued=NOW - 100_000, expires=NOW + 100_000))
    assert verifier.verify_untrusted(token, edge).ticket_id == "t"
    with pytest.raises(TowpathError):
        verifier.verify_untrusted(token, edge - 1 if edge < NOW else edge + 1)


@pytest.mark.parametrize("side", ["source", "destination"])
@pytest.mark.parametrize("what", ["paths", "reach"])
def test_a_ticket_names_so_many_paths_and_no_more(side: str, what: str) -> None:
    signer, verifier = make()

    def grant(count: int) -> Grant:
        fields: dict[str, Any] = {"paths": ["/a"], what: [f"/{number}" for number in range(count)]}
        return Grant(node_id="n", fingerprint="f", collection_id="c", access="r", **fields)

    most = a_ticket(**{side: grant(MAX_PATHS)})
    assert verifier.verify_untrusted(signer.sign(most), NOW) == most
    with pytest.raises(ValueError, match="at most"):
        signer.sign(a_ticket(**{side: grant(MAX_PATHS + 1)}))
    claims = jwt.decode(signer.sign(most), options={"verify_signature": False})
    claims["src" if side == "source" else "dst"][what].append("/one more")
    with pytest.raises(ProtocolError, match="too many paths"):
        verifier.verify_untrusted(signer.sign_claims(claims), NOW)


def test_another_relay_another_root_and_an_uncertified_key_are_refused() -> None:
    signer, verifier = make()
    stranger, _ = make()
    with pytest.raises(ProtocolError, match="not signed"):
        verifier.verify_untrusted(stranger.sign(a_ticket()), NOW)
    with pytest.raises(ProtocolError, match="another relay"):
        verifier.verify_untrusted(signer.sign(a_ticket(relay_id="other")), NOW)
    # A ticket key nobody certified, hiding behind a certificate of the real one.
    forged = TicketSigner("relay", Ed25519PrivateKey.generate(), signer.key_certificate, "k1")
    with pytest.raises(ProtocolError, match="not signed"):
        verifier.verify_untrusted(forged.sign(a_ticket()), NOW)
    other_kid = TicketSigner("relay", Ed25519PrivateKey.generate(), signer.key_certificate, "k2")
    with pytest.raises(ProtocolError, match="other than the one"):
        verifier.verify_untrusted(other_kid.sign(a_ticket()), NOW)


def test_symmetric_and_none_algorithms_are_refused() -> None:
    signer, verifier = make()
    headers = {"kid": "k1", "kc": signer.key_certificate}
    for token in (
        jwt.encode({"iss": "relay"}, "x" * 32, algorithm="HS256", headers=headers),
        jwt.encode({"iss": "relay"}, None, algorithm="none", headers=headers),  # type: ignore[arg-type]
    ):
        with pytest.raises(ProtocolError):
            verifier.verify_untrusted(token, NOW)


@settings(max_examples=200, deadline=None)
@given(st.integers(min_value=0), st.integers(min_value=1, max_value=255))
def test_no_flipped_byte_goes_unnoticed(position: int, mask: int) -> None:
    signer, verifier = make()
    token = bytearray(signer.sign(a_ticket()).encode())
    position %= len(token)
    token[position] = (token[position] ^ mask) & 0x7F
    text = token.decode("ascii")
    try:
        ticket = verifier.verify_untrusted(text, NOW)
    except ProtocolError:
        return
    # base64url has spare bits at the end of each part: the only change that may pass is one that says the same.
    assert ticket == a_ticket()


@given(st.text(max_size=300))
def test_garbage_raises_only_the_protocol_error(text: str) -> None:
    _, verifier = make()
    with pytest.raises(ProtocolError):
        verifier.verify_untrusted(text, NOW)
    with pytest.raises(ProtocolError):
        fingerprint_of_certificate_untrusted(text)


@pytest.mark.parametrize("where", [0, 1])
def test_a_statement_of_ten_thousand_boxes_is_only_a_wrong_one(where: int) -> None:
    signer, verifier = make()
    parts = signer.sign(a_ticket()).split(".")
    parts[where] = base64.urlsafe_b64encode(b'{"kid":' + b"[" * 10_000 + b"]" * 10_000 + b"}").rstrip(b"=").decode()
    for look in (verifier.at_any_time_untrusted, lambda text: verifier.verify_untrusted(text, NOW)):
        with pytest.raises(ProtocolError):
            look(".".join(parts))


def test_a_node_key_survives_its_file_and_is_private(tmp_path) -> None:  # type: ignore[no-untyped-def]
    key = NodeKey.generate()
    path = tmp_path / "node.key"
    key.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    again = NodeKey.load(path)
    assert again.fingerprint == key.fingerprint == fingerprint_of_certificate_untrusted(again.certificate_pem)
    assert again.certificate_pem == key.certificate_pem or again.fingerprint == key.fingerprint
