"""Strangers at a serving worker, over real TLS: whoever is not exactly the node of the ticket, asking for exactly what
it covers, is served nothing. Every byte that comes back is counted and searched for the source's contents and names."""

from __future__ import annotations

import ssl
import time
import uuid
from collections.abc import Callable
from functools import partial

import msgspec
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.connect.tls import check_peer, session_context
from protocol import lane, session
from protocol.control import SessionOrder
from protocol.errors import AccessDenied
from protocol.identity import NodeKey
from protocol.ticket import Grant, RelayRoot, TicketSigner
from tests.agent.engine_world import RELAY
from tests.agent.session_scene import (
    INSTANCE,
    OPEN,
    SECRET,
    Scene,
    asking,
    converse,
    messages_in,
    read_on_lane,
    scene,
    visit,
)

__all__ = ["scene"]

pytestmark = pytest.mark.usefixtures("workers_forked")

# --- who may connect -------------------------------------------------------------------------------------------------


IDENTITIES: dict[str, Callable[[Scene], NodeKey | None]] = {
    "no certificate": lambda scene: None,
    "a certificate of nobody": lambda scene: NodeKey.generate(),
    "the source's own certificate, reflected": lambda scene: scene.made.alpha.key,
}


@pytest.mark.parametrize("alpn", [session.ALPN_CONTROL, session.ALPN_LANE])
@pytest.mark.parametrize("who", IDENTITIES)
async def test_a_wrong_certificate_is_served_zero_bytes(scene: Scene, who: str, alpn: str) -> None:
    data = asking(scene.ticket) if alpn == session.ALPN_CONTROL else lane.encode_header(lane.LaneHello(INSTANCE, 0))
    context = scene.context(IDENTITIES[who](scene), alpn)
    served = await trio.to_thread.run_sync(visit, scene, context, data)
    assert served == b""
    print(f"{who} on {alpn}: {len(served)} bytes served")


async def test_a_node_with_a_session_of_its_own_cannot_enter_another_one(scene: Scene) -> None:
    gamma = NodeKey.generate()
    party = msgspec.structs.replace(scene.made.beta.party, certificate=gamma.certificate_pem, node_id=str(uuid.uuid4()))
    task, session_id = str(uuid.uuid4()), str(uuid.uuid4())
    grant = msgspec.structs.replace(
        scene.made.beta.grant("rw", ["/"]), node_id=party.node_id, fingerprint=gamma.fingerprint
    )
    ticket = scene.made.ticket(task, session_id, scene.made.alpha.grant("r", ["/open"]), grant)
    assert scene.made.alpha.service is not None
    order = SessionOrder(session_id=session_id, task_id=task, ticket=ticket, peer=party)
    await scene.made.alpha.service.put_session(order)
    for wanted in (scene.ticket, ticket):
        assert await trio.to_thread.run_sync(visit, scene, scene.context(gamma), asking(wanted)) == b""
    served = await trio.to_thread.run_sync(converse, scene, scene.context(gamma), session_id, ticket)
    assert isinstance(served[0], session.HelloAnswer), "its own session it may enter"


async def test_roles_are_not_swapped(scene: Scene) -> None:
    """Alpha, the source, dials beta as if beta were to serve it, with the very ticket of the session."""
    assert scene.made.beta.service is not None
    alpha = scene.made.alpha.party
    order = SessionOrder(session_id=scene.session, task_id=scene.task, ticket=scene.ticket, peer=alpha)
    with pytest.raises(AccessDenied):
        await scene.made.beta.service.put_session(order)
    # Where beta listens: a session that it does serve tells.
    back, task = str(uuid.uuid4()), str(uuid.uuid4())
    ticket = scene.made.ticket(task, back, scene.made.beta.grant("r", ["/"]), scene.made.alpha.grant("rw", ["/"]))
    order = SessionOrder(session_id=back, task_id=task, ticket=ticket, peer=scene.made.alpha.party)
    answer = await scene.made.beta.service.put_session(order)
    other = Scene(scene.made, scene.task, scene.session, scene.ticket, answer)
    context = session_context(
        scene.made.alpha.key, scene.made.beta.key.certificate_pem, server_side=False, alpn=(session.ALPN_CONTROL,)
    )
    assert await trio.to_thread.run_sync(visit, other, context, asking(scene.ticket)) == b""
    refused = await trio.to_thread.run_sync(converse, other, context, back, scene.ticket)
    assert [answer.error["code"] for answer in refused] == ["TICKET_REFUSED"]


