"""What a worker and its lane processes say to each other, over a private socket pair that also carries descriptors.

The worker plans, settles and keeps the books; a lane process receives, checks digests and writes, through handles that
the worker opened. No content crosses the pair.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from agent.transfer.processes.message_buffer import (
    CHUNK,
    AreYouThere,
    Garbled,
    Here,
    Message,
    MessageBuffer,
    framed,
    room,
)

# Far more than the largest message, which tells of one pack.
MAX_MESSAGE = 4 * 1024 * 1024

# --- worker to lane process --------------------------------------------------------------------------------


class BeginRun(Message, tag="begin", frozen=True, kw_only=True):
    """A session begins. The attached descriptor holds the task's lock: no other worker may begin with this task while
    this process could still write."""

    node_key: bytes
    session_id: str


class Secure(Message, tag="secure", frozen=True, kw_only=True):
    """Secure a connection, which is attached: its peer must present ``certificate``. ``lane`` is this lane's name here
    from now on."""

    lane: int
    certificate: str


class Introduce(Message, tag="introduce", frozen=True, kw_only=True):
    """Join the control stream ``instance`` as its lane ``number``."""

    lane: int
    number: int
    instance: bytes


class CloseLane(Message, tag="close", frozen=True, kw_only=True):
    """Whatever comes on this lane is not wanted any more."""

    lane: int


class GivenFolder(Message, tag="folder", frozen=True, kw_only=True):
    """The attached descriptor is a folder, called ``folder`` from now on."""

    folder: int


class GivenFile(Message, tag="file", frozen=True, kw_only=True):
    """The attached descriptor is the temporary of a large file, called ``file`` from now on."""

    file: int
    size: int
    block: int


class Forget(Message, tag="forget", frozen=True, kw_only=True):
    """Close handles that nothing will be asked for any more."""

    folders: list[int] = []
    files: list[int] = []


class ExpectedFile(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A small file to be written to a temporary in a folder; ``mtime_ns`` None: whatever time it is then."""

    folder: int
    size: int
    mode: int
    mtime_ns: int | None


class ExpectPack(Message, tag="pack", frozen=True, kw_only=True):
    """These files will come on a lane as request ``r``. Their temporaries are called as `temporary_name` says, and stay
    open with ``hold`` until they are read back or released."""

    r: int
    lane: int
    names: bytes
    files: list[ExpectedFile]
    hold: bool


class ExpectRange(Message, tag="range", frozen=True, kw_only=True):
    """Blocks of a large file will come on a lane as request ``r``."""

    r: int
    lane: int
    file: int
    offset: int
    length: int


class Discard(Message, tag="discard", frozen=True, kw_only=True):
    """What comes of a request that was never told of is not wanted."""

    r: int
    lane: int


class Withdraw(Message, tag="withdraw", frozen=True, kw_only=True):
    """Write nothing more of a request, then say so."""

    r: int
    lane: int


class Check(Message, tag="check", frozen=True, kw_only=True):
    """Read temporaries back, which are durable now, and close them: pairs of a request and indices in it. With
    ``in_memory`` there is no other copy than the one in the page cache."""

    batch: int
    files: list[tuple[int, list[int]]]
    in_memory: bool


class Release(Message, tag="release", frozen=True, kw_only=True):
    """Close temporaries without a look."""

    files: list[tuple[int, list[int]]]


class Share(Message, tag="share", frozen=True, kw_only=True):
    """Bytes a second that all lanes of this process may receive together; None: any."""

    rate: int | None


class EndRun(Message, tag="end", frozen=True, kw_only=True):
    """The session is over: close everything, then say so."""


# --- lane process to worker --------------------------------------------------------------------------------


class Reading(msgspec.Struct, array_like=True, frozen=True):
    """What is measured of one lane: content bytes, of these saved by compression, seconds for each `Doing`, and TLS
    records."""

    lane: int
    content: int
    saved: int
    times: list[float]
    records: int = 0


class LaneSecured(Message, tag="secured", frozen=True, kw_only=True):
    """From a lane process: a lane's handshake is done."""

    lane: int


