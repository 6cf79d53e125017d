"""Moves the bytes of many pairs in one thread: waits for sockets, and shares its time and the limits fairly.

Users take turns, then the sessions of a user, then the directions of a session: somebody with many lanes gets no more
than somebody with one. All buffering is in the kernel and bounded: a pipe for each direction that is held up.
"""

from __future__ import annotations

import math
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from protocol.congestion import tune_sender
from relay.rendezvous.tunnel.ends import End, JoinedDirection, LineEnd, RawEnd
from relay.rendezvous.tunnel.limits import Account, Allowance, Bucket, TunnelLimits
from relay.rendezvous.tunnel.splice import Direction, Pipes
from relay.rendezvous.tunnel.turns import Turns

# Bytes one direction may move before the next has its turn.
QUANTUM = 512 * 1024
# A rate limit lets nothing through in pieces smaller than this.
LEAST = 16 * 1024
# Turns between two looks at the sockets while there is always something to do.
TURNS = 16
# A pair whose receiver takes nothing for so long (seconds), though bytes wait for it, is given up.
STALL = 300.0
_SWEEP = 5.0
# Between two looks at the clocks of legs inside WebSocket.
_TEND = 1.0
_KEEP_IDLE, _KEEP_INTERVAL, _KEEP_COUNT = 30, 10, 3
_EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET if hasattr(select, "EPOLLET") else 0
_BROKEN = select.EPOLLERR | select.EPOLLHUP if hasattr(select, "EPOLLERR") else 0

CLOSED, BROKEN, SESSION_QUOTA, USER_QUOTA, STALLED, CUT = (
    "closed",
    "broken",
    "session quota",
    "user quota",
    "stalled",
    "cut",
)


class PairEnded(msgspec.Struct, frozen=True, tag="ended"):
    """A pair is closed: why, and how many bytes went each way."""

    pair_id: str
    session_id: str
    user: str
    outcome: str
    forward: int
    backward: int


@dataclass(eq=False)
class _Pair:
    pair_id: str
    session_id: str
    user: str
    sockets: tuple[socket.socket, socket.socket]
    directions: tuple[Direction, Direction] | tuple[JoinedDirection, JoinedDirection]
    progress: float
    ready: list[bool]
    # Of a pair with a leg inside WebSocket.
    ends: tuple[End, End] | None = None


@dataclass(frozen=True)
class MoverStatistics:
    """Pairs, users, pipes and legs inside WebSocket now; bytes since the start."""

    pairs: int
    users: int
    pipes: int
    moved: int
    lines: int


