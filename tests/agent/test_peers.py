"""Looking for ways to other agents over real sockets on loopback, and what the doctor makes of what is found."""

from __future__ import annotations

import msgspec
import pytest
import trio

from agent.connect.peers import Peer, PeerPath, PeerProbes
from agent.connect.quic.transport import QuicTransport
from agent.connect.running_race import why_nobody_is_dialled
from agent.doctor.peers import finding_of
from protocol.candidates import HOST, MAPPED_UDP, Candidate, PathAnswer, PathGo, PathOffer, Rules
from protocol.control import SessionAnswer
from protocol.errors import RetryLater
from protocol.identity import NodeKey
from tests.agent.paths_world import SESSION, TASK, Node, World, answer, at, world
from tests.agent.quic_pair import CLIENT, SERVER
from tests.agent.test_paths import hidden


def peer(known: SessionAnswer | None) -> Peer:
    return Peer(node_id="n", task_id=TASK, session_id=SESSION, collection_id="c", name="Lab", answer=known)


class Gos:
    """Takes the relay's word in the place of a task's finder."""

    def __init__(self, probes: PeerProbes) -> None:
        self.probes = probes

    def take_go(self, go: PathGo) -> None:
        assert self.probes.take_go(TASK, go)

    def take_candidates(self, more: PathAnswer) -> None:
        self.probes.take_candidates(TASK, more)


def probes_of(made: World) -> PeerProbes:
    send = made.finder._send_offer
    probes = PeerProbes(made.destination.network, send, lambda: 7)
    made.finder = Gos(probes)  # type: ignore[assignment]
    return probes


async def test_a_peer_that_can_be_dialled_is_and_hears_nothing() -> None:
    async with world() as made:
        probes = probes_of(made)
        assert made.source.network.data_port is not None
        (found,) = await probes.probe([peer(answer(at(made.source.network.data_port.port)))])
        assert found.kind == "direct"
        assert found.remote == f"127.0.0.1:{made.source.network.data_port.port}"
        # The other ways are none of this agent's.
        assert (found.udp, found.tunnel) == (False, False)
        with pytest.raises(RetryLater, match="every 15 seconds"):
            await probes.probe([peer(None)])
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert made.source.delivered == []


async def test_without_a_known_address_a_way_is_arranged_through_the_relay() -> None:
    async with world() as made:
        (found,) = await probes_of(made).probe([peer(None)])
        assert found.kind in ("direct", "reversed", "punched")
        assert found.answered
        (offer,) = made.offers
        assert (offer.probe, offer.transports, offer.count) == (True, ["tcp"], 1)
        assert made.source.delivered == []
        assert made.failures == []


def quic_of(node: Node, identity: NodeKey, source: NodeKey) -> QuicTransport:
    async def certificate(_session_id: str) -> str:
        await trio.lowlevel.checkpoint()
        return source.certificate_pem

    async def observe(sock: trio.socket.SocketType) -> list[Candidate]:
        await trio.lowlevel.checkpoint()
        return [Candidate(kind=MAPPED_UDP, host="127.0.0.1", port=sock.getsockname()[1])]

    made = QuicTransport(identity, certificate, observe, lambda rows, _go: rows)
    node.network.transports.quic = made
    return made


@pytest.mark.timeout(120)
async def test_the_handshake_of_quic_is_made_too_and_nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    # What comes of it, not how soon: two processes start for it, which this machine may be too busy for.
    for limit in ("peers.PATIENCE", "looks.LOOK_TIME", "quic.transport.LOOK_TIMEOUT"):
        monkeypatch.setattr(f"agent.connect.{limit}", 50.0)
    async with world() as made, trio.open_nursery() as nursery:
        assert made.source.network.data_port is not None
        nursery.start_soon(quic_of(made.source, SERVER, CLIENT).run)
        nursery.start_soon(quic_of(made.destination, CLIENT, SERVER).run)
        await trio.testing.wait_all_tasks_blocked()
        known = answer(at(made.source.network.data_port.port))
        (found,) = await probes_of(made).probe([peer(known)])
        # However soon the address answered, the other ways were looked at.
        assert found.kind == "direct"
        assert (found.udp, found.udp_why) == (True, "")
        assert (found.tunnel, found.tunnel_why) == (False, "this agent has none")
        (offer,) = made.offers
        assert (offer.probe, offer.transports) == (True, ["tcp", "quic"])
        assert made.source.delivered == []
        nursery.cancel_scope.cancel()


async def test_where_there_is_no_way_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.connect.peers.PATIENCE", 1.0)
    async with world() as made:
        await hidden(made)
        (found,) = await probes_of(made).probe([peer(None)])
    assert (found.kind, found.rtt_ms) == ("", None)
    assert "address from outside is not known" in found.why


async def test_a_peer_that_is_stopped_is_not_said_to_be_reached_through_the_relay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agent.connect.peers.PATIENCE", 0.3)
    offers: list[PathOffer] = []
    async with world() as made:
        # The relay finds that it is not linked, and gives no go.
        (found,) = await PeerProbes(made.destination.network, offers.append, lambda: 7).probe([peer(None)])
    assert offers
    assert (found.kind, found.answered) == ("", False)
    told = finding_of(msgspec.to_builtins(found))
    assert told.level == "warning"
    assert "did not answer through the relay" in told.sentence
    assert told.advice
    assert "goes through the relay" not in told.advice


def test_the_doctor_says_it_in_words() -> None:
    reached = finding_of({"name": "Lab", "kind": "reversed", "rtt_ms": 12.4})
    assert (reached.level, reached.sentence) == (
        "ok",
        "Lab is reached directly: it can dial this machine, 12 ms there and back.",
    )
    both = finding_of(
        {"name": "Lab", "kind": "direct", "udp": True, "tunnel": False, "tunnel_why": "the relay has none"}
    )
    assert (both.level, both.sentence) == (
        "ok",
        "Lab is reached directly: it can be dialled. QUIC over UDP works. The relay's tunnel does not"
        " (the relay has none).",
    )
    row = PeerPath(collection_id="c", name="", task_id=TASK, kind="", why="nothing came through")
    missed = finding_of({"collection_id": row.collection_id, "name": row.name, "kind": row.kind, "why": row.why})
    assert (missed.level, missed.sentence) == (
        "warning",
        "No direct way to c was found over TCP: nothing came through.",
    )
    assert missed.advice
    assert "port mapping" in missed.advice
    assert finding_of({"name": "Lab", "kind": "", "udp": True}).level == "ok"
    assert finding_of({"name": "Lab", "kind": "", "udp": False, "tunnel": False}).level == "failure"


async def test_the_relay_passes_on_few_probes(autojump_clock: trio.testing.MockClock) -> None:
    from relay.rendezvous.signalling import PROBE_INTERVAL, Signalling
    from tests.relay.test_signalling import ANSWER, OFFER, Links

    subject = Signalling(Links())
    await subject.introduce(OFFER, "destination", "source")
    later = PathOffer(session_id=SESSION, task_id=OFFER.task_id, generation=8, token="0" * 32, count=1, probe=True)
    assert ANSWER.generation < later.generation
    await trio.sleep(1)
    # A task that began a moment ago is no reason against it, another look at its source is.
    assert subject.admit(later)
    subject.done(later)
    await trio.sleep(PROBE_INTERVAL - 0.1)
    again = msgspec.structs.replace(later, generation=9)
    assert not subject.admit(again)
    await trio.sleep(0.1)
    assert subject.admit(again)


def test_two_agents_on_one_machine_are_told_how_they_get_a_direct_path() -> None:
    rules = Rules(own=frozenset({"192.0.2.2"}), same_site=True)
    mine, other = (Candidate(kind=HOST, host=host, port=1) for host in ("192.0.2.2", "192.0.2.3"))
    why = why_nobody_is_dialled([other, mine], rules)
    assert "data.allow_loopback" in why
    # No port mapping helps them.
    advice = finding_of({"name": "Lab", "kind": "", "why": why}).advice
    assert ("`towpath config set data.allow_loopback true` with both" in advice, "mapping" in advice) == (True, False)
    assert "from outside" in why_nobody_is_dialled([other], rules)
    # Private addresses are the same behind many routers.
    assert "from outside" in why_nobody_is_dialled([mine], msgspec.structs.replace(rules, same_site=False))
