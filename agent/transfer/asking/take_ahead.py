"""The first small files of a task, asked for together with the question what they are: on a long path that saves a
round trip. Their content may be here before it was decided what becomes of them; then the lane's thread waits for that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from agent.transfer.basis.compare import SMALL_FILE
from agent.transfer.basis.jobs import FileJob, PackRequest
from protocol.control import TaskItem, TaskOptions
from protocol.session import StatResult, fitting

# Items that are asked for so, and what their files may have together.
MOST_FILES, MOST_BYTES = 64, 1024 * 1024
# The lane that brings them: the first one of a session.
LANE = 1
# Seconds for which content waits; what nobody has decided about by then is discarded and asked for again.
PATIENCE = 2.0
_LOOK = 0.05


def takeable(items: Sequence[TaskItem], options: TaskOptions) -> int:
    """How many items, from the first, are worth asking for before it is known what they are: single files that will be
    brought over whatever the destination has, all into one folder."""
    kept = options.preserve_xattrs or options.preserve_acls or options.preserve_hard_links
    if options.sync_level is not None or kept:
        return 0
    count = 0
    for item in items[:MOST_FILES]:
        checked = item.external_checksum is not None or item.checksum_algorithm is not None
        # One that is written as a folder is refused.
        elsewhere = _folder(item) != _folder(items[0]) or item.destination_path.endswith("/")
        if item.recursive or item.symlink or checked or elsewhere:
            break
        count += 1
    return count


def _folder(item: TaskItem) -> str:
    return item.destination_path.rpartition("/")[0]


class Awaited:
    """The request for such files until they are known: made and decided about in the trio thread, and waited for in a
    lane's."""

    def __init__(self, r: int, paths: Sequence[bytes]) -> None:
        self.r = r
        self._paths = paths
        # Of the files that come, in their order.
        self._coming: list[bytes] = []
        self._lock = threading.Lock()
        self._decided = threading.Event()
        self._request: PackRequest | None = None

    def answered(self, results: Sequence[StatResult]) -> None:
        """The source has said what the paths are: it sends those of them that are small files."""
        chosen = fitting([result.row for result in results[: len(self._paths)]], SMALL_FILE, MOST_BYTES)
        self._coming = [self._paths[index] for index in chosen]

    def order(self, jobs: Sequence[FileJob]) -> list[FileJob] | None:
        """These jobs in the order in which their files come, None when they are not the very files that come."""
        by_path = {job.source_path: job for job in jobs}
        if not jobs or len(by_path) != len(jobs) or sorted(by_path) != sorted(self._coming):
            return None
        return [by_path[path] for path in self._coming]

    @property
    def decided(self) -> bool:
        """Whether it is known what becomes of what comes."""
        return self._decided.is_set()

    def decide(self, request: PackRequest | None) -> bool:
        """What the content that comes is for; None: it is discarded. False when that comes too late: a lane has
        discarded some of it already, and nothing can become of the request."""
        with self._lock:
            if not self._decided.is_set():
                self._request = request
                self._decided.set()
            return self._request is request

    def wait(self, over: Callable[[], bool]) -> PackRequest | None:
        """What was decided. Blocks for `PATIENCE` seconds at most, and no longer than until ``over`` says so; then it
        is decided that the content is discarded."""
        for _ in range(int(PATIENCE / _LOOK)):
            if self._decided.wait(_LOOK) or over():
                break
        self.decide(None)
        return self._request
