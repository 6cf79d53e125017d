"""What a worker does once while it waits for work: handshakes with itself, and a ticket of its own.

The first of each loads libraries and builds tables, which takes several times as long as the second. A transfer whose
worker has done both before begins that much sooner.
"""

from __future__ import annotations

import contextlib
import socket
from concurrent.futures import ThreadPoolExecutor

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.connect.lane_tls import secure_lane
from agent.connect.tls import check_peer, session_context
from protocol.identity import NodeKey
from protocol.session import ALPN_CONTROL, ALPN_LANE, SNI_SUFFIX
from protocol.threads import check_room
from protocol.ticket import Grant, RelayRoot, Ticket, TicketSigner, TicketVerifier

_NAME = f"rehearsal{SNI_SUFFIX}"


def rehearse() -> None:
    """Takes some 30 ms of processor time the first time. Raises `NoThread`."""
    check_room(1)
    ours, theirs = NodeKey.generate(), NodeKey.generate()
    ours = NodeKey.from_pem(ours.private_key_pem)
    _secure_control(ours, theirs)
    _secure_lane(ours, theirs)
    _verify_a_ticket()


def _secure_lane(ours: NodeKey, theirs: NodeKey) -> None:
    near, far = socket.socketpair()
    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(secure_lane, far, theirs, ours.certificate_pem, server_name=None, alpn=ALPN_LANE)
        secure_lane(near, ours, theirs.certificate_pem, server_name=_NAME, alpn=ALPN_LANE).close()
        served.result().close()


def _secure_control(ours: NodeKey, theirs: NodeKey) -> None:
    context = session_context(theirs, ours.certificate_pem, server_side=True, alpn=(ALPN_CONTROL,))
    near, far = socket.socketpair()
    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(context.wrap_socket, far, server_side=True)
        secure_lane(near, ours, theirs.certificate_pem, server_name=_NAME, alpn=ALPN_CONTROL).close()
        with contextlib.closing(served.result()) as server:
            check_peer(server.getpeercert(binary_form=True), ours.fingerprint)


def _verify_a_ticket() -> None:
    root, key = RelayRoot.generate(), Ed25519PrivateKey.generate()
    signer = TicketSigner("rehearsal", key, root.certify(key.public_key(), "key", 0, 2), "key")
    grant = Grant(node_id="", fingerprint="", collection_id="", paths=["/"], access="rw")
    ticket = Ticket(
        relay_id="rehearsal",
        ticket_id="",
        session_id="",
        task_id="",
        source=grant,
        destination=grant,
        policy_epoch=0,
        issued=0,
        expires=2,
    )
    TicketVerifier("rehearsal", root.public_pem).at_any_time_untrusted(signer.sign(ticket))
