"""The hello: who can prove what to whom, and who cannot."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.control import AgentHello, CollectionReport, RelayHello, encode
from protocol.errors import ProtocolError
from protocol.identity import NodeKey
from protocol.link import (
    HelloFields,
    channel_of,
    make_agent_hello,
    make_relay_hello,
    new_nonce,
    read_agent_hello_untrusted,
    verify_agent_hello_untrusted,
    verify_relay_hello_untrusted,
)
from protocol.ticket import RelayRoot, TicketSigner, TicketVerifier

NOW = 1_800_000_000.0
RELAY = "00000000-0000-4000-8000-00000000000a"
NODE = "11111111-1111-4111-8111-111111111111"
OTHER_NODE = "22222222-2222-4222-8222-222222222222"
ENDPOINT = "33333333-3333-4333-8333-333333333333"
CHANNEL = channel_of(b"the relay's certificate")
OTHER_CHANNEL = channel_of(b"the certificate of somebody in between")


def signer_for(root: RelayRoot, relay_id: str = RELAY, life: float = 86_400) -> TicketSigner:
    key = Ed25519PrivateKey.generate()
    return TicketSigner(relay_id, key, root.certify(key.public_key(), "k1", NOW - 10, NOW + life), "k1")


ROOT = RelayRoot.generate()
SIGNER = signer_for(ROOT)
VERIFIER = TicketVerifier(RELAY, ROOT.public_pem)
IDENTITY = NodeKey.generate()


def relay_hello(signer: TicketSigner = SIGNER, **changes: Any) -> RelayHello:
    return make_relay_hello(signer, **({"channel": CHANNEL, "nonce": new_nonce(), "now": NOW} | changes))


def check(hello: RelayHello, **changes: Any) -> RelayHello:
    options: dict[str, Any] = {"verifier": VERIFIER, "node_id": NODE, "channel": CHANNEL, "now": NOW}
    return verify_relay_hello_untrusted(encode(hello), **(options | changes))


def agent_hello(hello: RelayHello, identity: NodeKey = IDENTITY, **changes: Any) -> AgentHello:
    options: dict[str, Any] = {"node_id": NODE, "endpoint_id": ENDPOINT, "channel": CHANNEL, "fields": HelloFields()}
    return make_agent_hello(hello, identity, **(options | changes))


def test_both_sides_prove_themselves() -> None:
    hello = check(relay_hello(version="1.2", abilities=("a", "b")))
    assert (hello.version, hello.abilities) == ("1.2", ["a", "b"])
    fields = HelloFields(
        version="3",
        abilities=("x",),
        collections=(CollectionReport(id="c", name="n"),),
        boot_id="b",
        last_event=7,
        tasks=4,
    )
    answer = read_agent_hello_untrusted(encode(agent_hello(hello, fields=fields)))
    verify_agent_hello_untrusted(
        answer, certificate=IDENTITY.certificate_pem, nonce=hello.nonce, channel=CHANNEL, relay_id=RELAY
    )
    assert (answer.version, answer.boot_id, answer.last_event, answer.tasks) == ("3", "b", 7, 4)
    assert answer.collections[0].name == "n"


def test_a_hello_for_this_node_by_name_is_accepted() -> None:
    hello = relay_hello(node_id=NODE)
    assert check(hello) == hello


def test_a_hello_for_another_node_is_refused() -> None:
    with pytest.raises(ProtocolError, match="another agent"):
        check(relay_hello(node_id=OTHER_NODE))


def test_a_forged_relay_signature_is_refused() -> None:
    hello = relay_hello()
    head, body, signature = hello.proof.split(".")
    flipped = ("A" if signature[10] != "A" else "B").join((signature[:10], signature[11:]))
    with pytest.raises(ProtocolError, match="not signed by it"):
        check(msgspec.structs.replace(hello, proof=f"{head}.{body}.{flipped}"))


def test_a_relay_with_another_root_is_refused() -> None:
    with pytest.raises(ProtocolError, match="not signed by it"):
        check(relay_hello(signer_for(RelayRoot.generate())))


def test_another_relay_under_the_same_root_is_refused() -> None:
    with pytest.raises(ProtocolError, match="Another relay"):
        check(relay_hello(signer_for(ROOT, OTHER_NODE)))


def test_a_relay_that_names_itself_wrongly_is_refused() -> None:
    forged = msgspec.structs.replace(relay_hello(signer_for(ROOT, OTHER_NODE)), relay_id=RELAY)
    with pytest.raises(ProtocolError, match="another relay"):
        check(forged)


def test_a_proof_for_another_nonce_is_refused() -> None:
    with pytest.raises(ProtocolError, match="does not belong"):
        check(msgspec.structs.replace(relay_hello(), nonce=new_nonce()))


def test_an_intercepting_proxy_is_noticed_by_the_agent() -> None:
    with pytest.raises(ProtocolError, match="intercepts") as caught:
        check(relay_hello(), channel=OTHER_CHANNEL)
    assert (caught.value.code, caught.value.who) == ("INTERCEPTED", "you")


@pytest.mark.parametrize("later", [-121.0 - 1, 60 + 121.0])
def test_a_proof_from_another_time_is_refused(later: float) -> None:
    with pytest.raises(ProtocolError, match="not valid at this time"):
        check(relay_hello(), now=NOW + later)


def test_a_proof_that_would_last_for_ever_is_refused() -> None:
    nonce = new_nonce()
    claims = {"iss": RELAY, "aud": "", "nonce": nonce, "channel": CHANNEL, "iat": NOW, "exp": NOW + 1e6}
    hello = msgspec.structs.replace(relay_hello(), nonce=nonce, proof=SIGNER.sign_claims(claims))
    with pytest.raises(ProtocolError, match="longer than"):
        check(hello)


def test_an_expired_signing_key_is_refused() -> None:
    with pytest.raises(ProtocolError, match="signing key is not valid"):
        check(relay_hello(signer_for(ROOT, life=-500), now=NOW - 1), now=NOW)


def test_a_ticket_is_no_proof() -> None:
    """What the same key signs for other ends does not open the link."""
    claims = {"iss": RELAY, "jti": "t", "sid": "s", "task": "t", "iat": NOW, "exp": NOW + 60}
    with pytest.raises(ProtocolError):
        check(msgspec.structs.replace(relay_hello(), proof=SIGNER.sign_claims(claims)))


@pytest.mark.parametrize("nonce", ["", "short", "x" * 129, "with space" * 4, "nul\0" * 10, "é" * 40])
def test_a_nonce_that_is_none_is_not_signed(nonce: str) -> None:
    with pytest.raises(ProtocolError, match="nonce"):
        check(relay_hello(nonce=nonce))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"nonce": new_nonce()}, "signature is not valid"),
        ({"channel": OTHER_CHANNEL}, "signature is not valid"),
        ({"relay_id": OTHER_NODE}, "signature is not valid"),
        ({"certificate": NodeKey.generate().certificate_pem}, "another key"),
    ],
)
def test_an_agents_signature_counts_for_one_nonce_channel_relay_and_key(change: dict[str, str], word: str) -> None:
    hello = relay_hello()
    options = {"certificate": IDENTITY.certificate_pem, "nonce": hello.nonce, "channel": CHANNEL, "relay_id": RELAY}
    with pytest.raises(ProtocolError, match=word):
        verify_agent_hello_untrusted(agent_hello(hello), **(options | change))


def test_an_agent_with_another_key_is_refused_whatever_certificate_it_shows() -> None:
    hello, thief = relay_hello(), NodeKey.generate()
    stolen_name = msgspec.structs.replace(agent_hello(hello, thief), certificate=IDENTITY.certificate_pem)
    for claim in (agent_hello(hello, thief), stolen_name):
        with pytest.raises(ProtocolError) as caught:
            verify_agent_hello_untrusted(
                claim, certificate=IDENTITY.certificate_pem, nonce=hello.nonce, channel=CHANNEL, relay_id=RELAY
            )
        assert caught.value.code == "WRONG_KEY"


def test_an_agents_signature_does_not_pass_for_another_node() -> None:
    hello = relay_hello()
    claim = msgspec.structs.replace(agent_hello(hello), node_id=OTHER_NODE)
    with pytest.raises(ProtocolError, match="signature is not valid"):
        verify_agent_hello_untrusted(
            claim, certificate=IDENTITY.certificate_pem, nonce=hello.nonce, channel=CHANNEL, relay_id=RELAY
        )


@pytest.mark.parametrize("signature", ["", "!!!", "AAAA", "é", "A" * 10_000])
def test_a_signature_that_is_none_is_refused(signature: str) -> None:
    hello = relay_hello()
    claim = msgspec.structs.replace(agent_hello(hello), signature=signature)
    with pytest.raises(ProtocolError):
        verify_agent_hello_untrusted(
            claim, certificate=IDENTITY.certificate_pem, nonce=hello.nonce, channel=CHANNEL, relay_id=RELAY
        )


@pytest.mark.parametrize(
    "change",
    [
        {"node_id": "../../etc"},
        {"node_id": NODE.upper().replace("1", "A")},
        {"endpoint_id": ""},
        {"abilities": ["x"] * 257},
        {"collections": [CollectionReport(id="c", name="n")] * 10_001},
    ],
)
def test_an_agents_hello_out_of_form_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        read_agent_hello_untrusted(encode(msgspec.structs.replace(agent_hello(relay_hello()), **change)))


@given(st.one_of(st.binary(max_size=300), st.recursive(st.text() | st.integers(), st.lists).map(msgspec.json.encode)))
@settings(max_examples=200, deadline=None)
def test_arbitrary_documents_raise_nothing_but_protocol_errors(document: bytes) -> None:
    with pytest.raises(ProtocolError):
        verify_relay_hello_untrusted(document, verifier=VERIFIER, node_id=NODE, channel=CHANNEL, now=NOW)
    with pytest.raises(ProtocolError):
        read_agent_hello_untrusted(document)


@given(proof=st.text(max_size=200), nonce=st.text(max_size=200), signature=st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_arbitrary_proofs_raise_nothing_but_protocol_errors(proof: str, nonce: str, signature: str) -> None:
    hello = RelayHello(relay_id=RELAY, nonce=nonce, proof=proof, key_certificate="")
    with pytest.raises(ProtocolError):
        verify_relay_hello_untrusted(encode(hello), verifier=VERIFIER, node_id=NODE, channel=CHANNEL, now=NOW)
    claim = AgentHello(node_id=NODE, endpoint_id=ENDPOINT, signature=signature, certificate=IDENTITY.certificate_pem)
    with pytest.raises(ProtocolError):
        verify_agent_hello_untrusted(
            claim, certificate=IDENTITY.certificate_pem, nonce=new_nonce(), channel=CHANNEL, relay_id=RELAY
        )