class Mover:
    """See the module. Not thread-safe: everything is called from the thread that calls `turn`."""

    def __init__(
        self,
        limits: TunnelLimits,
        on_ended: Callable[[PairEnded], None],
        clock: Callable[[], float] = time.monotonic,
        on_closed: Callable[[End], None] = lambda end: end.close(),
    ) -> None:
        self._limits = limits
        self._on_ended = on_ended
        # Gets the ends inside WebSocket of pairs that ended in order.
        self._on_closed = on_closed
        self._clock = clock
        self._epoll = select.epoll()
        self._pipes = Pipes()
        self._pairs: dict[str, _Pair] = {}
        # Descriptor to the direction it is the source of; the other direction of the pair has it as its target.
        self._sides: dict[int, tuple[_Pair, int]] = {}
        self._sessions: dict[str, Account] = {}
        self._users: dict[str, Account] = {}
        self._total = Bucket(limits.total_rate, clock())
        self._turns: Turns[tuple[_Pair, int]] = Turns()
        self._dry_until = 0.0
        self._next_sweep = clock() + _SWEEP
        self._next_tending = math.inf
        self._moved = 0

    # --- pairs -----------------------------------------------------------------------------------------------

    def watch(self, descriptor: int) -> None:
        """Have `turn` return True when this descriptor (not one of a pair) is readable."""
        self._epoll.register(descriptor, select.EPOLLIN)

    def add(
        self,
        pair_id: str,
        session_id: str,
        user: str,
        sockets: tuple[socket.socket, socket.socket],
        heads: tuple[bytes, bytes] = (b"", b""),
        *,
        user_left: int = 0,
        session_left: int = 0,
    ) -> None:
        """Join two connected sockets, which this owns from now on. ``heads`` were read off them already.

        ``user_left`` and ``session_left`` are what is left of their amounts when this is their first pair here; zero
        is no limit.
        """
        for sock in sockets:
            _prepare(sock)
        first, second = sockets
        directions = (
            Direction(first, second, self._pipes, heads[0]),
            Direction(second, first, self._pipes, heads[1]),
        )
        pair = _Pair(pair_id, session_id, user, sockets, directions, self._clock(), [False, False])
        self._enter(pair, user_left, session_left)

    def add_joined(
        self,
        pair_id: str,
        session_id: str,
        user: str,
        ends: tuple[End, End],
        *,
        user_left: int = 0,
        session_left: int = 0,
    ) -> None:
        """The same for two legs at least one of which is inside WebSocket."""
        now = self._clock()
        first, second = ends
        for end in ends:
            if isinstance(end, RawEnd):
                _prepare(end.sock)
        directions = JoinedDirection(first, second), JoinedDirection(second, first)
        sockets = first.sock, second.sock
        pair = _Pair(pair_id, session_id, user, sockets, directions, now, [False, False], ends)
        self._next_tending = min(self._next_tending, now + _TEND)
        self._enter(pair, user_left, session_left)

    def _enter(self, pair: _Pair, user_left: int, session_left: int) -> None:
        now = pair.progress
        session_id, user = pair.session_id, pair.user
        self._pairs[pair.pair_id] = pair
        limits = self._limits
        session = self._sessions.setdefault(
            session_id, Account(Bucket(limits.session_rate, now), Allowance(session_left))
        )
        account = self._users.setdefault(user, Account(Bucket(limits.user_rate, now), Allowance(user_left)))
        session.pairs += 1
        account.pairs += 1
        for side, sock in enumerate(pair.sockets):
            self._sides[sock.fileno()] = (pair, side)
            self._epoll.register(sock.fileno(), _EVENTS)
            self._make_ready(pair, side)

    def cut_session(self, session_id: str) -> None:
        """End all pairs of a session."""
        for pair in [pair for pair in self._pairs.values() if pair.session_id == session_id]:
            self._end(pair, CUT)

    def usage(self) -> dict[str, int]:
        """Bytes moved for each user since the last time this was asked."""
        for session in self._sessions.values():
            session.moved = 0
        used = {user: account.moved for user, account in self._users.items() if account.moved}
        for user in used:
            self._users[user].moved = 0
        return used

    def statistics(self) -> MoverStatistics:
        """Counts."""
        lines = sum(isinstance(end, LineEnd) for pair in self._pairs.values() for end in pair.ends or ())
        return MoverStatistics(len(self._pairs), len(self._users), self._pipes.lent, self._moved, lines)

    def close(self) -> None:
        """End everything."""
        for pair in list(self._pairs.values()):
            self._end(pair, CUT)
        self._pipes.close()
        self._epoll.close()

    # --- the loop --------------------------------------------------------------------------------------------

    def turn(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for something to do, do a share of it; whether a watched one is readable."""
        now = self._clock()
        wait = min(timeout, max(0.0, self._wake_at(now) - now))
        watched = False
        for descriptor, events in self._epoll.poll(wait, 256):
            if descriptor in self._sides:
                self._note(*self._sides[descriptor], events)
            else:
                watched = True
        now = self._clock()
        self._turns.wake(now)
        for _ in range(TURNS):
            if not self._turns or now < self._dry_until:
                break
            granted = self._grant(now)
            if granted:
                self._serve(*self._turns.next(), granted, now)
            now = self._clock()
        if now >= self._next_tending:
            self._tend(now)
        if now >= self._next_sweep:
            self._next_sweep = now + _SWEEP
            self._sweep(now)
        return watched

    def wait(self, now: float) -> float:
        """How long there is nothing to do, if nothing happens (seconds)."""
        return max(0.0, self._wake_at(now) - now)

    def fileno(self) -> int:
        """Readable when something happens to one of the sockets."""
        return self._epoll.fileno()

    def _wake_at(self, now: float) -> float:
        wakes = [self._next_sweep, self._next_tending]
        if self._turns:
            wakes.append(max(now, self._dry_until))
        held = self._turns.next_wake()
        if held is not None:
            wakes.append(held)
        return min(wakes)

    def _note(self, pair: _Pair, side: int, events: int) -> None:
        incoming, outgoing = pair.directions[side], pair.directions[1 - side]
        if events & (select.EPOLLIN | select.EPOLLRDHUP | _BROKEN):
            incoming.readable = True
            self._make_ready(pair, side)
        if events & (select.EPOLLOUT | _BROKEN):
            outgoing.writable = True
            self._make_ready(pair, 1 - side)

    def _make_ready(self, pair: _Pair, side: int) -> None:
        if pair.ready[side] or pair.pair_id not in self._pairs or not pair.directions[side].can_move:
            return
        pair.ready[side] = True
        self._turns.add(pair.user, pair.session_id, (pair, side))

    def _grant(self, now: float) -> int:
        """Bytes for whoever has the next turn; 0 when a rate is used up, and who it concerns is held."""
        if self._total.available(now) < LEAST:
            self._dry_until = now + self._total.ready_in(LEAST)
            return 0
        user_id, session_id = self._turns.peek()
        user, session = self._users.get(user_id), self._sessions.get(session_id)
        if user is None or session is None:
            # All pairs of it have ended; what still stands in line is thrown away by `_serve`.
            return QUANTUM
        if user.rate.available(now) < LEAST:
            self._turns.hold_user(user_id, now + user.rate.ready_in(LEAST))
            return 0
        if session.rate.available(now) < LEAST:
            self._turns.hold_session(user_id, session_id, now + session.rate.ready_in(LEAST))
            return 0
        return min(QUANTUM, self._total.available(now), user.rate.available(now), session.rate.available(now))

    def _serve(self, pair: _Pair, side: int, granted: int, now: float) -> None:
        pair.ready[side] = False
        if pair.pair_id not in self._pairs:
            return
        session, user = self._sessions[pair.session_id], self._users[pair.user]
        left = min(session.amount.left, user.amount.left)
        if not left:
            self._end(pair, SESSION_QUOTA if not session.amount.left else USER_QUOTA)
            return
        direction = pair.directions[side]
        before = direction.held
        try:
            taken = direction.step(min(granted, left), now)
        except OSError:
            self._end(pair, BROKEN)
            return
        if taken or direction.held < before:
            pair.progress = now
        self._moved += taken
        session.take(taken)
        user.take(taken)
        self._total.take(taken)
        if all(direction.done for direction in pair.directions):
            self._end(pair, CLOSED)
        else:
            self._make_ready(pair, side)

    def _tend(self, now: float) -> None:
        """Ask those inside WebSocket that are silent, give up those that stay so."""
        joined = [pair for pair in self._pairs.values() if pair.ends is not None]
        self._next_tending = now + _TEND if joined else math.inf
        for pair in joined:
            try:
                for direction in pair.directions:
                    if isinstance(direction, JoinedDirection):
                        direction.keep_time(now)
            except OSError:
                self._end(pair, BROKEN)

    def _sweep(self, now: float) -> None:
        for pair in list(self._pairs.values()):
            if now - pair.progress > STALL and any(direction.held for direction in pair.directions):
                self._end(pair, STALLED)
        for accounts in (self._sessions, self._users):
            for name in [name for name, account in accounts.items() if account.forgettable(now)]:
                del accounts[name]

    def _end(self, pair: _Pair, outcome: str) -> None:
        if self._pairs.pop(pair.pair_id, None) is None:
            return
        for sock in pair.sockets:
            del self._sides[sock.fileno()]
            self._epoll.unregister(sock.fileno())
            if outcome != CLOSED:
                _reset_on_close(sock)
            if pair.ends is None:
                sock.close()
        for end in pair.ends or ():
            if outcome == CLOSED:
                self._on_closed(end)
            else:
                end.close()
        for direction in pair.directions:
            direction.close()
        session, user = self._sessions[pair.session_id], self._users[pair.user]
        session.pairs -= 1
        user.pairs -= 1
        forward, backward = (direction.moved for direction in pair.directions)
        self._on_ended(PairEnded(pair.pair_id, pair.session_id, pair.user, outcome, forward, backward))


def _prepare(sock: socket.socket) -> None:
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        return
    # To its agent the relay is the sender, on a path of its own.
    tune_sender(sock)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEP_IDLE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEP_INTERVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEP_COUNT)


def _reset_on_close(sock: socket.socket) -> None:
    # The peer must not take a pair that was cut for one that ended.
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass
