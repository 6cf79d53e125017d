"""What the daemon and a transfer worker say to each other, over a private socket pair that also carries sockets.

The daemon dials and listens; a worker gets raw connected sockets, before any handshake, as file descriptors attached
to a message (`agent.transfer.processes.message_buffer`).
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable
from typing import Any

import msgspec
import trio

from agent.storage.disks import Disk
from agent.storage.mounts import Mark
from agent.transfer.basis.lane_keys import KEY_RECORDS
from agent.transfer.processes.message_buffer import (
    CHUNK,
    AreYouThere,
    Garbled,
    Here,
    Message,
    MessageBuffer,
    framed,
    rights,
    room,
)
from protocol.control import Desired, TaskObserved, TaskOrder

MAX_CHANNEL_MESSAGE = 128 * 1024 * 1024


class WorkerCollection(msgspec.Struct, frozen=True, kw_only=True):
    """A collection as a worker needs it."""

    id: str
    root: str
    read_only: bool
    home: str = "/"
    hidden: bool = True
    read_twice: bool = False
    numbered_accounts: bool = False
    # What the root was at set-up; None when it was never looked at.
    mark: Mark | None = None
    # What is, or was, mounted below it.
    disks: tuple[Disk, ...] = ()


class Common(msgspec.Struct, frozen=True, kw_only=True):
    """What every worker is told at its start."""

    node_id: str
    node_key: bytes
    relay_id: str
    relay_root: str
    collections: list[WorkerCollection]
    # Absolute paths of the agent's own folders and files, which nobody comes to through a collection.
    own_places: tuple[str, ...] = ()
    version: str = ""
    # After how many TLS records a lane is followed by another (`agent.transfer.basis.lane_keys`).
    key_records: int = KEY_RECORDS
    # How the agent logs (`agent.log_lines`), and the least that it writes.
    log_form: str = "text"
    log_level: int = logging.INFO


# --- daemon to worker --------------------------------------------------------------------------------------


class RunTask(Message, tag="run", frozen=True, kw_only=True):
    """Be the destination of a transfer, or the one endpoint of a delete."""

    common: Common
    order: TaskOrder
    state_dir: str
    lanes: int = 1
    # Bytes a second that it may receive until it is told more; None: any. And whose limit that is.
    rate: int | None = None
    limited_by: str = ""
    # Percent of a processor that it may compute (None: any), and MiB of content that may be on its way.
    cpu: int | None = None
    memory: int = 48
    # The highest number of an event that the daemon has of this task.
    last_event: int = 0


class ServeSession(Message, tag="serve", frozen=True, kw_only=True):
    """Be the source of one session."""

    common: Common
    session_id: str
    task_id: str
    peer_certificate: str
    ticket: str
    # Bytes a second that it may send until it is told more; None: any.
    rate: int | None = None
    # Percent of a processor that it may compute; None: any.
    cpu: int | None = None


class Incoming(Message, tag="incoming", frozen=True, kw_only=True):
    """A peer connected (source). ``kind`` is ``control`` or ``lane``; one socket is attached."""

    kind: str


class Connected(Message, tag="connected", frozen=True, kw_only=True):
    """Answer to `Connect`: one socket is attached, ``certificate`` is what its peer must present."""

    request: int
    certificate: str
    transport: str = "tcp"


class ConnectFailed(Message, tag="unconnected", frozen=True, kw_only=True):
    """Answer to `Connect`: no path now; ``error`` is an error document."""

    request: int
    error: dict[str, Any]


class BetterPath(Message, tag="better", frozen=True, kw_only=True):
    """Connections opened from now on go a better way than those there are: lanes may be replaced, one by one."""


class Desire(Message, tag="desire", frozen=True, kw_only=True):
    """The relay or the owner changed what should happen: ``run``, ``pause`` or ``cancel``, perhaps a new ticket."""

    desired: Desired
    ticket: str = ""
    deadline: str | None = None


class Allowed(Message, tag="allowed", frozen=True, kw_only=True):
    """What a worker may do from now on: bytes a second (None: any), whose limit that is, lanes of its session, percent
    of a processor (None: any), and MiB of content on its way."""

    rate: int | None
    limited_by: str = ""
    lanes: int = 1
    cpu: int | None = None
    memory: int = 48


class EventStored(Message, tag="stored", frozen=True, kw_only=True):
    """The daemon has this event and all before it on disk."""

    seq: int


# --- worker to daemon --------------------------------------------------------------------------------------


class Connect(Message, tag="connect", frozen=True, kw_only=True):
    """Dial the source. ``kind`` is ``control`` or ``lane``."""

    request: int
    kind: str


class Event(Message, tag="event", frozen=True, kw_only=True):
    """Something a person may want to know. ``seq`` counts the events of one task from 1."""

    seq: int
    time: str
    code: str
    description: str
    details: str = ""
    is_error: bool = False


class Progress(Message, tag="progress", frozen=True, kw_only=True):
    """Where the task is now."""

    observed: TaskObserved


class Moved(Message, tag="moved", frozen=True, kw_only=True):
    """Content that a worker has moved and seconds its lanes have waited for their allowance, both since its start."""

    content: int
    waited: float


class Finished(Message, tag="finished", frozen=True, kw_only=True):
    """The task is in a final state, and this is on disk."""

    observed: TaskObserved


class Checkpointed(Message, tag="checkpointed", frozen=True, kw_only=True):
    """Paused: everything that arrived is settled; the worker ends now."""

    observed: TaskObserved


ToWorker = (
    RunTask
    | ServeSession
    | Incoming
    | Connected
    | ConnectFailed
    | BetterPath
    | Desire
    | EventStored
    | Allowed
    | AreYouThere
)
ToDaemon = Connect | Event | Progress | Moved | Finished | Checkpointed | Here


class ChannelClosed(Exception):
    """The other process is gone."""


class Channel:
    """One end of the socket pair. `send` may be called by several tasks, `receive` by one."""

    def __init__(self, sock: socket.socket, receives: Any) -> None:
        sock.setblocking(False)
        self._plain = sock
        self._socket = trio.socket.from_stdlib_socket(sock)
        self._incoming = MessageBuffer(receives, MAX_CHANNEL_MESSAGE)
        self._sending = trio.Lock()
        # How the process at the other end ended (exit status, or negative signal), as far as somebody has seen it.
        self.ended: int | None = None
        # Its id while it is there, and how often something has come from it.
        self.pid: int | None = None
        self.heard = 0

    async def send(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        """Send one message; descriptors are duplicated to the other process and stay open here.

        Raises `ChannelClosed`. A cancelled send closes the channel: half a message is no message.
        """
        await self._send(framed(message), descriptors)

    async def send_together(self, messages: Iterable[Message], descriptors: tuple[int, ...]) -> None:
        """As `send`, several in their order with one call of the system; all their descriptors, in this order, are no
        more than `MOST_DESCRIPTORS`."""
        await self._send(b"".join(map(framed, messages)), descriptors)

    async def _send(self, together: bytes, descriptors: tuple[int, ...]) -> None:
        data = memoryview(together)
        async with self._sending:
            try:
                with trio.CancelScope(shield=True) as scope:
                    scope.deadline = trio.current_time() + 60
                    if descriptors:
                        data = data[await self._socket.sendmsg([data], rights(descriptors)) :]
                    while data:
                        data = data[await self._socket.send(data) :]
            except OSError as error:
                raise ChannelClosed from error
            if scope.cancelled_caught:
                raise ChannelClosed

    async def receive(self) -> tuple[Any, list[int]]:
        """The next message and its descriptors, which the caller now owns. Raises `ChannelClosed` at the end."""
        try:
            while (message := self._incoming.next()) is None:
                data, ancillary, flags, _ = await self._socket.recvmsg(CHUNK, room())
                self._incoming.feed(data, ancillary, flags)
                if not data:
                    raise ChannelClosed
                self.heard += 1
            return message
        except (OSError, Garbled) as error:
            raise ChannelClosed from error

    def receive_first(self) -> tuple[Any, list[int]]:
        """As `receive`, for a process that does nothing else and has no trio running yet: blocks."""
        # Not by `select`, which knows descriptors below 1024 only: ours has the number that a busy daemon had for it.
        self._plain.setblocking(True)
        try:
            while (message := self._incoming.next()) is None:
                data, ancillary, flags, _ = self._plain.recvmsg(CHUNK, room())
                self._incoming.feed(data, ancillary, flags)
                if not data:
                    raise ChannelClosed
            return message
        except (OSError, Garbled) as error:
            raise ChannelClosed from error
        finally:
            self._plain.setblocking(False)

    def is_waiting(self) -> bool:
        """Whether nothing was said yet, before the first message."""
        try:
            self._plain.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            # `receive` says what this is.
            return False
        return False

    def close(self) -> None:
        """Close this end and every descriptor that nobody took. Safe to call twice."""
        if trio.lowlevel.in_trio_run():
            # Whoever waits for it hears of it.
            self._socket.close()
        else:
            self._plain.close()
        self._incoming.close()
