"""The relay's end of the tunnel: issues halves, runs the moving processes, and keeps count of what was moved.

All pairs of one user go to one process, so that its limits are kept exactly. A process that dies takes its pairs with
it (the agents go on from their journals through new ones) and is started again.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import logging
import socket
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import trio

from protocol.candidates import RELAY_TUNNEL, Candidate, PathOffer
from protocol.errors import NeedsPerson, RetryLater, TowpathError
from protocol.line_process import line_process
from protocol.ticket import TicketSigner, TicketVerifier
from protocol.tunnel.token import LIFE, Half, Side, TunnelRefused, sign_half
from protocol.websocket.carrier import CarrierUnavailable
from relay.rendezvous.tunnel.acceptor import Leg, TunnelAcceptor
from relay.rendezvous.tunnel.carrier import TunnelCarrier
from relay.rendezvous.tunnel.limits import TunnelLimits
from relay.rendezvous.tunnel.mover import PairEnded
from relay.rendezvous.tunnel.process import MAX_PACKET, Begin, Cut, Join, JoinLines, Usage, decode_report, encode

_logger = logging.getLogger("towpath.tunnel")

DAY = 86400.0
RESTART_PAUSE = 1.0
_SESSIONS_REMEMBERED = 20_000
_SEND_TIMEOUT = 10.0


class TunnelUnavailable(RetryLater):
    """No tunnel now."""

    default_code = "TUNNEL_UNAVAILABLE"


class TunnelQuota(NeedsPerson):
    """An amount is used up."""

    default_code = "TUNNEL_QUOTA"


@dataclass(frozen=True)
class TunnelStatistics:
    """Pairs now; since the start: pairings issued and denied, pairs joined, bytes moved, pairs ended by outcome;
    halves as in `pairing`; CPU seconds of the moving processes."""

    pairs: int
    offers: int
    denied: int
    moved: int
    cpu: float
    outcomes: dict[str, int]
    waiting: int
    joined: int
    refused: int
    replayed: int
    restarts: int


class _Mover:
    """One moving process as the relay sees it."""

    def __init__(self) -> None:
        self.line: trio.socket.SocketType | None = None
        self.lock = trio.Lock()
        self.pairs = 0
        self.cpu = 0.0


class TunnelService:
    """Create it, run `run`. ``clock`` gives Unix seconds. ``processes`` 0 means that this relay offers no tunnel."""

    def __init__(
        self,
        signer: TicketSigner,
        root_public_pem: str,
        limits: TunnelLimits,
        *,
        url: str = "https://localhost",
        processes: int = 1,
        max_pairs: int = 2000,
        clock: Callable[[], float] = time.time,
    ) -> None:
        # A name of this very process: tokens of an earlier one are not remembered as used, so they do not count.
        self.relay_node = str(uuid.uuid4())
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "localhost", parts.port or 443
        self._signer = signer
        self._limits = limits
        self._max_pairs = max_pairs
        self._clock = clock
        self._movers = [_Mover() for _ in range(processes)]
        # What speaks WebSocket moves what passes between its connections itself.
        self.carrier = TunnelCarrier(limits, self._take_report, self._carrier_ended)
        verifier = TicketVerifier(signer.relay_id, root_public_pem)
        self.acceptor = TunnelAcceptor(verifier, self.relay_node, self._join, clock)
        # Who moves a pair, and how many pairs of a user are moved by whom: all of them in one place, for its limits.
        self._pairs: dict[str, _Mover | TunnelCarrier] = {}
        self._homes: dict[str, tuple[_Mover | TunnelCarrier, int]] = {}
        self._sessions: OrderedDict[str, int] = OrderedDict()
        # Sessions that were cut, and until when a token of before could still be shown; the oldest first.
        self._cut: OrderedDict[str, float] = OrderedDict()
        self._users: Counter[str] = Counter()
        self._day = int(clock() // DAY)
        self._outcomes: Counter[str] = Counter()
        self._offers = self._denied = self._moved = self._restarts = 0

    @property
    def enabled(self) -> bool:
        """Whether this relay offers a tunnel at all."""
        return bool(self._movers)

    def statistics(self) -> TunnelStatistics:
        """Counts."""
        pairing = self.acceptor.statistics()
        return TunnelStatistics(
            pairs=len(self._pairs),
            offers=self._offers,
            denied=self._denied,
            moved=self._moved,
            cpu=sum(mover.cpu for mover in self._movers),
            outcomes=dict(self._outcomes),
            waiting=pairing.waiting,
            joined=pairing.joined,
            refused=self.acceptor.refused,
            replayed=pairing.replayed,
            restarts=self._restarts,
        )

    # --- offers ----------------------------------------------------------------------------------------------

    def places(self, offer: PathOffer, destination: str, source: str, owner_id: str) -> tuple[Candidate, Candidate]:
        """Places for the destination and the source of a session. Raises as `issue` does."""
        try:
            for_source, for_destination = self.issue(offer.session_id, owner_id)
        except TowpathError as error:
            self._denied += 1
            _logger.info("No tunnel for session %s: %s", offer.session_id, error.sentence)
            raise
        return self._place(for_destination), self._place(for_source)

    def _place(self, token: str) -> Candidate:
        return Candidate(kind=RELAY_TUNNEL, host=self._host, port=self._port, token=token)

    def issue(self, session_id: str, user: str) -> tuple[str, str]:
        """Tokens for the two halves of a new pairing: for the source, for the destination.

        Raises `TunnelUnavailable` and `TunnelQuota`.
        """
        if not self.enabled:
            raise TunnelUnavailable(
                "This relay offers no tunnel, so the two endpoints need a direct path to each other.",
                who="relay operator",
            )
        if len(self._pairs) >= self._max_pairs:
            raise TunnelUnavailable("The relay's tunnel carries as many connections as it can; it is tried again.")
        self._left(session_id, user)
        self._offers += 1
        now = self._clock()
        # Whoever asks has seen that the session may be.
        self._cut.pop(session_id, None)
        pair_id = str(uuid.uuid4())

        def half(side: Side) -> str:
            return sign_half(
                self._signer,
                Half(
                    relay_node=self.relay_node,
                    pair_id=pair_id,
                    session_id=session_id,
                    side=side,
                    user=user,
                    issued=now,
                    expires=now + LIFE,
                ),
            )

        return half("source"), half("destination")

    def _left(self, session_id: str, user: str) -> tuple[int, int]:
        """What is left for the session and the user, 0 for no limit. Raises `TunnelQuota` when nothing is."""
        day = int(self._clock() // DAY)
        if day != self._day:
            self._day = day
            self._users.clear()
        session_left = user_left = 0
        if self._limits.session_bytes:
            session_left = self._limits.session_bytes - self._sessions.get(session_id, 0)
            if session_left <= 0:
                raise TunnelQuota(
                    f"This task has moved {self._limits.session_bytes} bytes through the relay's tunnel, the most "
                    "that its operator allows for one; it goes on when the endpoints reach each other directly.",
                    who="relay operator",
                )
        if self._limits.user_bytes:
            user_left = self._limits.user_bytes - self._users[user]
            if user_left <= 0:
                raise TunnelQuota(
                    f"You have moved {self._limits.user_bytes} bytes through the relay's tunnel today, the most that "
                    "its operator allows in a day; tasks go on tomorrow, or when the endpoints reach each other "
                    "directly.",
                    who="relay operator",
                )
        return session_left, user_left

    # --- pairs -----------------------------------------------------------------------------------------------

    def _home_of(self, user: str, legs: tuple[Leg, Leg]) -> _Mover | TunnelCarrier:
        """Who is to move a new pair."""
        home, pairs = self._homes.get(user, (None, 0))
        if home is not None and pairs:
            return home
        # A rate for all together is kept by one process alone.
        if any(leg.number for leg in legs) and self.carrier.is_up and not self._limits.total_rate:
            return self.carrier
        digest = hashlib.sha256(user.encode()).digest()
        return self._movers[int.from_bytes(digest[:4], "big") % len(self._movers)]

    async def _join(self, half: Half, legs: tuple[Leg, Leg]) -> None:
        """Hand two sockets to who moves them. Raises `TunnelUnavailable`, `TunnelQuota` and `TunnelRefused`; then they
        stay open."""
        if half.session_id in self._cut:
            raise TunnelRefused("This session was ended while its tunnel was on the way.", code="TUNNEL_CUT")
        session_left, user_left = self._left(half.session_id, half.user)
        home = self._home_of(half.user, legs)
        heads = legs[0].head, legs[1].head
        sockets = legs[0].sock, legs[1].sock
        join = Join(half.pair_id, half.session_id, half.user, heads, user_left, session_left)
        self._enter(half.pair_id, half.user, home)
        try:
            if isinstance(home, TunnelCarrier):
                await home.send(encode(JoinLines(join, (legs[0].number, legs[1].number))), sockets)
            else:
                await self._order(home, join, sockets)
        except TowpathError:
            self._leave(half.pair_id, half.user)
            raise
        for sock in sockets:
            sock.close()
        if half.session_id in self._cut:
            # The word to end it may have gone before the pair.
            await self.cut_session(half.session_id)

    async def _order(self, mover: _Mover, join: Join, sockets: tuple[socket.socket, socket.socket]) -> None:
        if mover.line is None:
            raise TunnelUnavailable("The relay's tunnel is starting; it is tried again.")
        try:
            with trio.fail_after(_SEND_TIMEOUT):
                async with mover.lock:
                    await _send(mover.line, encode(join), sockets)
        except (OSError, trio.TooSlowError) as error:
            raise TunnelUnavailable("The relay's tunnel does not answer; it is tried again.") from error

    def _enter(self, pair_id: str, user: str, home: _Mover | TunnelCarrier) -> None:
        self._pairs[pair_id] = home
        self._homes[user] = (home, self._homes.get(user, (home, 0))[1] + 1)

    def _leave(self, pair_id: str, user: str) -> None:
        if self._pairs.pop(pair_id, None) is None:
            return
        home, pairs = self._homes[user]
        if pairs > 1:
            self._homes[user] = (home, pairs - 1)
        else:
            del self._homes[user]

    def _lost(self, home: _Mover | TunnelCarrier) -> None:
        """A process has died, and its pairs with it."""
        self._pairs = {pair: other for pair, other in self._pairs.items() if other is not home}
        self._homes = {user: row for user, row in self._homes.items() if row[0] is not home}

    def _carrier_ended(self) -> None:
        self._lost(self.carrier)

    async def cut_session(self, session_id: str) -> None:
        """End all tunnels of a session, whose task is over or not permitted any more, and join none with tokens of
        before."""
        now = self._clock()
        self._cut[session_id] = now + LIFE
        self._cut.move_to_end(session_id)
        while self._cut and not now <= next(iter(self._cut.values())) <= now + LIFE:
            self._cut.popitem(last=False)
        for mover in self._movers:
            if mover.line is not None and self._pairs:
                try:
                    with trio.fail_after(_SEND_TIMEOUT):
                        async with mover.lock:
                            await mover.line.send(encode(Cut(session_id)))
                except (OSError, trio.TooSlowError):
                    # The process has died, and its pairs with it, or is about to be found dead.
                    continue
        if self.carrier in self._pairs.values():
            with contextlib.suppress(CarrierUnavailable):
                await self.carrier.send(encode(Cut(session_id)), ())

    # --- processes -------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the moving processes running until cancelled."""
        if self.enabled:
            _logger.info("Starting the tunnel processes of relay node %s.", self.relay_node)
        async with trio.open_nursery() as nursery:
            for mover in self._movers:
                await nursery.start(self._keep_running, mover)
            task_status.started()

    async def _keep_running(
        self, mover: _Mover, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        started = False
        while True:
            try:
                async with line_process("relay.rendezvous.tunnel.process", room=2 * MAX_PACKET) as line:
                    try:
                        await line.send(encode(Begin(self._limits)))
                        mover.line = line
                        if not started:
                            started = True
                            task_status.started()
                        await self._hear(mover, line)
                    finally:
                        mover.line = None
            except OSError as error:
                if not started:
                    raise
                # No process or descriptor is to be had, or it ended before it was told anything.
                _logger.error("A tunnel process cannot be started, and is tried again: %s", error)
            else:
                _logger.error("A tunnel process ended unexpectedly; another one is started.")
            self._restarts += 1
            self._lost(mover)
            await trio.sleep(RESTART_PAUSE)

    async def _hear(self, mover: _Mover, line: trio.socket.SocketType) -> None:
        while True:
            try:
                packet = await line.recv(MAX_PACKET)
            except OSError:
                return
            if not packet:
                return
            report = decode_report(packet)
            if isinstance(report, Usage):
                mover.pairs, mover.cpu = report.pairs, report.cpu
            self._take_report(report)

    def _take_report(self, report: Usage | PairEnded) -> None:
        if isinstance(report, PairEnded):
            self._ended(report)
            return
        for user, size in report.users.items():
            self._users[user] += size
            self._moved += size

    def _ended(self, report: PairEnded) -> None:
        self._leave(report.pair_id, report.user)
        self._outcomes[report.outcome] += 1
        total = self._sessions.pop(report.session_id, 0) + report.forward + report.backward
        self._sessions[report.session_id] = total
        if len(self._sessions) > _SESSIONS_REMEMBERED:
            self._sessions.popitem(last=False)
        _logger.info(
            "A tunnel of session %s ended (%s): %d bytes to the destination, %d back.",
            report.session_id,
            report.outcome,
            report.forward,
            report.backward,
        )


async def _send(line: trio.socket.SocketType, packet: bytes, sockets: tuple[socket.socket, socket.socket]) -> None:
    """One packet with two descriptors."""
    numbers = array.array("i", [sock.fileno() for sock in sockets]).tobytes()
    await line.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])
