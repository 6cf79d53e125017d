"""Introduces the two nodes of a session: passes the destination's offer to the source, and gives both their go.

The go is so timed, from the round-trip times of the two links, that both sides begin to punch at one instant, without
any clock in common. The caller sees to it that the nodes belong to one running task.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import msgspec
import trio

from protocol.candidates import (
    DIALLED,
    MAX_SLOTS,
    MEETING,
    Arrangement,
    Candidate,
    PathAnswer,
    PathGo,
    PathOffer,
    check_candidates_untrusted,
)
from protocol.control import decode_untrusted
from protocol.errors import ProtocolError, TowpathError
from protocol.reversal import new_token
from protocol.stun import Endpoint, PortNote
from relay.rendezvous.meetings import Meeting, Meetings

# How long a source may take to gather its candidates, in seconds.
ANSWER_TIMEOUT = 5.0
GO_TIMEOUT = 5.0
# What the further side has between reading its message and the instant: little, since a destination that is some
# milliseconds late finds a source that begins later than it anyway. A link's round trip is guessed where unknown.
MARGIN = 0.001
GUESSED_ROUND_TRIP = 0.1
LONGEST_ROUND_TRIP = 2.0
# The source begins later by this part of both round trips, of which that between the agents is mostly no less than
# half, but no later than so many seconds. See `start_times`.
LATER, LATER_MOST = 1 / 8, 0.05
# A task gets a new introduction at most this often, in seconds.
INTERVAL = 0.3
# An offer that only wants to know whether there is a way, after another of that kind.
PROBE_INTERVAL = 10.0
MAX_PENDING = 4000
# An offer whose source was away is passed on when that comes back within this time; no destination waits for longer.
MISSED_LIFE = 5.0
OFFLINE = "GC_NOT_CONNECTED"
# Connections of a path that is arranged with a task's order: its control stream, and a lane.
ARRANGED_CONNECTIONS = 2
# Pairs of nodes that are remembered to have found a path without an offer.
MAX_PAIRS = 20_000


class Links(Protocol):
    """What is needed of the links to agents (see `relay.rendezvous.registry`)."""

    def address(self, node_id: str) -> str: ...

    def round_trip(self, node_id: str) -> float | None: ...

    async def call(
        self,
        node_id: str,
        method: str,
        path: str,
        *,
        document: object | None = None,
        timeout: float = 30.0,  # noqa: ASYNC109 - part of the registry's interface
    ) -> bytes: ...


class TunnelPlaces(Protocol):
    """Gives a session its two places at the relay's tunnel (see `relay.rendezvous`)."""

    def places(self, offer: PathOffer, destination: str, source: str, owner_id: str) -> tuple[Candidate, Candidate]:
        """For the destination and for the source. Raises `TowpathError` where this session may not have any now."""


@dataclass(frozen=True, slots=True)
class SignallingStatistics:
    """Offers since the start by what became of them, and pairs whose ports the relay has seen without an offer."""

    introduced: int
    added: int
    refused: int
    failed: int
    met: int


def start_times(destination: float | None, source: float | None) -> tuple[float, float]:
    """How long after it has read its go each side waits, in seconds, so that both begin at nearly one instant.

    Takes the round-trip times of their links; both messages leave the relay together. The source, which will send,
    begins a little later: where SYNs cross, the kernel of who begins first takes too little for the round trip, and
    BBR sends next to nothing with it for ten seconds (`protocol.congestion`). It costs no time: the destination speaks
    first, and knows a round trip after its own beginning that the connection stands.
    """
    ways = [
        min(GUESSED_ROUND_TRIP if trip is None else max(trip, 0.0), LONGEST_ROUND_TRIP) / 2
        for trip in (destination, source)
    ]
    instant = max(ways) + MARGIN
    return instant - ways[0], instant - ways[1] + min(LATER * 2 * sum(ways), LATER_MOST)


