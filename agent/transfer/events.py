"""What happens in a task, told in events: numbered, kept in the journal until the daemon has them, bounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from agent.transfer.channel import Event
from agent.transfer.journal import Journal
from agent.transfer.plan import now_iso
from protocol.errors import TowpathError

# After so many events of one code only every hundredth is told; all are counted.
TOLD_EACH = 50
TOLD_EVERY = 100


class EventLog:
    """The events of one task. Everything is called in the trio thread."""

    def __init__(self, journal: Journal, tell: Callable[[Event], None]) -> None:
        self._journal = journal
        self._tell = tell
        self._seen: Counter[str] = Counter()
        self.faults = int(journal.get("faults") or b"0")

    def tell_again(self) -> None:
        """Tell the daemon what it has not confirmed, in order."""
        for event in self._journal.events():
            self._tell(event)

    def add(self, code: str, description: str, details: str = "", *, is_error: bool = False) -> None:
        """Record an event; durable with the journal's next commit."""
        event = Event(
            seq=self._journal.last_event() + 1,
            time=now_iso(),
            code=code,
            description=description,
            details=details,
            is_error=is_error,
        )
        self._journal.put_event(event)
        self._tell(event)

    def fault(self, error: TowpathError) -> None:
        """Count an error, and tell it unless very many like it were told."""
        self.faults += 1
        self._journal.put("faults", str(self.faults).encode())
        self._seen[error.code] += 1
        count = self._seen[error.code]
        if count <= TOLD_EACH or not count % TOLD_EVERY:
            sentence = error.sentence if not error.who else f"{error.sentence} ({error.who})"
            self.add(error.code, error.code.replace("_", " ").lower(), sentence, is_error=True)
