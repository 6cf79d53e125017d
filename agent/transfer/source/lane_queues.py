"""The lanes of one control stream at the source: which there are, and what waits for each of them."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field

from agent.meter.lane import LaneMeter
from agent.meter.time_shares import Doing
from agent.transfer.basis.compression import Mode
from protocol.errors import ProtocolError, RetryLater, TowpathError
from protocol.names import CollectionPath
from protocol.session import ReadPack, ReadRange

MAX_LANES = 64
# Lanes that may have work before they have come.
MAX_EXPECTED = 4
# Requests of one destination that may wait for lanes; an honest one is held back by its own window long before.
MAX_WAITING = 100_000
# The memory that they may hold together; of an honest one 24,576 files at most are on their way.
MAX_WAITING_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class LaneRequest:
    """Checked work for a lane: the request with its paths, or the reason why it is refused."""

    request: ReadRange | ReadPack
    path: CollectionPath
    paths: tuple[CollectionPath, ...]
    refused: TowpathError | None = None
    # Numbers of requests that the destination wants no more, shared by all of a session.
    abandoned: set[int] = field(default_factory=set)
    compression: Mode = "off"
    # About how many bytes of memory it holds.
    size: int = 0


class LaneQueue(queue.SimpleQueue["LaneRequest | None"]):
    """What waits for one lane: one thread puts, one takes."""

    def __init__(self) -> None:
        super().__init__()
        # Each is counted by one thread.
        self._came = self._went = 0
        # What the lane works on, or has just done.
        self.taken: LaneRequest | None = None

    @property
    def size(self) -> int:
        """About how many bytes of memory all of it holds."""
        return self._came - self._went

    def put(self, item: LaneRequest | None, block: bool = True, timeout: float | None = None) -> None:
        """As of any queue."""
        self._came += 0 if item is None else item.size
        super().put(item, block, timeout)

    def get(self, block: bool = True, timeout: float | None = None) -> LaneRequest | None:
        """As of any queue."""
        item = super().get(block, timeout)
        self._went += 0 if item is None else item.size
        self.taken = item
        return item


class LaneQueues:
    """All lanes of one control stream. With ``ahead`` some may have work before they have come."""

    def __init__(self, *, ahead: bool) -> None:
        self._ahead = ahead
        self.meters: dict[int, LaneMeter] = {}
        self._queues: dict[int, LaneQueue] = {}
        # Those of them that have work and are not there yet. Threads of lanes take them out.
        self._expected: set[int] = set()
        self._joining = threading.Lock()

    def add(self, number: int, meter: LaneMeter) -> LaneQueue:
        """A lane of this number is there: where it finds its work; an older one of the number ends. Raises
        `ProtocolError` for one too many; any thread may call."""
        with self._joining:
            if number not in self._queues and len(self._queues) >= MAX_LANES:
                raise ProtocolError("The session has too many lanes.")
            self.meters[number] = meter
            old = self._queues.get(number)
            if old is not None and number in self._expected:
                self._expected.discard(number)
                return old
            if old is not None:
                old.put(None)
            lane = LaneQueue()
            self._queues[number] = lane
            return lane

    def submit(self, number: int, work: LaneRequest) -> None:
        """Queue work for a lane. Raises `RetryLater` where there is no such lane, and none to come; `ProtocolError`
        where too much waits."""
        lane = self._lane(number)
        if lane is None:
            raise RetryLater("The lane is gone.", code="CONNECTION_LOST")
        waiting = sum(each.size for each in list(self._queues.values()))
        if lane.qsize() > MAX_WAITING or waiting + work.size > MAX_WAITING_BYTES:
            raise ProtocolError("The destination asks for more than it can take.")
        lane.put(work)

    def _lane(self, number: int) -> LaneQueue | None:
        """Where a lane finds its work; of one that has not come yet only if the destination may ask ahead."""
        with self._joining:
            lane = self._queues.get(number)
            if lane is None and self._ahead and len(self._expected) < MAX_EXPECTED and len(self._queues) < MAX_LANES:
                self._expected.add(number)
                lane = self._queues[number] = LaneQueue()
            return lane

    def refuse(self, number: int, request: ReadRange | ReadPack, error: TowpathError) -> bool:
        """Have a lane say why it does not serve a request, in order with what it still sends for it; whether there is
        such a lane."""
        lane = self._queues.get(number)
        if lane is not None:
            lane.put(LaneRequest(request, (), (), error))
        return lane is not None

    def end(self) -> None:
        """Let all lanes end when they have done what waits for them."""
        for lane in self._queues.values():
            lane.put(None)

    def waited_for(self) -> list[CollectionPath]:
        """The files that lanes wait for storage for."""
        taken = [
            work
            for number, lane in list(self._queues.items())
            if (meter := self.meters.get(number)) is not None and meter.times.doing is Doing.STORAGE
            if (work := lane.taken) is not None
        ]
        return [path for work in taken for path in (work.paths or (work.path,))]

    def sent(self) -> int:
        """Bytes of content that all lanes have sent."""
        return sum(meter.content for meter in list(self.meters.values()))