class Signalling:
    """One for each relay."""

    def __init__(self, links: Links, tunnel: TunnelPlaces | None = None) -> None:
        self._links = links
        self._tunnel = tunnel
        # Task → generation of the newest offer and when it came.
        self._newest: dict[str, tuple[int, float]] = {}
        # Task → the source that its newest offer went to.
        self._sources: dict[str, str] = {}
        # Task → when it was last asked only whether there is a way.
        self._probed: dict[str, float] = {}
        self._pending = 0
        # Task → its newest offer if the source was away, with source, destination and when it came; the oldest first.
        self._missed: OrderedDict[str, tuple[str, str, float, PathOffer]] = OrderedDict()
        # Task → its newest offer that came too soon after the one before, and waits for its time.
        self._early: dict[str, PathOffer] = {}
        # Tasks whose offer is with its source now, and those whose source's later candidates are on their way.
        self._asking: dict[str, trio.Event] = {}
        self._adding: set[str] = set()
        # Pairs of destination and source that were given places at the tunnel with an order, and did not ask for a path
        # since: they reach one another, and the next order need not trouble the tunnel.
        self._content: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._meetings = Meetings()
        self._introduced = self._added = self._refused = self._failed = self._met = 0

    def statistics(self) -> SignallingStatistics:
        """Counts since the start."""
        return SignallingStatistics(self._introduced, self._added, self._refused, self._failed, self._met)

    def admit(self, offer: PathOffer) -> bool:
        """Whether an offer is worth passing on: form and age, and for one that only asks the rate. `done` must follow
        when it is. The caller has seen to it that it comes from the node that drives the task: nobody else may use up
        the task's rate."""
        try:
            check_candidates_untrusted(offer.candidates)
            if not 0 < offer.count <= 64 or len(offer.token) > 64 or len(offer.transports) > 16:
                raise ProtocolError("An offer is malformed.")
        except ProtocolError:
            self._refused += 1
            return False
        generation, when = self._newest.get(offer.task_id, (-1, float("-inf")))
        now = trio.current_time()
        stale = offer.generation < generation
        hasty = offer.probe and (
            (offer.generation > generation and now - when < INTERVAL)
            or now - self._probed.get(offer.task_id, float("-inf")) < PROBE_INTERVAL
        )
        if stale or hasty or self._pending >= MAX_PENDING:
            self._refused += 1
            return False
        self._pending += 1
        if offer.probe:
            self._probed[offer.task_id] = now
        return True

    def done(self, offer: PathOffer) -> None:
        """An admitted offer was dealt with."""
        self._pending -= 1
        if len(self._newest) > 2 * MAX_PENDING:
            old = trio.current_time() - 60
            self._newest = {task: row for task, row in self._newest.items() if row[1] > old}
            self._sources = {task: source for task, source in self._sources.items() if task in self._newest}
            self._probed = {task: when for task, when in self._probed.items() if when > old}

    def missed(self, source: str) -> list[tuple[str, PathOffer]]:
        """Destinations and offers that had to wait for this source, which is there now. They are admitted: pass them on
        with `introduce`, then `done`."""
        self._forget_missed(trio.current_time() - MISSED_LIFE)
        tasks = [task for task, row in self._missed.items() if row[0] == source]
        rows = [self._missed.pop(task) for task in tasks]
        self._pending += len(rows)
        return [(destination, offer) for _, destination, _, offer in rows]

    def _miss(self, offer: PathOffer, destination: str, source: str) -> None:
        now = trio.current_time()
        # Nobody was given it: it is as if it had not come yet.
        self._newest[offer.task_id] = offer.generation - 1, now - INTERVAL
        self._missed.pop(offer.task_id, None)
        self._missed[offer.task_id] = source, destination, now, offer
        self._forget_missed(now - MISSED_LIFE)

    def _forget_missed(self, before: float) -> None:
        while self._missed:
            task, row = next(iter(self._missed.items()))
            if row[2] >= before and len(self._missed) <= MAX_PENDING:
                return
            del self._missed[task]

    def admit_candidates(self, node_id: str, task_id: str, answer: PathAnswer) -> bool:
        """Whether more candidates are worth passing on: form, and that they come from the source that has the newest
        offer and belong to it. `done_candidates` must follow when they are."""
        try:
            check_candidates_untrusted(answer.candidates)
        except ProtocolError:
            self._refused += 1
            return False
        generation, _ = self._newest.get(task_id, (-1, 0.0))
        # First of all who says it: strangers must not stand in the source's way.
        own = self._sources.get(task_id) == node_id and answer.generation == generation
        if not own or task_id in self._adding or self._pending >= MAX_PENDING:
            self._refused += 1
            return False
        self._pending += 1
        self._adding.add(task_id)
        return True

    def done_candidates(self, task_id: str) -> None:
        """Admitted candidates were dealt with."""
        self._pending -= 1
        self._adding.discard(task_id)

    async def add_candidates(self, task_id: str, answer: PathAnswer, destination: str) -> None:
        """Pass a source's later candidates on. Raises the link's errors."""
        await self._links.call(
            destination, "PUT", f"/link/tasks/{task_id}/candidates", document=answer, timeout=GO_TIMEOUT
        )
        self._added += 1

    def arrange(
        self,
        session_id: str,
        task_id: str,
        destination: str,
        source: str,
        owner_id: str,
        hosts: tuple[list[Candidate], list[Candidate]],
        *,
        tunnel: bool,
        meet: bool,
    ) -> tuple[Arrangement, Arrangement]:
        """A path for a task that is about to be ordered, before anybody has asked for one: for the destination and for
        the source, which is to dial the first of the two ``hosts``, the destination's. With ``tunnel`` both may get
        places there, with ``meet`` they may be told each other's punching ports as soon as these were `seen`."""
        token, pair = new_token(), (destination, source)
        places: list[tuple[Candidate, Candidate]] = []
        show = "", ""
        if pair not in self._content:
            if tunnel:
                wish = PathOffer(
                    session_id=session_id, task_id="", generation=0, token=token, count=ARRANGED_CONNECTIONS
                )
                # Why there are none is said to who asks in so many words.
                places, _ = self._fill(wish, destination, source, owner_id)
            if meet:
                now = trio.current_time()
                show = self._meetings.open(now, session_id, task_id, *pair, ARRANGED_CONNECTIONS, hosts).words
            if tunnel or meet:
                self._content[pair] = None
            if len(self._content) > MAX_PAIRS:
                self._content.popitem(last=False)
        observed = self._links.address(destination), self._links.address(source)
        return _both_sides(token, hosts, places, show, observed)

    async def seen(self, note: PortNote, endpoint: Endpoint) -> None:
        """The relay's STUN service sees a port whose owner says whose it is. With the last one of a meeting both sides
        get their go."""
        meeting = self._meetings.seen(trio.current_time(), note, endpoint)
        if meeting is None:
            return
        # They look for more than what can be dialled, so they shall be helped the next time, too.
        self._content.pop((meeting.destination, meeting.source), None)
        self._met += 1
        await self._have_them_meet(meeting)

    async def _have_them_meet(self, meeting: Meeting) -> None:
        destination, source = meeting.destination, meeting.source
        seen = self._links.address(destination), self._links.address(source)
        waits = start_times(self._links.round_trip(destination), self._links.round_trip(source))
        go = PathGo(session_id=meeting.session_id, generation=MEETING, start_in=0.0)
        told = {"start_in": waits[0], "observed": seen[0], "peer_observed": seen[1]}
        for_destination = msgspec.structs.replace(go, candidates=meeting.for_destination(), **told)
        told = {"start_in": waits[1], "observed": seen[1], "peer_observed": seen[0]}
        for_source = msgspec.structs.replace(go, candidates=meeting.for_source(), **told)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send, source, f"/link/sessions/{meeting.session_id}/go", for_source)
            nursery.start_soon(self._send, destination, f"/link/tasks/{meeting.task_id}/go", for_destination)

    async def introduce(self, offer: PathOffer, destination: str, source: str, *, owner_id: str = "") -> None:
        """Pass an offer on, and give both nodes their go; one that comes soon after another has to wait, and only the
        newest of those that wait is passed on. Raises the link's errors; an offer whose source is away is kept for a
        moment, see `missed`."""
        if not offer.probe:
            self._content.pop((destination, source), None)
            timely = await self._in_time(offer)
            if timely is None:
                return
            offer = timely
        self._missed.pop(offer.task_id, None)
        generation, _ = self._newest.get(offer.task_id, (-1, 0.0))
        repeated = offer.generation == generation
        if not repeated:
            self._newest[offer.task_id] = (offer.generation, trio.current_time())
            self._sources[offer.task_id] = source
        elif (asking := self._asking.get(offer.task_id)) is not None:
            # What is added must not be there before what it is added to.
            await asking.wait()
        asked = self._asking.setdefault(offer.task_id, trio.Event())
        try:
            answer = await self._ask(offer, destination, source)
        except TowpathError as error:
            newest, _ = self._newest.get(offer.task_id, (-1, 0.0))
            if error.code == OFFLINE and newest == offer.generation and not repeated and not offer.probe:
                self._miss(offer, destination, source)
            raise
        finally:
            asked.set()
            if self._asking.get(offer.task_id) is asked:
                del self._asking[offer.task_id]
        if repeated:
            self._added += 1
            return
        await self._give_go(offer, answer, destination, source, owner_id)
        self._introduced += 1

    async def _in_time(self, offer: PathOffer) -> PathOffer | None:
        """What is to be passed on, once a task may have another introduction; None where nothing is."""
        task_id, now = offer.task_id, trio.current_time()
        generation, when = self._newest.get(task_id, (-1, float("-inf")))
        early = offer.generation > generation and now - when < INTERVAL
        waiting = self._early.get(task_id)
        if waiting is not None and offer.generation > generation:
            # Who waits already passes on the newer of the two.
            if offer.generation >= waiting.generation:
                self._early[task_id] = offer
            self._refused += 1
            return None
        if not early:
            return offer
        self._early[task_id] = offer
        try:
            await trio.sleep_until(when + INTERVAL)
            offer = self._early[task_id]
        finally:
            del self._early[task_id]
        generation, _ = self._newest.get(task_id, (-1, 0.0))
        return offer if offer.generation > generation else None

    async def _ask(self, offer: PathOffer, destination: str, source: str) -> PathAnswer:
        seen = self._links.address(source), self._links.address(destination)
        try:
            body = await self._links.call(
                source,
                "PUT",
                f"/link/sessions/{offer.session_id}/offer",
                document=msgspec.structs.replace(offer, observed=seen[0], peer_observed=seen[1]),
                timeout=ANSWER_TIMEOUT,
            )
            answer = decode_untrusted(body, PathAnswer)
            check_candidates_untrusted(answer.candidates)
        except TowpathError:
            self._failed += 1
            raise
        if answer.session_id != offer.session_id or answer.generation != offer.generation:
            self._failed += 1
            raise ProtocolError("The source answered another offer than it was given.")
        return answer

    async def _give_go(
        self, offer: PathOffer, answer: PathAnswer, destination: str, source: str, owner_id: str
    ) -> None:
        seen = self._links.address(source), self._links.address(destination)
        waits = start_times(self._links.round_trip(destination), self._links.round_trip(source))
        places, refused = self._places(offer, answer, destination, source, owner_id)
        go = PathGo(session_id=offer.session_id, generation=offer.generation, start_in=0.0)
        for_destination = msgspec.structs.replace(
            go,
            start_in=waits[0],
            answer=answer,
            tunnels=[row[0] for row in places],
            tunnel_refused=refused,
            observed=seen[1],
            peer_observed=seen[0],
        )
        for_source = msgspec.structs.replace(
            go,
            start_in=waits[1],
            tunnels=[row[1] for row in places],
            observed=seen[0],
            peer_observed=seen[1],
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send, source, f"/link/sessions/{offer.session_id}/go", for_source)
            nursery.start_soon(self._send, destination, f"/link/tasks/{offer.task_id}/go", for_destination)

    def _places(
        self, offer: PathOffer, answer: PathAnswer, destination: str, source: str, owner_id: str
    ) -> tuple[list[tuple[Candidate, Candidate]], str]:
        """Places at the tunnel for as many connections as are wanted, where both sides want them, and why there are no
        more."""
        if self._tunnel is None or "tunnel" not in offer.transports or "tunnel" not in answer.transports:
            return [], ""
        return self._fill(offer, destination, source, owner_id)

    def _fill(
        self, offer: PathOffer, destination: str, source: str, owner_id: str
    ) -> tuple[list[tuple[Candidate, Candidate]], str]:
        if self._tunnel is None:
            return [], ""
        found: list[tuple[Candidate, Candidate]] = []
        for _ in range(min(offer.count, MAX_SLOTS)):
            try:
                found.append(self._tunnel.places(offer, destination, source, owner_id))
            except TowpathError as error:
                return found, error.sentence
        return found, ""

    async def _send(self, node_id: str, path: str, go: PathGo) -> None:
        try:
            await self._links.call(node_id, "PUT", path, document=go, timeout=GO_TIMEOUT)
        except TowpathError:
            # The other side finds nobody there and asks again.
            self._failed += 1


def _both_sides(
    token: str,
    hosts: tuple[list[Candidate], list[Candidate]],
    places: list[tuple[Candidate, Candidate]],
    show: tuple[str, str],
    observed: tuple[str, str],
) -> tuple[Arrangement, Arrangement]:
    """What was arranged, for the destination and for the source; of each pair here, the first is the destination's."""
    destination = Arrangement(
        token=token,
        count=ARRANGED_CONNECTIONS,
        tunnels=[row[0] for row in places],
        show=show[0],
        observed=observed[0],
        peer_observed=observed[1],
    )
    source = Arrangement(
        token=token,
        count=ARRANGED_CONNECTIONS,
        candidates=[row for row in hosts[0] if row.kind in DIALLED and row.slot == 0],
        tunnels=[row[1] for row in places],
        show=show[1],
        observed=observed[1],
        peer_observed=observed[0],
    )
    return destination, source
