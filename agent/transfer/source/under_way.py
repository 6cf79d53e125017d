"""What of its storage a source waits for, and whether that answers: threads that wait can say nothing themselves.

What is slow is not silent: a file that has to come from a tape, a folder of millions. So what is asked is whether a
name can still be looked for there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from agent.storage.base import Root
from agent.transfer.stalls.storage_probe import StorageProbe
from agent.transfer.stalls.storage_watch import watch_silence
from protocol import session
from protocol.errors import TowpathError
from protocol.names import CollectionPath

# Folders that are looked into, of those that are waited for: files of one request mostly lie together.
_MOST_FOLDERS = 8


class UnderWay:
    """Of one control stream. All methods are called in the trio thread."""

    def __init__(self) -> None:
        self._questions: dict[object, Iterable[bytes]] = {}
        self._done = 0
        # The storage that is waited for does not answer.
        self.silent = False

    @contextmanager
    def waiting(self, *paths: bytes) -> Iterator[None]:
        """While this lasts, what is at these paths of the peer is waited for, or something is said about it."""
        key = object()
        self._questions[key] = paths
        try:
            yield
        finally:
            del self._questions[key]
            self._done += 1

    async def watch(
        self,
        root: Callable[[], Root],
        allowed: Callable[[bytes], CollectionPath],
        lanes: Callable[[], Iterable[CollectionPath]],
        content: Callable[[], object],
    ) -> None:
        """Keep ``silent`` right until cancelled. ``lanes`` tells what files lanes wait for, ``content`` is another one
        whenever a lane has sent something. ``allowed`` refuses paths with `TowpathError`."""
        probe = StorageProbe(b"")

        def waited_for() -> Iterator[CollectionPath]:
            yield from lanes()
            for raw in [raw for paths in self._questions.values() for raw in paths]:
                # What it may not ask about is not looked at either.
                with suppress(TowpathError):
                    yield allowed(raw)

        async def answers() -> bool | None:
            # One of each folder.
            beside = {path[:-1]: path for path in waited_for()}
            for path in list(beside.values())[:_MOST_FOLDERS]:
                if not (answered := await probe.looks(root(), path)):
                    return answered
            return True

        def tell(error: TowpathError | None) -> None:
            self.silent = error is not None

        await watch_silence(lambda: (self._done, content()), answers, tell)


def paths_of(request: session.Request) -> list[bytes]:
    """What a question is about."""
    if isinstance(request, session.StatPaths | session.TakePaths):
        return request.paths
    if isinstance(request, session.ReadAttributes):
        return [file.path for file in request.files]
    if isinstance(request, session.DigestFile | session.FindExtents | session.DigestBlocks):
        return [request.path]
    return []
