"""Says how far a task is: to its daemon several times a second, and to its owner in an event now and then."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import trio

from protocol.control import Counters, TaskObserved

# Seconds.
EVERY = 0.25
# An event comes after so many seconds, the next ones ever later.
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 3600.0


class Progress:
    """Looks at a task with ``observe`` and passes that to ``report``; ``tell`` gets what an event says, as JSON."""

    def __init__(
        self,
        observe: Callable[[], TaskObserved],
        report: Callable[[TaskObserved], None],
        tell: Callable[[str], None],
    ) -> None:
        self._observe = observe
        self._report = report
        self._tell = tell
        # Content bytes a second, smoothed.
        self.rate = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        began = last_time = trio.current_time()
        last_bytes = self._observe().counters.bytes_transferred
        pause = FIRST_PAUSE
        next_event = began + pause
        while True:
            await trio.sleep(EVERY)
            observed = self._observe()
            moved, now = observed.counters.bytes_transferred, trio.current_time()
            step = (moved - last_bytes) / max(now - last_time, 1e-3)
            self.rate = 0.8 * self.rate + 0.2 * step
            last_bytes, last_time = moved, now
            self._report(observed)
            if now >= next_event:
                pause = min(pause * 2, LONGEST_PAUSE)
                next_event = now + pause
                if observed.state == "ACTIVE":
                    self._tell(_details(observed, now - began))


def _details(observed: TaskObserved, seconds: float) -> str:
    """The fields of Globus's event, and who holds the task up."""
    details: dict[str, object] = {
        "bytes_transferred": observed.counters.bytes_transferred,
        "duration": round(seconds, 1),
        "mbps": round(observed.rate * 8 / 1e6, 2),
    }
    if observed.flow is not None:
        details["files_per_second"] = round(observed.flow.files_per_second, 1)
        details["lanes"] = len(observed.flow.lanes)
        details["limited_by"] = observed.flow.limited_by
    return msgspec.json.encode(details).decode()


def merged(before: Counters, after: Counters) -> Counters:
    """Counters only grow: a worker that lists a directory again begins a little below."""
    names = [name for name in Counters.__struct_fields__ if name not in ("scan_complete", "retrying")]
    return msgspec.structs.replace(after, **{name: max(getattr(before, name), getattr(after, name)) for name in names})
