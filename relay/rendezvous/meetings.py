"""Meetings: paths that two agents are to punch before either has asked for one. Sans I/O, ``now`` in seconds.

With the order of a task both sides get a word to say to the relay's STUN service from their punching ports. So the
relay sees these ports itself, and once it has seen all of them knows what an offer and its answer would have said.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from protocol.candidates import HOST, MAPPED_TCP, Candidate
from protocol.reversal import new_token
from protocol.stun import Endpoint, PortNote

# So long the ports of a meeting are waited for (seconds), and so many meetings wait at once.
LIFE = 5.0
MAX_MEETINGS = 4000
# IPv6 addresses of one side that are told for each of its ports.
MAX_V6 = 4


@dataclass
class Meeting:
    """One session's. ``hosts`` are the two sides' standing candidates, of which the IPv6 ones need no mapping."""

    session_id: str
    task_id: str
    destination: str
    source: str
    count: int
    hosts: tuple[list[Candidate], list[Candidate]]
    since: float
    words: tuple[str, str] = field(default_factory=lambda: (new_token(), new_token()))
    # Where the source's data port was seen, and the destination's ports by their slots, with those over IPv6.
    source_seen: Endpoint | None = None
    slots_seen: dict[int, tuple[Endpoint, int]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether all ports were seen."""
        return self.source_seen is not None and len(self.slots_seen) == self.count

    def for_destination(self) -> list[Candidate]:
        """Where the source's data port is."""
        assert self.source_seen is not None
        host, port = self.source_seen
        v6 = [row for row in self.hosts[1] if row.kind == HOST and ":" in row.host and row.slot == 0]
        return [Candidate(kind=MAPPED_TCP, host=host, port=port), *v6[:MAX_V6]]

    def for_source(self) -> list[Candidate]:
        """Where the destination's ports are."""
        v6 = [row.host for row in self.hosts[0] if row.kind == HOST and ":" in row.host and row.slot == 0][:MAX_V6]
        found = []
        for slot, ((host, port), port_v6) in sorted(self.slots_seen.items()):
            found.append(Candidate(kind=MAPPED_TCP, host=host, port=port, slot=slot))
            found += [Candidate(kind=HOST, host=own, port=port_v6, slot=slot) for own in v6 if port_v6]
        return found


class Meetings:
    """Those that are waited for; the oldest are forgotten when there are too many."""

    def __init__(self) -> None:
        # Word → meeting and whether the source says it; the oldest first.
        self._waiting: OrderedDict[str, tuple[Meeting, bool]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting) // 2

    def open(
        self,
        now: float,
        session_id: str,
        task_id: str,
        destination: str,
        source: str,
        count: int,
        hosts: tuple[list[Candidate], list[Candidate]],
    ) -> Meeting:
        """A new one, whose ``words`` are for the destination and for the source."""
        self._forget(now)
        meeting = Meeting(session_id, task_id, destination, source, count, hosts, now)
        for word, is_source in zip(meeting.words, (False, True), strict=True):
            self._waiting[word] = meeting, is_source
        return meeting

    def seen(self, now: float, note: PortNote, endpoint: Endpoint) -> Meeting | None:
        """A port was shown; the meeting when it was the last one that was waited for. What comes too late, says a word
        that nobody was given, or comes a second time, changes nothing."""
        meeting, is_source = self._waiting.get(note.token.hex(), (None, False))
        if meeting is None or now - meeting.since > LIFE:
            return None
        if is_source:
            if note.slot or meeting.source_seen is not None:
                return None
            meeting.source_seen = endpoint
        else:
            if not 0 < note.slot <= meeting.count or note.slot in meeting.slots_seen:
                return None
            meeting.slots_seen[note.slot] = endpoint, note.port_v6
        if not meeting.complete:
            return None
        for word in meeting.words:
            self._waiting.pop(word, None)
        return meeting

    def _forget(self, now: float) -> None:
        while self._waiting:
            word, (meeting, _) = next(iter(self._waiting.items()))
            if now - meeting.since <= LIFE and len(self._waiting) < 2 * MAX_MEETINGS:
                return
            del self._waiting[word]
