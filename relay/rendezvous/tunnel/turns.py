"""Whose turn it is: users take turns, then the sessions of a user, then what waits in a session. Sans I/O.

A user or a session whose rate is used up is held as a whole, with everything that waits in it, until a moment; so
nobody gets ahead by having more in line.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from itertools import count
from typing import Generic, TypeVar

W = TypeVar("W")


class Turns(Generic[W]):
    """Work waits under its user and session; `next` takes it off, round robin on all three levels."""

    def __init__(self) -> None:
        self._users: OrderedDict[str, OrderedDict[str, deque[W]]] = OrderedDict()
        self._held_users: dict[str, OrderedDict[str, deque[W]]] = {}
        self._held_sessions: dict[tuple[str, str], deque[W]] = {}
        self._wakes: list[tuple[float, int, str, str | None]] = []
        self._numbers = count()

    def __bool__(self) -> bool:
        """Whether anything may have its turn now."""
        return bool(self._users)

    def add(self, user: str, session: str, work: W) -> None:
        """Stand at the end of the session's line."""
        held = self._held_sessions.get((user, session))
        if held is not None:
            held.append(work)
            return
        sessions = self._held_users.get(user)
        if sessions is None:
            sessions = self._users.setdefault(user, OrderedDict())
        sessions.setdefault(session, deque()).append(work)

    def peek(self) -> tuple[str, str]:
        """User and session whose turn it is. Call only when there is one."""
        user, sessions = next(iter(self._users.items()))
        return user, next(iter(sessions))

    def next(self) -> W:
        """What `peek` announced, off the line; its user and session go to the end of theirs."""
        user, sessions = next(iter(self._users.items()))
        session, waiting = next(iter(sessions.items()))
        work = waiting.popleft()
        if waiting:
            sessions.move_to_end(session)
        else:
            del sessions[session]
        if sessions:
            self._users.move_to_end(user)
        else:
            del self._users[user]
        return work

    def hold_user(self, user: str, until: float) -> None:
        """Nothing of this user (of the ready ones) until then."""
        self._held_users[user] = self._users.pop(user)
        heapq.heappush(self._wakes, (until, next(self._numbers), user, None))

    def hold_session(self, user: str, session: str, until: float) -> None:
        """Nothing of this session (of a ready user) until then."""
        sessions = self._users[user]
        self._held_sessions[user, session] = sessions.pop(session)
        if not sessions:
            del self._users[user]
        heapq.heappush(self._wakes, (until, next(self._numbers), user, session))

    def next_wake(self) -> float | None:
        """When the next held one is to be let go on."""
        return self._wakes[0][0] if self._wakes else None

    def wake(self, now: float) -> None:
        """Let go on what was held until now."""
        while self._wakes and self._wakes[0][0] <= now:
            _, _, user, session = heapq.heappop(self._wakes)
            if session is None:
                self._users[user] = self._held_users.pop(user)
            else:
                for work in self._held_sessions.pop((user, session)):
                    self.add(user, session, work)
