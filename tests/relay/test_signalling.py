"""Introducing two nodes: what passes, when both are told to begin, and what a hostile or hasty agent gets."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from protocol.candidates import MEETING, Arrangement, Candidate, PathAnswer, PathGo, PathOffer
from protocol.control import decode_untrusted, encode
from protocol.errors import ProtocolError, RetryLater
from protocol.stun import PortNote
from relay.rendezvous import signalling
from relay.rendezvous.signalling import Signalling, start_times

SESSION = "00000000-0000-4000-8000-0000000000b2"
TASK = "00000000-0000-4000-8000-0000000000b1"
OFFER = PathOffer(
    session_id=SESSION,
    task_id=TASK,
    generation=7,
    token="0" * 32,
    count=2,
    candidates=[Candidate(kind="mapped-tcp", host="192.0.2.1", port=4000, slot=1)],
    transports=["tcp", "tunnel"],
)
ANSWER = PathAnswer(
    session_id=SESSION,
    generation=7,
    candidates=[Candidate(kind="mapped-tcp", host="192.0.2.2", port=5000)],
    transports=["tcp", "tunnel"],
)


class Links:
    """Two agents; remembers what each was told."""

    def __init__(self, answer: object = ANSWER) -> None:
        self.answer = answer
        self.told: list[tuple[str, str, object]] = []

    def address(self, node_id: str) -> str:
        return {"destination": "192.0.2.1", "source": "192.0.2.2"}.get(node_id, "")

    def round_trip(self, node_id: str) -> float | None:
        return {"destination": 0.2, "source": 0.03}[node_id]

    async def call(
        self, node_id: str, method: str, path: str, *, document: object | None = None, timeout: float = 30.0
    ) -> bytes:
        await trio.lowlevel.checkpoint()
        self.told.append((node_id, f"{method} {path}", document))
        return encode(self.answer) if path.endswith("/offer") else b""

    def go_of(self, node_id: str) -> PathGo:
        return next(row[2] for row in self.told if row[0] == node_id and isinstance(row[2], PathGo))


class Places:
    def __init__(self, most: int = 100) -> None:
        self.given = 0
        self.most = most

    def places(self, offer: PathOffer, destination: str, source: str, owner_id: str) -> tuple[Candidate, Candidate]:
        if self.given == self.most:
            raise RetryLater("You have moved 5 bytes through the relay's tunnel today.")
        self.given += 1
        place = Candidate(kind="relay-tunnel", host="relay", port=443)
        return tuple(msgspec.structs.replace(place, token=f"{side}{self.given}") for side in ("d", "s"))  # type: ignore[return-value]


async def test_both_get_the_others_candidates_and_their_go() -> None:
    links = Links()
    subject = Signalling(links)
    assert subject.admit(OFFER)
    await subject.introduce(OFFER, "destination", "source")
    subject.done(OFFER)
    node, request, passed = links.told[0]
    assert (node, request) == ("source", f"PUT /link/sessions/{SESSION}/offer")
    assert isinstance(passed, PathOffer)
    assert (passed.observed, passed.peer_observed) == ("192.0.2.2", "192.0.2.1")
    destination, source = links.go_of("destination"), links.go_of("source")
    assert destination.answer == ANSWER
    assert source.answer is None
    assert (destination.observed, destination.peer_observed) == ("192.0.2.1", "192.0.2.2")
    # The destination's message is 85 ms longer on its way, and the source begins an eighth of both round trips later.
    assert source.start_in - destination.start_in == pytest.approx(0.085 + 0.23 / 8)


@given(st.one_of(st.none(), st.floats(0, 10)), st.one_of(st.none(), st.floats(0, 10)))
def test_both_begin_together_the_source_a_little_later_and_not_before_they_can_know(
    one: float | None, other: float | None
) -> None:
    waits = start_times(one, other)
    assumed = [min(0.1 if trip is None else trip, 2.0) / 2 for trip in (one, other)]
    later = waits[1] + assumed[1] - waits[0] - assumed[0]
    # A quarter of what the agents have between them in one direction, if that leads past the relay's place.
    assert later == pytest.approx(min(sum(assumed) / 4, 0.05))
    assert min(waits) >= signalling.MARGIN - 1e-9


async def test_each_connection_gets_a_place_at_the_tunnel_of_its_own() -> None:
    links, places = Links(), Places()
    await Signalling(links, places).introduce(OFFER, "destination", "source")
    assert [row.token for row in links.go_of("destination").tunnels] == ["d1", "d2"]
    assert [row.token for row in links.go_of("source").tunnels] == ["s1", "s2"]


@pytest.mark.parametrize("most", [0, 1])
async def test_the_destination_is_told_why_there_are_no_more_places(most: int) -> None:
    links = Links()
    await Signalling(links, Places(most)).introduce(OFFER, "destination", "source")
    assert len(links.go_of("destination").tunnels) == len(links.go_of("source").tunnels) == most
    assert links.go_of("destination").tunnel_refused == "You have moved 5 bytes through the relay's tunnel today."
    # Whose amount is used up is no business of the source's.
    assert links.go_of("source").tunnel_refused == ""


@pytest.mark.parametrize("side", ["offer", "answer"])
async def test_a_side_that_wants_no_tunnel_gets_none(side: str) -> None:
    answer = msgspec.structs.replace(ANSWER, transports=["tcp"]) if side == "answer" else ANSWER
    offer = msgspec.structs.replace(OFFER, transports=["tcp"]) if side == "offer" else OFFER
    links, places = Links(answer), Places()
    await Signalling(links, places).introduce(offer, "destination", "source")
    assert places.given == 0
    assert links.go_of("source").tunnels == []


async def test_the_same_generation_again_adds_candidates_and_starts_nothing() -> None:
    links = Links()
    subject = Signalling(links)
    await subject.introduce(OFFER, "destination", "source")
    before = len(links.told)
    await subject.introduce(OFFER, "destination", "source")
    assert [row[1] for row in links.told[before:]] == [f"PUT /link/sessions/{SESSION}/offer"]


async def test_what_is_added_comes_after_what_it_is_added_to() -> None:
    links = Links()
    subject = Signalling(links)
    answered = trio.Event()
    ask = links.call

    async def slowly(node_id: str, method: str, path: str, **options: Any) -> bytes:
        answer = await ask(node_id, method, path, **options)
        if path.endswith("/offer") and len(links.told) == 1:
            await answered.wait()
        return answer

    links.call = slowly  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(subject.introduce, OFFER, "destination", "source")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(subject.introduce, OFFER, "destination", "source")
        await trio.testing.wait_all_tasks_blocked()
        assert len(links.told) == 1
        answered.set()
    assert sum(path.endswith("/offer") for _, path, _ in links.told) == 2
    assert sum(path.endswith("/go") for _, path, _ in links.told) == 2


async def test_later_addresses_of_the_source_are_passed_on_for_the_newest_offer_alone() -> None:
    links = Links()
    subject = Signalling(links)
    more = msgspec.structs.replace(ANSWER, candidates=[Candidate(kind="portmap", host="192.0.2.7", port=7)])
    assert not subject.admit_candidates("source", TASK, more)
    assert not subject.admit_candidates("source", TASK, msgspec.structs.replace(more, generation=-1))
    await subject.introduce(OFFER, "destination", "source")
    for stranger in ("destination", "another", ""):
        assert not subject.admit_candidates(stranger, TASK, more)
    assert not subject.admit_candidates("source", TASK, msgspec.structs.replace(more, generation=6))
    assert not subject.admit_candidates("source", TASK, msgspec.structs.replace(more, candidates=more.candidates * 100))
    assert subject.admit_candidates("source", TASK, more)
    # One at a time for each task.
    assert not subject.admit_candidates("source", TASK, more)
    await subject.add_candidates(TASK, more, "destination")
    subject.done_candidates(TASK)
    assert links.told[-1] == ("destination", f"PUT /link/tasks/{TASK}/candidates", more)
    assert subject.admit_candidates("source", TASK, more)


@pytest.mark.parametrize(
    "answer",
    [
        msgspec.structs.replace(ANSWER, generation=8),
        msgspec.structs.replace(ANSWER, session_id=TASK),
        msgspec.structs.replace(ANSWER, candidates=[Candidate(kind="host", host="x" * 300, port=1)]),
        msgspec.structs.replace(ANSWER, candidates=[Candidate(kind="host", host="x", port=1)] * 100),
        {"nothing": 1},
    ],
)
async def test_an_answer_that_is_none_goes_no_further(answer: object) -> None:
    links = Links(answer)
    with pytest.raises(ProtocolError):
        await Signalling(links).introduce(OFFER, "destination", "source")
    assert len(links.told) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"count": 0},
        {"count": 65},
        {"token": "x" * 65},
        {"transports": ["x"] * 17},
        {"candidates": [Candidate(kind="host", host="x", port=0)]},
        {"candidates": [Candidate(kind="host", host="x", port=1, slot=99)]},
    ],
)
async def test_malformed_offers_are_not_passed_on(changes: dict[str, object]) -> None:
    assert not Signalling(Links()).admit(msgspec.structs.replace(OFFER, **changes))


async def test_stale_offers_and_hasty_probes_are_not_passed_on(autojump_clock: trio.testing.MockClock) -> None:
    subject = Signalling(Links())
    await subject.introduce(OFFER, "destination", "source")
    newer = msgspec.structs.replace(OFFER, generation=8, probe=True)
    assert not subject.admit(msgspec.structs.replace(OFFER, generation=6))
    assert not subject.admit(newer)
    await trio.sleep(signalling.INTERVAL)
    assert subject.admit(newer)
    assert subject.statistics().refused == 2


class Echoing(Links):
    """The source answers whatever offer it is given."""

    async def call(self, node_id: str, method: str, path: str, *, document: Any = None, timeout: float = 30.0) -> bytes:
        if isinstance(document, PathOffer):
            self.answer = msgspec.structs.replace(ANSWER, generation=document.generation)
        return await super().call(node_id, method, path, document=document, timeout=timeout)

    def passed_on(self) -> list[int]:
        return [row[2].generation for row in self.told if isinstance(row[2], PathOffer)]


async def test_of_offers_that_come_too_soon_the_newest_is_passed_on_in_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    links = Echoing()
    subject = Signalling(links)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for generation in (7, 8, 10, 9):
            nursery.start_soon(offered, subject, msgspec.structs.replace(OFFER, generation=generation))
            await trio.sleep(0.05)
    assert links.passed_on() == [7, 10]
    assert trio.current_time() - began == pytest.approx(signalling.INTERVAL)
    assert subject.statistics().refused == 2
    # Nothing is left of it, and the next one waits from then on.
    await offered(subject, msgspec.structs.replace(OFFER, generation=11))
    assert links.passed_on() == [7, 10, 11]
    assert trio.current_time() - began == pytest.approx(2 * signalling.INTERVAL)
    assert subject._early == {}
    assert subject._pending == 0


class AwayAtFirst(Links):
    away = True

    async def call(self, node_id: str, *arguments: Any, **options: Any) -> bytes:
        if self.away:
            await trio.lowlevel.checkpoint()
            raise RetryLater("It is away.", code=signalling.OFFLINE)
        return await super().call(node_id, *arguments, **options)


async def offered(subject: Signalling, offer: PathOffer = OFFER) -> None:
    assert subject.admit(offer)
    try:
        await subject.introduce(offer, "destination", "source")
    finally:
        subject.done(offer)


async def test_an_offer_waits_a_moment_for_a_source_that_is_being_started_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    links = AwayAtFirst()
    subject = Signalling(links)
    newer = msgspec.structs.replace(OFFER, generation=8)
    for offer in (OFFER, newer):
        with pytest.raises(RetryLater):
            await offered(subject, offer)
        await trio.sleep(signalling.MISSED_LIFE - 1)
    links.away = False
    assert subject.missed("another") == []
    assert subject.missed("source") == [("destination", newer)]
    links.answer = msgspec.structs.replace(ANSWER, generation=8)
    await subject.introduce(newer, "destination", "source")
    subject.done(newer)
    assert links.go_of("destination").generation == 8
    assert subject.missed("source") == []


async def test_nobody_waits_any_more_for_an_old_offer_or_a_probe(autojump_clock: trio.testing.MockClock) -> None:
    subject = Signalling(AwayAtFirst())
    with pytest.raises(RetryLater):
        await offered(subject, msgspec.structs.replace(OFFER, probe=True))
    assert subject.missed("source") == []
    await trio.sleep(1)
    with pytest.raises(RetryLater):
        await offered(subject, msgspec.structs.replace(OFFER, generation=8))
    await trio.sleep(signalling.MISSED_LIFE + 1)
    assert subject.missed("source") == []


async def test_missed_offers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signalling, "MAX_PENDING", 3)
    subject = Signalling(AwayAtFirst())
    for number in range(5):
        with pytest.raises(RetryLater):
            await offered(subject, msgspec.structs.replace(OFFER, task_id=str(number)))
    assert [offer.task_id for _, offer in subject.missed("source")] == ["2", "3", "4"]


async def test_an_agent_that_is_away_is_told_to_the_caller() -> None:
    class Away(Links):
        async def call(self, *_arguments: object, **_options: object) -> bytes:
            raise RetryLater("away")

    with pytest.raises(RetryLater):
        await Signalling(Away()).introduce(OFFER, "destination", "source")


@given(st.binary(max_size=300))
def test_any_bytes_for_an_offer_raise_only_the_protocol_error(data: bytes) -> None:
    for kind in (PathOffer, PathAnswer, PathGo):
        try:
            decode_untrusted(data, kind)
        except ProtocolError:
            continue


def arrange(
    subject: Signalling, source: str, known: list[Candidate], *, tunnel: bool = True, meet: bool = False
) -> tuple[Arrangement, Arrangement]:
    hosts = known, [Candidate(kind="host", host="2001:db8::5", port=4005), *known]
    return subject.arrange(SESSION, TASK, "destination", source, "owner", hosts, tunnel=tunnel, meet=meet)


async def test_a_path_is_arranged_before_anybody_asks_until_a_pair_is_seen_to_need_none() -> None:
    links, places = Links(), Places()
    subject = Signalling(links, places)
    known = [
        Candidate(kind="host", host="192.0.2.1", port=4000),
        Candidate(kind="mapped-tcp", host="192.0.2.1", port=4001),
        Candidate(kind="host", host="192.0.2.1", port=4002, slot=1),
    ]
    destination, source = arrange(subject, "source", known)
    assert destination.token == source.token
    assert (destination.observed, destination.peer_observed) == ("192.0.2.1", "192.0.2.2")
    assert (source.observed, source.peer_observed) == ("192.0.2.2", "192.0.2.1")
    # What needs no arrangement, and the data port's only.
    assert source.candidates == known[:1]
    assert destination.candidates == []
    assert [row.token for row in destination.tunnels] == ["d1", "d2"]
    assert [row.token for row in source.tunnels] == ["s1", "s2"]
    # They did not ask for a path: they reach one another.
    again = arrange(subject, "source", known)
    assert [row.tunnels for row in again] == [[], []]
    assert again[0].token != destination.token
    other = arrange(subject, "another", known, tunnel=False)
    assert [row.tunnels for row in other] == [[], []]
    # They ask, so they need one.
    await subject.introduce(OFFER, "destination", "source")
    assert len(arrange(subject, "source", known)[0].tunnels) == 2


async def test_the_pairs_that_need_no_arrangement_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signalling, "MAX_PAIRS", 3)
    subject = Signalling(Links(), Places())
    for number in range(5):
        arrange(subject, f"source {number}", [])
    assert list(subject._content) == [("destination", f"source {number}") for number in (2, 3, 4)]


async def test_both_are_told_of_each_others_ports_when_the_relay_has_seen_all_of_them() -> None:
    links = Links()
    subject = Signalling(links)
    own = [Candidate(kind="host", host="2001:db8::9", port=4000)]
    destination, source = arrange(subject, "source", own, tunnel=False, meet=True)
    assert destination.show != source.show
    assert all(len(word) == 32 for word in (destination.show, source.show))
    shown = bytes.fromhex(destination.show), bytes.fromhex(source.show)
    await subject.seen(PortNote(shown[1], 0), ("192.0.2.2", 5000))
    await subject.seen(PortNote(shown[0], 2, 4102), ("192.0.2.1", 6002))
    assert links.told == []
    # What they show need not be where their links come from.
    await subject.seen(PortNote(shown[0], 1), ("192.0.2.111", 6001))
    to_source, to_destination = links.go_of("source"), links.go_of("destination")
    assert {(node, request) for node, request, _ in links.told} == {
        ("source", f"PUT /link/sessions/{SESSION}/go"),
        ("destination", f"PUT /link/tasks/{TASK}/go"),
    }
    assert {to_source.generation, to_destination.generation} == {MEETING}
    assert [(row.host, row.port, row.slot) for row in to_source.candidates] == [
        ("192.0.2.111", 6001, 1),
        ("192.0.2.1", 6002, 2),
        ("2001:db8::9", 4102, 2),
    ]
    assert [(row.host, row.port) for row in to_destination.candidates] == [
        ("192.0.2.2", 5000),
        ("2001:db8::5", 4005),
        ("2001:db8::9", 4000),
    ]
    assert (to_destination.observed, to_destination.peer_observed) == ("192.0.2.1", "192.0.2.2")
    assert to_source.start_in - to_destination.start_in == pytest.approx(0.085 + 0.23 / 8)
    # Both look for a path, so the next task of theirs is helped again; shown again it brings nothing.
    await subject.seen(PortNote(shown[0], 1), ("192.0.2.111", 6001))
    assert len(links.told) == 2
    assert subject.statistics().met == 1
    assert arrange(subject, "source", own, tunnel=False, meet=True)[0].show


async def test_a_pair_that_shows_no_ports_is_not_asked_to_again() -> None:
    subject = Signalling(Links(), Places())
    assert arrange(subject, "source", [], meet=True)[1].show
    assert [row.show for row in arrange(subject, "source", [], meet=True)] == ["", ""]