# --- with which ticket -----------------------------------------------------------------------------------------------


def foreign(scene: Scene) -> str:
    """A ticket that another relay has signed, in this one's name."""
    root, key = RelayRoot.generate(), Ed25519PrivateKey.generate()
    signer = TicketSigner(RELAY, key, root.certify(key.public_key(), "k", time.time() - 100, time.time() + 86400), "k")
    scene.made.signer, real = signer, scene.made.signer
    try:
        return scene.ticket_for()
    finally:
        scene.made.signer = real


def tampered(scene: Scene) -> str:
    """The real ticket with a wider scope pasted in, which the order does not have either."""
    return pasted(scene, scene.ticket_for(source=scene.made.alpha.grant("r", ["/"])))


def prolonged(scene: Scene) -> str:
    """The real ticket with a later end pasted in: nothing but its signature is wrong."""
    return pasted(scene, scene.ticket_for(expires=time.time() + 86400))


def pasted(scene: Scene, other: str) -> str:
    (head, _, signature), claims = scene.ticket.split("."), other.split(".")[1]
    return f"{head}.{claims}.{signature}"


def other_node(scene: Scene) -> Grant:
    return msgspec.structs.replace(scene.made.beta.grant("rw", ["/"]), fingerprint=NodeKey.generate().fingerprint)


def source_but(scene: Scene, **changes: str) -> Grant:
    """What the source may be asked for, but for one thing."""
    return msgspec.structs.replace(scene.made.alpha.grant("r", ["/open"]), **changes)


TICKETS: dict[str, Callable[[Scene], str]] = {
    "none": lambda scene: "",
    "nonsense": lambda scene: "a.b.c",
    "expired": lambda scene: scene.ticket_for(issued=time.time() - 7200, expires=time.time() - 3600),
    "not valid yet": lambda scene: scene.ticket_for(issued=time.time() + 3600, expires=time.time() + 7200),
    "of another relay": foreign,
    "tampered with": tampered,
    "prolonged by its holder": prolonged,
    "of another session": lambda scene: scene.ticket_for(session_id=str(uuid.uuid4())),
    "of another task": lambda scene: scene.ticket_for(task_id=str(uuid.uuid4())),
    "for another destination": lambda scene: scene.ticket_for(destination=other_node(scene)),
    "with the roles swapped": lambda scene: scene.ticket_for(
        source=scene.made.beta.grant("r", ["/open"]), destination=scene.made.alpha.grant("rw", ["/"])
    ),
    "that names another node": lambda scene: scene.ticket_for(source=source_but(scene, node_id=str(uuid.uuid4()))),
    "that names another key": lambda scene: scene.ticket_for(
        source=source_but(scene, fingerprint=NodeKey.generate().fingerprint)
    ),
    "of another collection": lambda scene: scene.ticket_for(source=source_but(scene, collection_id=str(uuid.uuid4()))),
    "without a source": lambda scene: scene.ticket_for(source=None),
}


@pytest.mark.parametrize("what", TICKETS)
async def test_a_wrong_ticket_is_answered_by_a_refusal_and_nothing_else(scene: Scene, what: str) -> None:
    context = scene.context(scene.made.beta.key)
    answers = await trio.to_thread.run_sync(converse, scene, context, scene.session, TICKETS[what](scene))
    assert [type(answer) for answer in answers] == [session.Failed], what
    assert answers[0].error["code"] in ("TICKET_REFUSED", "TICKET_EXPIRED", "PROTOCOL_ERROR"), what
    print(f"{what}: {answers[0].error['code']}, nothing of a file served")


async def test_requests_before_the_ticket_was_accepted_are_not_answered(scene: Scene) -> None:
    data = asking(scene.ticket)
    received = await trio.to_thread.run_sync(visit, scene, scene.context(scene.made.beta.key), data)
    assert [type(answer) for answer in messages_in(received)] == [session.Failed]
    for message in (session.ListDirectory(1, b""), session.StatPaths(1, [b"open"]), session.RenewTicket(scene.ticket)):
        received = await trio.to_thread.run_sync(
            visit, scene, scene.context(scene.made.beta.key), session.encode(message)
        )
        assert [type(answer) for answer in messages_in(received)] == [session.Failed]
        assert b"shown-name" not in received


async def test_who_reads_with_a_ticket_that_was_narrowed_is_shown_out(scene: Scene) -> None:
    """The relay orders the session again, with less: the destination may have heard of it or not."""
    service, context = scene.made.alpha.service, scene.context(scene.made.beta.key)
    assert service is not None
    wide = scene.ticket
    before = await trio.to_thread.run_sync(converse, scene, context, scene.session, wide)
    assert isinstance(before[0], session.HelloAnswer)
    served = service.sessions._served[scene.session]
    narrow = scene.ticket_for(source=scene.made.alpha.grant("r", ["/open"], ["/open/deep"]))
    order = SessionOrder(session_id=scene.session, task_id=scene.task, ticket=narrow, peer=scene.made.beta.party)
    await service.put_session(order)
    assert served.scope.cancel_called
    for shown, kind in ((wide, session.Failed), (narrow, session.HelloAnswer)):
        answers = await trio.to_thread.run_sync(converse, scene, context, scene.session, shown)
        assert isinstance(answers[0], kind)
    # A ticket for the same disturbs nobody.
    served = service.sessions._served[scene.session]
    again = scene.ticket_for(source=scene.made.alpha.grant("r", ["/open"], ["/open/deep"]))
    await service.put_session(msgspec.structs.replace(order, ticket=again))
    assert not served.scope.cancel_called


# --- for which paths -------------------------------------------------------------------------------------------------


OUTSIDE = [
    b"",
    b"secret",
    b"secret/hidden-name",
    b"ope",
    b"opened",
    b"open/../secret/hidden-name",
    b"/secret",
    b"open//x",
]


async def test_paths_outside_of_the_ticket_are_refused_on_the_control_stream(scene: Scene) -> None:
    context = scene.context(scene.made.beta.key)
    for raw in OUTSIDE:
        requests = (
            session.ListDirectory(1, raw),
            session.StatPaths(2, [raw, b"open/shown-name"]),
            session.DigestFile(3, raw, "SHA256"),
        )
        for request in requests:
            _, answer = await trio.to_thread.run_sync(converse, scene, context, scene.session, scene.ticket, request)
            if isinstance(answer, session.Stats):
                refused, allowed = answer.results
                assert refused.row is None, raw
                assert allowed.row is not None
            else:
                assert isinstance(answer, session.Failed), raw


async def test_contents_outside_of_the_ticket_are_refused_on_a_lane(scene: Scene) -> None:
    size, block = len(SECRET), session.MIN_BLOCK
    secret, shown = scene.version("secret/hidden-name"), scene.version("open/shown-name")
    requests: list[session.Message] = [
        session.ReadRange(2, 0, b"secret/hidden-name", secret, 0, size, block),
        session.ReadPack(3, 0, b"secret", [session.PackFile(b"hidden-name", secret)]),
        session.ReadPack(4, 0, b"", [session.PackFile(b"secret/hidden-name", secret)]),
        session.ReadPack(5, 0, b"open", [session.PackFile(b"shown-name", shown), session.PackFile(b"x", secret)]),
        # The last file's folder does not speak for those before it.
        session.ReadPack(
            6, 0, b"", [session.PackFile(b"secret/hidden-name", secret), session.PackFile(b"open/shown-name", shown)]
        ),
        session.ReadRange(7, 0, b"open/shown-name", shown, 0, len(OPEN), block),
    ]
    wire, frames = await trio.to_thread.run_sync(read_on_lane, scene, requests)
    assert SECRET[:24] not in wire
    failed = {header.r for header, _ in frames if isinstance(header, lane.ReadFailed)}
    assert failed == {2, 3, 4, 6}
    print(f"requests outside of the ticket: {len(failed)} refused, bytes of such files served: 0")
    assert b"".join(payload for header, payload in frames if getattr(header, "r", 0) == 7) == OPEN


async def test_what_is_taken_before_it_is_known_is_inside_of_the_ticket(scene: Scene) -> None:
    paths = [b"secret/hidden-name", b"open/shown-name", b"open/../secret/hidden-name"]
    take = session.TakePaths(7, paths, 0, 7, len(paths), session.MAX_TAKEN, session.MAX_TAKEN)
    wire, frames = await trio.to_thread.run_sync(read_on_lane, scene, [take])
    assert SECRET[:24] not in wire
    assert b"".join(payload for _, payload in frames) == OPEN
    context = scene.context(scene.made.beta.key)
    # No lane is there to bring the content, which is said in a message of its own, now or later.
    _, answer, *rest = await trio.to_thread.run_sync(converse, scene, context, scene.session, scene.ticket, take)
    assert [result.row is not None for result in answer.results] == [False, True, False]
    assert all(isinstance(later, session.Failed) for later in rest), rest