class LaneReady(Message, tag="ready", frozen=True, kw_only=True):
    """The source has accepted the lane."""

    lane: int


class LaneEnded(Message, tag="ended", frozen=True, kw_only=True):
    """A lane is over; ``error`` is an error document, and says with ``broke_rules`` what no honest source does.
    Everything that came of it was told before."""

    lane: int
    error: dict[str, Any]
    broke_rules: bool = False


class NotWritten(msgspec.Struct, array_like=True, frozen=True):
    """A file of a pack that is not here: for the source's ``error``, for the system's ``number``, or (neither) because
    its digest does not match."""

    index: int
    number: int = 0
    error: dict[str, Any] | None = None


class PackWritten(Message, tag="written", frozen=True, kw_only=True):
    """Files of a pack lie whole in their temporaries (indices and digests), which are open with ``held``, or do not.
    ``received`` counts bytes."""

    r: int
    lane: int
    received: int
    done: list[tuple[int, bytes]]
    failed: list[NotWritten]
    held: bool
    last: bool


class BlockWritten(Message, tag="block", frozen=True, kw_only=True):
    """A block of a large file is written, unless it is ``damaged`` or the system refused it (``number``)."""

    r: int
    lane: int
    offset: int
    length: int
    digest: bytes
    damaged: bool
    number: int
    last: bool


class RequestFailed(Message, tag="failed", frozen=True, kw_only=True):
    """The source could not serve a request to its end."""

    r: int
    lane: int
    error: dict[str, Any]


class Withdrawn(Message, tag="withdrawn", frozen=True, kw_only=True):
    """From a lane process: a request that was given up is not worked on any more."""

    r: int
    lane: int


class Checked(Message, tag="checked", frozen=True, kw_only=True):
    """Answer to `Check`. ``bad`` are those that do not read back: request, index, and the system's number or 0 when
    the content differs."""

    batch: int
    bad: list[tuple[int, int, int]]


class Readings(Message, tag="readings", frozen=True, kw_only=True):
    """Seconds of processor time and seconds waited for the share, both since the start, and the lanes."""

    processor: float
    waited: float
    lanes: list[Reading]


class RunEnded(Message, tag="over", frozen=True, kw_only=True):
    """Answer to `EndRun`: nothing of that session is open here any more."""


ToLanes = (
    BeginRun
    | Secure
    | Introduce
    | CloseLane
    | GivenFolder
    | GivenFile
    | Forget
    | ExpectPack
    | ExpectRange
    | Discard
    | Withdraw
    | Check
    | Release
    | Share
    | EndRun
    | AreYouThere
)
FromLanes = (
    LaneSecured
    | LaneReady
    | LaneEnded
    | PackWritten
    | BlockWritten
    | RequestFailed
    | Withdrawn
    | Checked
    | Readings
    | RunEnded
    | Here
)


def temporary_name(names: bytes, r: int, index: int) -> bytes:
    """The reserved name of one file of a pack; no other request and no counter gives it."""
    return b"%sr%x.%x" % (names, r, index)


def temporary_names(names: bytes, r: int, indices: Iterable[int]) -> list[bytes]:
    """The same of several."""
    first = b"%sr%x." % (names, r)
    return [b"%s%x" % (first, index) for index in indices]


class PairClosed(Exception):
    """The other end of the pair is gone, or says what no end of it says."""


class PairEnd:
    """A lane process's end of the pair; it blocks."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._incoming = MessageBuffer(ToLanes, MAX_MESSAGE)

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Send one message. Raises `PairClosed`."""
        try:
            self._socket.sendall(framed(message))
        except OSError as error:
            raise PairClosed from error

    def receive(self) -> Iterator[tuple[Any, list[int]]]:
        """Read once (blocks if there is nothing) and give the messages that are whole. Raises `PairClosed`."""
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(CHUNK, room())
            self._incoming.feed(data, ancillary, flags)
            if not data:
                raise PairClosed
            while (message := self._incoming.next()) is not None:
                yield message
        except (OSError, Garbled) as error:
            raise PairClosed from error

    def close(self) -> None:
        """Close this end, with all descriptors that nobody took."""
        self._socket.close()
        self._incoming.close()
