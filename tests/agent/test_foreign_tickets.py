"""A ticket is worth something only between the two nodes, for the task, the collections and the paths that it names."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.transfer.source.source_policy import SourcePolicy
from protocol.errors import AccessDenied, ProtocolError, RetryLater, TowpathError
from protocol.identity import NodeKey
from protocol.names import parse_path_untrusted
from protocol.ticket import TICKET_EXPIRED, Grant, RelayRoot, Ticket, TicketSigner, TicketVerifier

NODES = {name: NodeKey.generate() for name in ("source", "destination", "third")}


def signer_of(root: RelayRoot, relay_id: str = "relay") -> TicketSigner:
    key, now = Ed25519PrivateKey.generate(), time.time()
    return TicketSigner(relay_id, key, root.certify(key.public_key(), "k", now - 60, now + 3600), "k")


ROOT = RelayRoot.generate()
SIGNER = signer_of(ROOT)


def grant(node: str, collection: str, access: Any, *paths: str) -> Grant:
    return Grant(
        node_id=node, fingerprint=NODES[node].fingerprint, collection_id=collection, paths=list(paths), access=access
    )


def ticket(**changes: Any) -> str:
    now = time.time()
    values: dict[str, Any] = {
        "relay_id": "relay",
        "ticket_id": "t",
        "session_id": "session",
        "task_id": "task",
        "source": grant("source", "collection", "r", "/shared"),
        "destination": grant("destination", "other", "rw", "/in"),
        "policy_epoch": 0,
        "issued": now,
        "expires": now + 600,
        **changes,
    }
    return SIGNER.sign(Ticket(**values))


def policy(**changes: Any) -> SourcePolicy:
    values: dict[str, Any] = {
        "session_id": "session",
        "task_id": "task",
        "node_id": "source",
        "fingerprint": NODES["source"].fingerprint,
        "collection_id": "collection",
        **changes,
    }
    return SourcePolicy(**values)


def accept(one: SourcePolicy, token: str, peer: str = "destination") -> None:
    verifier = TicketVerifier("relay", ROOT.public_pem)
    one.accept(verifier, token, NODES[peer].fingerprint, time.time())


def test_the_right_ticket_opens_its_paths_and_no_others() -> None:
    one = policy()
    with pytest.raises(TowpathError):
        one.check(parse_path_untrusted("/shared/x"), time.time())
    accept(one, ticket())
    one.check(parse_path_untrusted("/shared/x"), time.time())
    for path in ("/", "/share", "/sharedx", "/shared/../x", "/in"):
        with pytest.raises(AccessDenied):
            one.check(parse_path_untrusted(path), time.time())


@pytest.mark.parametrize(
    ("where", "token", "peer"),
    [
        # Another endpoint's source, with its own certificate or claiming to be this one.
        ({"node_id": "third", "fingerprint": NODES["third"].fingerprint}, {}, "destination"),
        ({"fingerprint": NODES["third"].fingerprint}, {}, "destination"),
        # The right source, but shown by a node the ticket was not given to, the source itself included.
        ({}, {}, "third"),
        ({}, {}, "source"),
        # Another session, task or collection of the same nodes.
        ({"session_id": "another"}, {}, "destination"),
        ({"task_id": "another"}, {}, "destination"),
        ({"collection_id": "other"}, {}, "destination"),
        # Roles swapped: what may be written there may not be read here.
        (
            {},
            {
                "source": grant("destination", "other", "r", "/in"),
                "destination": grant("source", "collection", "rw", "/"),
            },
            "destination",
        ),
        # A delete has no source to read from.
        ({}, {"source": None}, "destination"),
        # An order to stop names no paths; here it names another node too.
        ({}, {"source": grant("third", "collection", "r")}, "destination"),
    ],
)
def test_a_ticket_for_somebody_or_something_else_is_refused(
    where: dict[str, Any], token: dict[str, Any], peer: str
) -> None:
    one = policy(**where)
    with pytest.raises(AccessDenied):
        accept(one, ticket(**token), peer)
    with pytest.raises(TowpathError):
        one.check(parse_path_untrusted("/shared/x"), time.time())
    print(
        f"shown by {peer}, where {sorted(where) or 'all is right'}, with {sorted(token) or 'nothing'} changed: refused"
    )


def test_tickets_of_another_relay_or_root_are_refused() -> None:
    for signer in (signer_of(RelayRoot.generate()), signer_of(ROOT, "another relay")):
        now = time.time()
        token = signer.sign(
            Ticket(
                relay_id=signer.relay_id,
                ticket_id="t",
                session_id="session",
                task_id="task",
                source=grant("source", "collection", "r", "/shared"),
                destination=grant("destination", "other", "rw", "/in"),
                policy_epoch=0,
                issued=now,
                expires=now + 600,
            )
        )
        with pytest.raises(ProtocolError):
            accept(policy(), token)


def test_a_ticket_without_paths_opens_nothing() -> None:
    one = policy()
    accept(one, ticket(source=grant("source", "collection", "r")))
    for path in ("/", "/shared", "/shared/x"):
        with pytest.raises(AccessDenied):
            one.check(parse_path_untrusted(path), time.time())


def test_an_older_ticket_for_other_folders_counts_no_more() -> None:
    """The relay has given the source a newer one since, and what only the older one opens was taken away."""
    verifier, now = TicketVerifier("relay", ROOT.public_pem), time.time()
    narrow = {"source": msgspec.structs.replace(grant("source", "collection", "r", "/shared"), reach=["/shared"])}
    one = policy(ordered=verifier.verify_untrusted(ticket(issued=now, **narrow), now))
    for issued in (now - 60, now):
        with pytest.raises(RetryLater) as caught:
            accept(one, ticket(issued=issued))
        assert caught.value.code == TICKET_EXPIRED
        with pytest.raises(TowpathError):
            one.check(parse_path_untrusted("/shared/x"), now)
    # One for the same may be older: both agents get theirs anew now and then, one after the other.
    accept(one, ticket(issued=now - 60, **narrow))
    # One that is newer is on its way to the source, too.
    accept(policy(ordered=one._ordered), ticket(issued=now + 2))
