"""The race for a path, at the destination: what to try when, and which connection is given out. Sans I/O.

One race belongs to one session at a time. Everything that has happened is told to it with ``now``; what is to be done
comes back as actions from `poll`. The order: direct TCP (IPv6 a little before IPv4; again and again
where it is refused) and, at the same time, an offer to the source, which dials back and punches with us at the instant
of the go (where the relay arranges a meeting with the order, our ports are shown to it first, and the offer waits for
what comes of that); QUIC after TCP had its chance; the tunnel is opened with the go and carries data when nothing
direct is there within a moment. The race goes on after the tunnel was given out, so that a better path is found when
there is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from protocol.candidates import Candidate

# All in seconds. IPv4 starts this much after IPv6; further addresses follow one another.
BIAS = 0.03
STAGGER = 0.05
MAX_DIALS = 12
# An address that did not take a connection is dialled again after the first of these, and ever later up to the second:
# a source that is being started again is back at its address long before a race is over.
AGAIN_FIRST, AGAIN_MOST = 0.1, 1.0
MAX_TARGETS = 6
# How long the relay's leg stands by before it carries data.
TUNNEL_HOLD = 0.3
QUIC_DELAY = 0.4
# So long a meeting that the relay arranges is waited for before an offer is made; and after its go, what it brings.
MEETING_PATIENCE = 0.8
MEETING_CHANCE = 0.4
# A tunnel that is up while a meeting's punching is under way stands by for so many round trips to the relay more, of
# which the meeting has taken two, but no longer than this: over a path that is no longer than that the first byte comes
# sooner, for the tunnel's own handshakes pass the relay.
HOLD_TRIPS, HOLD_MOST = 1.2, 0.25
# Offers are gathered for within the first of these. One that brought no go is repeated, and a round of punching that
# brought nothing is followed by another.
OFFER_PATIENCE = 8.0
GO_PATIENCE = 5.0
ROUND_TIME = 4.0
MAX_ROUNDS = 3
RACE_TIME = 15.0
# A source that has dialled us once dials for every connection that is wanted; so long the next one is waited for.
NEXT_ARRIVAL = 1.0
# After a punched connection, addresses that are being dialled, and a source that dials, have so long to answer: there
# lanes can be opened later without the relay's help.
BETTER_WAIT = 1.0


@dataclass(frozen=True)
class Dial:
    """Connect to an address of the source; ``spare``: a second time, beside the first."""

    id: int
    candidate: Candidate
    spare: bool = False


@dataclass(frozen=True)
class SendOffer:
    """Open fresh punching ports, gather, and send an offer of the next generation."""


@dataclass(frozen=True)
class ShowPorts:
    """Open punching ports, and show them to the relay."""


@dataclass(frozen=True)
class Punch:
    """Connect from one slot's port to all targets at once, and take what comes in there."""

    id: int
    slot: int
    targets: tuple[Candidate, ...]
    # From the ports that were shown to the relay, without an offer.
    ahead: bool = False


@dataclass(frozen=True)
class Arrange:
    """Have a transport (``tunnel``, ``quic``) bring up a connection; ``leg`` counts those of one go from 0."""

    id: int
    name: str
    leg: int = 0
    # Of what the relay arranged with the order, without an offer.
    ahead: bool = False


@dataclass(frozen=True)
class Cancel:
    """Give up an attempt, and close what it brought if that was not given out."""

    id: int


@dataclass(frozen=True)
class Give:
    """The connection of this attempt may be used."""

    id: int


Action = Dial | SendOffer | ShowPorts | Punch | Arrange | Cancel | Give


@dataclass
class _Attempt:
    kind: str
    started: float
    state: str = "running"  # running, standby, given, ended
    candidate: Candidate | None = None
    # How often it was dialled before. A repetition never makes a race longer.
    repeats: int = 0
    # A second connection to an address, for the first lane.
    spare: bool = False
    # Not of an offer: its end says nothing about the offer's round.
    ahead: bool = False


