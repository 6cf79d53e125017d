"""What happens in a task, told in events: numbered, kept in the journal until the daemon has them, bounded."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable

from agent.transfer.basis.times import now_iso
from agent.transfer.books.journal import Journal
from agent.transfer.books.state_trouble import StateTrouble
from agent.transfer.processes.channel import Event
from protocol.errors import TowpathError

# After so many events of one code only every hundredth is told; all are counted.
TOLD_EACH = 50
TOLD_EVERY = 100


class EventLog:
    """The events of one task. Everything is called in the trio thread."""

    def __init__(self, journal: Journal, tell: Callable[[Event], None], *, after: int = 0) -> None:
        self._journal = journal
        self._tell = tell
        self._seen: Counter[str] = Counter()
        # The daemon may know more events than a journal that was begun anew; numbers are never used twice.
        self._last = max(after, journal.last_event())
        self.faults = int(journal.get("faults") or b"0")

    def tell_again(self) -> None:
        """Tell the daemon what it has not confirmed, in order."""
        for event in self._journal.events():
            self._tell(event)

    def add(self, code: str, description: str, details: str = "", *, is_error: bool = False) -> None:
        """Record an event; durable with the journal's next commit."""
        self._last += 1
        event = Event(
            seq=self._last,
            time=now_iso(),
            code=code,
            description=description,
            details=details,
            is_error=is_error,
        )
        # A journal that cannot be written ends the run at its next commit; people hear of the event all the same.
        with contextlib.suppress(StateTrouble):
            self._journal.put_event(event)
        self._tell(event)

    def fault(self, error: TowpathError) -> None:
        """Count an error, and tell it unless very many like it were told."""
        self.faults += 1
        with contextlib.suppress(StateTrouble):
            self._journal.put("faults", str(self.faults).encode())
        self._seen[error.code] += 1
        count = self._seen[error.code]
        if count <= TOLD_EACH or not count % TOLD_EVERY:
            sentence = error.sentence if not error.who else f"{error.sentence} ({error.who})"
            self.add(error.code, error.code.replace("_", " ").lower(), sentence, is_error=True)

    def list_damaged(self) -> None:
        """A list of files is not whole any more."""
        self.add(
            "LIST_DAMAGED",
            "list damaged",
            "Part of the list of files is gone from the agent's disk; what was transferred is not concerned.",
            is_error=True,
        )

    def journal_rebuilt(self) -> None:
        """The journal is another one now."""
        self.add(
            "JOURNAL_REBUILT",
            "journal rebuilt",
            "The journal of the task was damaged and is begun anew. What is at the destination is compared with the "
            "source by digest, and only what differs is transferred again.",
            is_error=True,
        )

    def root_replaced(self) -> None:
        """The destination is another folder, or another disk, now."""
        self.add(
            "ROOT_REPLACED",
            "root replaced",
            "The destination's folder, or a disk mounted below it, is another one than when the task began, and its "
            "owner has accepted that. What is there is compared with the source, and what is missing is transferred.",
            is_error=True,
        )