async def test_links_lead_no_farther_than_the_ticket_says(scene: Scene) -> None:
    root = scene.made.alpha.root
    (root / "open/folder").symlink_to("../secret")
    (root / "open/file").symlink_to("../secret/hidden-name")
    version, size = scene.version("secret/hidden-name"), len(SECRET)
    requests: list[session.Message] = [
        session.ListDirectory(1, b"open/folder", follow=True),
        session.StatPaths(1, [b"open/folder/hidden-name", b"open/file"], follow=True),
        session.DigestFile(1, b"open/folder/hidden-name", "SHA256", follow=True),
        session.DigestFile(1, b"open/file", "SHA256", follow=True),
    ]
    on_lane: list[session.Message] = [
        session.ReadRange(2, 0, b"open/folder/hidden-name", version, 0, size, session.MIN_BLOCK, follow=True),
        session.ReadRange(3, 0, b"open/file", version, 0, size, session.MIN_BLOCK, follow=True),
        session.ReadPack(4, 0, b"open/folder", [session.PackFile(b"hidden-name", version)], follow=True),
    ]
    context = scene.context(scene.made.beta.key)
    # Of the same second as the one that the source was given it would be taken for one from before.
    later, confined = time.time() + 2, scene.made.alpha.grant("r", ["/open"], ["/open"])
    whole, narrow = scene.ticket, scene.ticket_for(source=confined, issued=later)
    for ticket, served in ((whole, True), (narrow, False), (whole, True)):
        # The first time before anything else that shows this ticket.
        for lane_first in (True, False):
            reading = partial(read_on_lane, scene, on_lane, ticket, lane_first=lane_first)
            wire, _ = await trio.to_thread.run_sync(reading)
            assert (SECRET[:24] in wire) == served, (served, lane_first)
        for request in requests:
            _, answer = await trio.to_thread.run_sync(converse, scene, context, scene.session, ticket, request)
            if isinstance(answer, session.Stats):
                assert [result.row is not None for result in answer.results] == [served, served]
            else:
                assert isinstance(answer, session.Failed) == (not served), request
        _, listed = await trio.to_thread.run_sync(
            converse, scene, context, scene.session, ticket, session.ListDirectory(1, b"open", True)
        )
        kinds = {row.name: row.kind for row in listed.rows}
        seen = {b"folder": session.DIRECTORY, b"file": session.FILE}
        assert {name: kinds[name] for name in seen} == (seen if served else dict.fromkeys(seen, session.SYMLINK))


async def test_a_lane_that_names_no_live_session_is_served_zero_bytes(scene: Scene) -> None:
    """The right node, the right certificate, and guesses at the secret of the control stream, which is waited for."""
    context = scene.context(scene.made.beta.key, session.ALPN_LANE)
    served: list[bytes] = []

    async def guess(instance: bytes) -> None:
        data = lane.encode_header(lane.LaneHello(instance, 0))
        served.append(await trio.to_thread.run_sync(visit, scene, context, data))

    async with trio.open_nursery() as nursery:
        for instance in (INSTANCE, bytes(32), b""):
            nursery.start_soon(guess, instance)
    assert served == [b""] * 3
    print("guesses at the secret: 3, bytes served: 0")


def test_the_pin_is_compared_once_more_after_the_handshake() -> None:
    """The second lock: it would hold if the library ever let somebody through."""
    mine, other = NodeKey.generate(), NodeKey.generate()
    check_peer(ssl.PEM_cert_to_DER_cert(mine.certificate_pem), mine.fingerprint)
    for presented in (ssl.PEM_cert_to_DER_cert(other.certificate_pem), b"no certificate", b"", None):
        with pytest.raises(AccessDenied):
            check_peer(presented, mine.fingerprint)


async def test_a_lane_must_know_the_secret_of_the_live_control_stream(scene: Scene) -> None:
    """The right node with the right certificate, while its session is open, and one bit off."""

    def guess() -> bytes:
        with scene.dial(scene.context(scene.made.beta.key)) as control:
            control.sendall(session.encode(session.Hello(scene.ticket, INSTANCE)))
            assert isinstance(messages_in(control.recv(65536))[0], session.HelloAnswer)
            wrong = bytes([INSTANCE[0] ^ 1]) + INSTANCE[1:]
            context = scene.context(scene.made.beta.key, session.ALPN_LANE)
            return visit(scene, context, lane.encode_header(lane.LaneHello(wrong, 0)))

    assert await trio.to_thread.run_sync(guess) == b""