@dataclass
class Race:
    """See the module. ``direct`` are the usable candidates of the source, ``can_offer`` whether the relay can be asked,
    ``tunnel`` whether the policy allows it. ``offer_delay`` is above 0 where a direct path is likely, ``quic_delay``
    where TCP may do. The first ``spares`` addresses are dialled twice at once, for a control stream and a lane. The
    tunnel stands by for ``tunnel_hold``: not at all where nothing else is to be expected."""

    now: float
    direct: Sequence[Candidate]
    can_offer: bool = True
    tunnel: bool = True
    offer_delay: float = 0.0
    quic_delay: float = QUIC_DELAY
    spares: int = 0
    tunnel_hold: float = TUNNEL_HOLD
    rounds: int = field(default=0, init=False)
    _start: float = field(default=0.0, init=False)
    _scheduled: list[tuple[float, int, Action]] = field(default_factory=list, init=False)
    _attempts: dict[int, _Attempt] = field(default_factory=dict, init=False)
    _next: int = field(default=0, init=False)
    _dialled: set[tuple[str, int]] = field(default_factory=set, init=False)
    _round_ends: float = field(default=math.inf, init=False)
    _wanted: int = field(default=1, init=False)
    _arrived: int = field(default=0, init=False)
    _arrival: float = field(default=-math.inf, init=False)
    _errors: list[str] = field(default_factory=list, init=False)
    _best: str = field(default="", init=False)
    _punched: float = field(default=math.inf, init=False)
    # Whether a meeting may still come, so that an offer waits for it.
    _meeting: bool = field(default=False, init=False)
    _offer_held: float = field(default=-math.inf, init=False)
    _tunnel_held: float = field(default=-math.inf, init=False)
    _shown: float = field(default=math.inf, init=False)

    def __post_init__(self) -> None:
        self._start = self.now
        self._add_dials(self.direct, self.now)
        if self.can_offer:
            self._schedule(self.now + self.offer_delay, SendOffer())

    # --- what happened -------------------------------------------------------------------------------------

    def go(
        self,
        now: float,
        start_in: float,
        direct: Sequence[Candidate],
        targets: Sequence[Candidate],
        slots: int,
        transports: list[str],
    ) -> None:
        """The relay gave its go for the offer: more addresses, what to punch at, and which transports can take part."""
        self._add_dials(direct, now)
        instant = now + max(0.0, start_in)
        self._round_ends = instant + ROUND_TIME
        if self.is_direct:
            return
        if targets:
            for slot in range(1, slots + 1):
                self._schedule(instant, Punch(self._new("punched", instant), slot, tuple(targets[:MAX_TARGETS])))
        if "quic" in transports and not self._has("quic"):
            self._schedule(instant + self.quic_delay, Arrange(self._new("quic", instant), "quic"))
        if self.tunnel and not self.has_tunnel:
            for leg in range(transports.count("tunnel")):
                self._schedule(now, Arrange(self._new("tunnel", now), "tunnel", leg))

    def arranged(self, now: float, count: int, legs: int, *, meets: bool = False) -> None:
        """The relay has sent the source to dial us, ``count`` times, and has given so many places at its tunnel. With
        ``meets`` it has both meet when our ports are shown to it."""
        self._wanted = count
        if meets and self.can_offer:
            self._meeting = True
            show = max(now, self._start + self.offer_delay)
            self._schedule(show, ShowPorts())
            self._offer_at(show + MEETING_PATIENCE)
        if self.tunnel and not self.is_direct and not self.has_tunnel:
            for leg in range(legs):
                attempt_id = self._new("tunnel", now)
                self._attempts[attempt_id].ahead = True
                self._schedule(now, Arrange(attempt_id, "tunnel", leg, ahead=True))

    def met(self, now: float, start_in: float, targets: Sequence[Candidate], slots: Sequence[int]) -> None:
        """The relay has seen both sides' ports: what to punch at from ours."""
        if not self._meeting or self.is_direct:
            return
        self._meeting = False
        instant = now + max(0.0, start_in)
        for slot in slots:
            attempt_id = self._new("punched", instant)
            self._attempts[attempt_id].ahead = True
            self._schedule(instant, Punch(attempt_id, slot, tuple(targets[:MAX_TARGETS]), ahead=True))
        self._offer_held = instant + MEETING_CHANCE if targets and slots else now
        self._offer_at(self._offer_held)
        if targets and slots and self.tunnel_hold:
            self._hold_tunnel(instant + min(HOLD_TRIPS * max(0.0, now - self._shown) / 2, HOLD_MOST))

    def not_shown(self, now: float) -> None:
        """Our ports could not be shown: there will be no meeting, and the offer does not wait for it."""
        if self._meeting:
            self._meeting = False
            self._offer_at(now)

    def relay_came(self, now: float) -> None:
        """The relay can be asked from now on, which it could not when the race began."""
        if not self.can_offer:
            self.can_offer = True
            self._schedule(max(now, self._start + self.offer_delay), SendOffer())

    def add(self, now: float, direct: Sequence[Candidate]) -> None:
        """More addresses of the source have become known."""
        self._add_dials(direct, now)

    def offered(self, now: float, count: int = 1) -> None:
        """The offer, for ``count`` connections, has left; from now on a go is waited for."""
        self._wanted, self._arrived = count, 0
        self._round_ends = now + GO_PATIENCE

    def connected(self, now: float, attempt_id: int) -> None:
        """An attempt brought a connection."""
        attempt = self._attempts.get(attempt_id)
        if attempt is None or attempt.state != "running":
            return
        if attempt.kind == "tunnel":
            if self.is_direct:
                attempt.state = "ended"
                self._schedule(now, Cancel(attempt_id))
            else:
                attempt.state = "standby"
                self._schedule(max(now, self._start + self.tunnel_hold, self._tunnel_held), Give(attempt_id))
            return
        self._give(now, attempt_id, attempt)

    def arrived(self, now: float) -> int:
        """The source dialled us: an attempt of its own, already successful. Returns its id."""
        attempt_id = self._new("reversed", now)
        self._arrived, self._arrival = self._arrived + 1, now
        self._give(now, attempt_id, self._attempts[attempt_id])
        return attempt_id

    def failed(self, now: float, attempt_id: int, why: str) -> None:
        """An attempt came to nothing."""
        attempt = self._attempts.get(attempt_id)
        if attempt is None or attempt.state != "running":
            return
        attempt.state = "ended"
        if why and why not in self._errors and len(self._errors) < 16:
            self._errors.append(why)
        if attempt.candidate is None:
            if attempt.ahead:
                if attempt.kind == "punched" and not self._punches_ahead():
                    self._offer_at(now)
            elif not self._pending_of_round():
                self._round_ends = min(self._round_ends, now)
            return
        if all(row.kind != "direct" or row.state != "running" or row.repeats for row in self._attempts.values()):
            # No known address takes a connection: there is no reason to spare the source the trouble any longer.
            self._hasten(now)
        if not self._best and not attempt.spare:
            pause = min(AGAIN_FIRST * 2.0**attempt.repeats, AGAIN_MOST)
            self._dial(now + pause, attempt.candidate, attempt.repeats + 1)

    # --- what to do ----------------------------------------------------------------------------------------

    def poll(self, now: float) -> list[Action]:
        """Everything that is due, in order."""
        if not self.is_direct and now >= self._round_ends and now < self._start + RACE_TIME:
            self._round_ends = math.inf
            if self.rounds < MAX_ROUNDS and self.can_offer:
                self._schedule(now, SendOffer())
        due = sorted((row for row in self._scheduled if row[0] <= now), key=lambda row: row[:2])
        self._scheduled = [row for row in self._scheduled if row[0] > now]
        actions: list[Action] = []
        for _, _, action in due:
            if self._still_wanted(action):
                actions.append(action)
                self._begin(now, action)
        return actions

    def deadline(self, now: float) -> float:
        """When to call `poll` again, if nothing happens before; infinity when the race is over."""
        if self.over(now):
            return math.inf
        times = [when for when, _, _ in self._scheduled]
        if not self.is_direct:
            times.append(self._round_ends)
        times += [moment for moment in self._hopes() if moment > now]
        return min([*times, self._start + RACE_TIME])

    def over(self, now: float) -> bool:
        """Whether nothing more will come of it."""
        if now >= self._start + RACE_TIME:
            return True
        hopes = any(moment > now for moment in self._hopes())
        late = self._best == "punched" and not hopes
        running = any(
            attempt.state in ("running", "standby") and not attempt.repeats and not (late and attempt.kind == "direct")
            for attempt in self._attempts.values()
        )
        waiting = self._round_ends < math.inf and not self.is_direct
        waiting = waiting and (now < self._round_ends or (self.rounds < MAX_ROUNDS and self.can_offer))
        scheduled = any(not self._is_repetition(action) for _, _, action in self._scheduled)
        return not running and not scheduled and not waiting and not hopes

    def _hopes(self) -> list[float]:
        """Until when something more may come by itself."""
        hopes = [self._arrival + NEXT_ARRIVAL] if 0 < self._arrived < self._wanted else []
        return [*hopes, self._punched + BETTER_WAIT] if self._best == "punched" else hopes

    @property
    def has_tunnel(self) -> bool:
        """Whether legs through the relay are up or on their way."""
        return self._has("tunnel")

    def _has(self, kind: str) -> bool:
        states = ("running", "standby", "given")
        return any(attempt.kind == kind and attempt.state in states for attempt in self._attempts.values())

    @property
    def is_relayed(self) -> bool:
        """Whether the tunnel was given out, and nothing else."""
        return self._best == "tunnel"

    @property
    def is_spent(self) -> bool:
        """Whether all of its legs through the relay were given out, and nothing else: what it goes on for is better."""
        coming = ("running", "standby")
        return self.is_relayed and not any(
            attempt.kind == "tunnel" and attempt.state in coming for attempt in self._attempts.values()
        )

    @property
    def is_direct(self) -> bool:
        """Whether a path that does not pass the relay was found."""
        return bool(self._best) and self._best != "tunnel"

    @property
    def dials_itself(self) -> bool:
        """Whether the source can be dialled, so that it need not dial us."""
        return self._best == "direct"

    @property
    def why(self) -> str:
        """What stood in the way of the attempts that failed; a sentence or an empty text."""
        return "; ".join(self._errors[:6])

    # --- inside --------------------------------------------------------------------------------------------

    def _new(self, kind: str, now: float) -> int:
        self._next += 1
        self._attempts[self._next] = _Attempt(kind, now)
        return self._next

    def _is_repetition(self, action: Action) -> bool:
        return isinstance(action, Dial) and self._attempts[action.id].repeats > 0

    def _schedule(self, when: float, action: Action) -> None:
        self._next += 1
        self._scheduled.append((when, self._next, action))

    def _offer_at(self, when: float) -> None:
        """Move the first offer, if it was not made yet."""
        self._scheduled = [
            (when if isinstance(action, SendOffer) else due, number, action) for due, number, action in self._scheduled
        ]

    def _hold_tunnel(self, until: float) -> None:
        self._tunnel_held = until
        self._scheduled = [
            (max(due, until) if isinstance(action, Give) and self._stands_by(action.id) else due, number, action)
            for due, number, action in self._scheduled
        ]

    def _stands_by(self, attempt_id: int) -> bool:
        return self._attempts[attempt_id].state == "standby"

    def _hasten(self, now: float) -> None:
        shows = any(isinstance(action, ShowPorts) for _, _, action in self._scheduled)
        if not shows and not self._meeting:
            self._offer_at(max(now, self._offer_held))
            return
        self._scheduled = [
            (min(now, due) if isinstance(action, ShowPorts) else due, number, action)
            for due, number, action in self._scheduled
        ]
        if shows:
            self._offer_at(now + MEETING_PATIENCE)

    def _add_dials(self, candidates: Sequence[Candidate], now: float) -> None:
        fresh = []
        for candidate in candidates:
            address = (candidate.host, candidate.port)
            if address not in self._dialled and len(self._dialled) < MAX_DIALS:
                self._dialled.add(address)
                fresh.append(candidate)
        if self.is_direct:
            return
        bias = BIAS if any(":" in candidate.host for candidate in fresh) else 0.0
        fresh.sort(key=lambda candidate: ":" not in candidate.host)
        for index, candidate in enumerate(fresh):
            late = (0.0 if ":" in candidate.host else bias) + STAGGER * max(0, index - 1)
            self._dial(now + late, candidate)
            if self.spares:
                self.spares -= 1
                self._dial(now + late, candidate, spare=True)

    def _dial(self, when: float, candidate: Candidate, repeats: int = 0, *, spare: bool = False) -> None:
        attempt_id = self._new("direct", when)
        attempt = self._attempts[attempt_id]
        attempt.candidate, attempt.repeats, attempt.spare = candidate, repeats, spare
        self._schedule(when, Dial(attempt_id, candidate, spare))

    def _still_wanted(self, action: Action) -> bool:
        if isinstance(action, SendOffer | ShowPorts | Cancel):
            return isinstance(action, Cancel) or not self.is_direct
        attempt = self._attempts[action.id]
        if isinstance(action, Give):
            if attempt.state == "standby" and self.is_direct:
                attempt.state = "ended"
            return attempt.state in ("standby", "given")
        if attempt.state == "running" and self.is_direct and not self._is_better(attempt):
            attempt.state = "ended"
        return attempt.state == "running"

    def _begin(self, now: float, action: Action) -> None:
        if isinstance(action, SendOffer):
            self.rounds += 1
            self._round_ends = now + OFFER_PATIENCE
        elif isinstance(action, ShowPorts):
            self._shown = now
        elif isinstance(action, Give):
            attempt = self._attempts[action.id]
            attempt.state = "given"
            if not self.is_direct:
                self._best = attempt.kind

    def _is_better(self, attempt: _Attempt) -> bool:
        return self._best == "punched" and attempt.kind == "direct"

    def _give(self, now: float, attempt_id: int, attempt: _Attempt) -> None:
        attempt.state = "given"
        if attempt.kind == "punched" and not self.is_direct:
            self._punched = now
        if not self.is_direct or attempt.kind != "punched":
            self._best = attempt.kind
        self._schedule(now, Give(attempt_id))
        for other_id, other in self._attempts.items():
            # Other slots go on: each brings one connection more. A dialled address can be dialled again.
            superseded = (
                other.kind == "quic"
                or (other.kind == "direct" and attempt.kind != "punched" and other.candidate != attempt.candidate)
                or (other.kind == "punched" and attempt.kind == "direct")
            )
            if other.state == "standby" or (other.state == "running" and superseded):
                other.state = "ended"
                self._schedule(now, Cancel(other_id))

    def _punches_ahead(self) -> bool:
        return any(
            attempt.ahead and attempt.kind == "punched" and attempt.state == "running"
            for attempt in self._attempts.values()
        )

    def _pending_of_round(self) -> bool:
        return any(
            attempt.state == "running" and attempt.kind in ("punched", "quic") and not attempt.ahead
            for attempt in self._attempts.values()
        )
