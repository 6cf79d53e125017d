"""One lane process as its worker knows it, with the lanes that live there: what is said to it, and what becomes of what
it says.

One that dies takes its lanes along, whose work goes to others; nothing takes its place. One that stands still is ended
where that can be done (`agent.transfer.stalls.lane_watch`).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import socket
from collections.abc import Iterable
from typing import Any, Protocol

import msgspec
import trio

from agent.limits.pace import Pace
from agent.transfer.basis.jobs import Group, LargeFile, Request
from agent.transfer.lane_processes import lane_messages as say
from agent.transfer.lane_processes.lane_forks import Child
from agent.transfer.lane_processes.remote_meter import RemoteMeter
from agent.transfer.processes.channel import Channel, ChannelClosed
from agent.transfer.processes.message_buffer import MOST_DESCRIPTORS, AreYouThere, Here, Message
from agent.transfer.stalls.lane_watch import TellStandstill, stays, until_lost
from protocol.errors import ProtocolError, RetryLater, TowpathError, error_from_document_untrusted
from protocol.signs_of_life import Signs

# How long a lane process may take to close what a session had open, before it is killed.
END_WITHIN = 10.0
# How long one that was killed may take to be gone before people hear of it.
GONE_WITHIN = 5.0
# How long the source may take to greet a new lane.
GREETED_WITHIN = 40.0
_QUEUED = 100_000
# Messages that are sent with one call.
_TOGETHER = 64

_logger = logging.getLogger("towpath.worker")


class Arrivals(Protocol):
    """What a run does about what its lane processes say. Called in the trio thread."""

    def expectation(self, process: OneProcess, lane: int, request: Request) -> Message:
        """How a request is told to a process."""

    def pack_written(self, lane: RemoteLane, message: say.PackWritten) -> None: ...
    def block_written(self, lane: RemoteLane, message: say.BlockWritten) -> None: ...
    def request_failed(self, lane: RemoteLane, message: say.RequestFailed) -> None: ...
    def withdrawn(self, lane: RemoteLane, message: say.Withdrawn) -> None: ...
    def checked(self, process: OneProcess, message: say.Checked) -> None: ...
    def process_lost(self, process: OneProcess) -> None: ...

    async def storage_answers(self, folder: Group) -> bool | None:
        """Whether the storage of a folder answers now; None when it cannot be asked."""


class RemoteLane:
    """One lane that lives in a lane process."""

    def __init__(self, process: OneProcess, key: int, sock: socket.socket) -> None:
        self.process = process
        self.key = key
        self.number = 0
        # The connection before TLS, which belongs to the other process: to be shut down and asked about.
        self._socket = sock
        self.meter = RemoteMeter(sock)
        self.secured, self.ready, self.over = trio.Event(), trio.Event(), trio.Event()
        self.error: TowpathError | None = None

    async def introduce(self, instance: bytes, number: int, *, wait: bool) -> None:
        """Join a control stream, and perhaps wait for the source to accept it. Raises what ends the lane."""
        self.number = number
        self.process.post(say.Introduce(lane=self.key, number=number, instance=instance))
        if wait:
            await self.wait_for(self.ready, GREETED_WITHIN)

    async def wait_for(self, event: trio.Event, seconds: float) -> None:
        """Wait for a step of the lane. Raises what ends it first, or `RetryLater`."""
        with trio.move_on_after(seconds):
            await event.wait()
            if self.error is not None:
                raise self.error
            return
        raise RetryLater("A lane to the source did not come up in time.", code="CONNECT_FAILED")

    async def ended(self) -> None:
        """Wait for the end of the lane, and raise why."""
        await self.over.wait()
        raise self.error or RetryLater("The source closed a lane.", code="CONNECTION_LOST")

    def end(self, error: TowpathError) -> None:
        """It is over."""
        self.error = self.error or error
        for event in (self.over, self.secured, self.ready):
            event.set()

    def expect(self, request: Request) -> None:
        """Have the process take what is about to be asked for."""
        arrivals = self.process.arrivals
        if arrivals is not None:
            self.process.post(arrivals.expectation(self.process, self.key, request))

    def discard(self, r: int) -> None:
        """Have what comes of a request left lying."""
        self.process.post(say.Discard(r=r, lane=self.key))

    def withdraw(self, r: int) -> None:
        """Have nothing more of a request written; the run hears when that is sure."""
        self.process.post(say.Withdraw(r=r, lane=self.key))

    def shut_down(self) -> None:
        """End the connection; the process then says that the lane is over."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give it up. Returns at once, safe to call twice."""
        if self.process.lanes.pop(self.key, None) is not None:
            self.process.post(say.CloseLane(lane=self.key))
        self._socket.close()


class OneProcess:
    """The worker's end of the pair with one lane process. Methods are called in the trio thread. ``tell`` hears when
    it stands still, and when it does not any more."""

    def __init__(self, child: Child, pace: Pace, tell: TellStandstill = lambda _error: None) -> None:
        self.child = child
        self._pace = pace
        self._tell = tell
        self.alive = True
        # Set when it was told to end by force, and when it is no more.
        self._killed, self.gone = trio.Event(), trio.Event()
        self.lanes: dict[int, RemoteLane] = {}
        self.arrivals: Arrivals | None = None
        self.processor = 0.0
        self.waited = 0.0
        self.run_ended = trio.Event()
        self.share: int | None = None
        # Handles that it has, by what they are of.
        self._folders: dict[Group, int] = {}
        self._files: dict[LargeFile, int] = {}
        self._numbers = itertools.count(1)
        self._channel = Channel(child.sock, say.FromLanes)
        self._out, self._queue = trio.open_memory_channel[tuple[Message, tuple[int, ...]]](_QUEUED)

    def post(self, message: Message, descriptor: int | None = None) -> None:
        """Say something, with a descriptor that is duplicated at once. Nothing happens when the process is gone; one
        that cannot be told is ended."""
        if not self.alive:
            return
        descriptors: tuple[int, ...] = ()
        if descriptor is not None:
            try:
                descriptors = (os.dup(descriptor),)
            except OSError:
                # There may be no more for this process. What it was to have, others get or ask for again.
                self.kill()
                return
            message = msgspec.structs.replace(message, descriptors=1)
        try:
            self._out.send_nowait((message, descriptors))
        except trio.WouldBlock:
            for each in descriptors:
                os.close(each)
            self.kill()

    def kill(self) -> None:
        """End it now; like any death it costs nothing but the work it had not told of."""
        self.child.kill()
        self._killed.set()

    async def run(self) -> None:
        """Talk with it until it is gone, or cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._look_after)
                nursery.start_soon(self._until_killed)
                while True:
                    message, _ = await self._channel.receive()
                    self._handle(message)
        except* (ChannelClosed, OSError):
            _logger.info("The lane process %s is gone.", self.child.pid)
        finally:
            self.alive = False
            self.kill()
            with trio.CancelScope(shield=True):
                # Before anybody takes over its work: what it was about to write must not come later.
                await self._until_gone()
            self._gone()

    async def _look_after(self) -> None:
        await until_lost(self, self._tell)
        self.kill()

    async def _until_killed(self) -> None:
        """One that was killed mostly closes its end of the pair, behind what it has said before. One that hangs does
        not."""
        await self._killed.wait()
        await trio.sleep(GONE_WITHIN)
        raise ChannelClosed

    async def _until_gone(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_if_it_stays)
            # With a limiter of its own: whoever waits here takes no thread from others.
            await trio.to_thread.run_sync(self.child.wait, limiter=trio.CapacityLimiter(1))
            nursery.cancel_scope.cancel()
        self._tell(None)

    async def _tell_if_it_stays(self) -> None:
        await trio.sleep(GONE_WITHIN)
        self._tell(stays())

    # --- for `lane_watch` ------------------------------------------------------------------------------

    @property
    def heard(self) -> int:
        """How often something has come from it."""
        return self._channel.heard

    async def ask(self) -> None:
        """Have it say something."""
        self.post(AreYouThere())

    def signs(self) -> Signs | None:
        """What the system tells of it."""
        return self.child.signs()

    async def storage_answers(self) -> bool | None:
        """Whether the storage that it writes to answers others (None: it cannot be asked now); also where it writes
        nothing."""
        groups = [*self._folders, *(file.job.group for file in self._files)]
        if not groups or self.arrivals is None:
            return True
        return await self.arrivals.storage_answers(groups[-1])

    async def _write(self) -> None:
        async for message, descriptors in self._queue:
            messages = [message]
            try:
                # Each call, and each time the process is woken, costs as much as receiving several files.
                while len(messages) < _TOGETHER and len(descriptors) < MOST_DESCRIPTORS:
                    try:
                        message, more = self._queue.receive_nowait()
                    except (trio.WouldBlock, trio.EndOfChannel):
                        break
                    messages.append(message)
                    descriptors += more
                await self._channel.send_together(messages, descriptors)
            finally:
                for each in descriptors:
                    os.close(each)

    def _gone(self) -> None:
        self.gone.set()
        self._channel.close()
        with contextlib.suppress(trio.WouldBlock):
            while True:
                for each in self._queue.receive_nowait()[1]:
                    os.close(each)
        # What it had written stands or falls with the run; that first, so that nothing is asked for again before.
        if self.arrivals is not None:
            self.arrivals.process_lost(self)
        for lane in list(self.lanes.values()):
            lane.end(RetryLater("A process that received for this task ended.", code="CONNECTION_LOST"))
        self.run_ended.set()

    def _handle(self, message: Any) -> None:
        if isinstance(message, say.Readings):
            self.processor, self.waited = message.processor, message.waited
            for reading in message.lanes:
                known = self.lanes.get(reading.lane)
                if known is not None:
                    self._pace.moved(known.meter.note(reading))
        elif isinstance(message, say.Checked):
            if self.arrivals is not None:
                self.arrivals.checked(self, message)
        elif isinstance(message, say.RunEnded):
            self.run_ended.set()
        elif not isinstance(message, Here):
            lane = self.lanes.get(message.lane)
            if lane is not None:
                self._of_lane(lane, message)

    def _of_lane(self, lane: RemoteLane, message: Any) -> None:
        if isinstance(message, say.LaneSecured):
            lane.secured.set()
        elif isinstance(message, say.LaneReady):
            lane.ready.set()
        elif isinstance(message, say.LaneEnded):
            error = error_from_document_untrusted(message.error)
            lane.end(ProtocolError(error.sentence) if message.broke_rules else error)
        elif self.arrivals is None:
            return
        elif isinstance(message, say.PackWritten):
            self.arrivals.pack_written(lane, message)
        elif isinstance(message, say.BlockWritten):
            self.arrivals.block_written(lane, message)
        elif isinstance(message, say.RequestFailed):
            self.arrivals.request_failed(lane, message)
        elif isinstance(message, say.Withdrawn):
            self.arrivals.withdrawn(lane, message)

    # --- handles ---------------------------------------------------------------------------------------

    def folder(self, group: Group) -> int:
        """The number of a group's folder there; it is handed over when it was not. Raises OSError."""
        number = self._folders.get(group)
        if number is None:
            descriptor = group.handle.fileno()
            if descriptor is None:
                raise OSError(errno.EBADF, "The folder has no handle that could be handed over.")
            number = self._folders[group] = next(self._numbers)
            self.post(say.GivenFolder(folder=number), descriptor)
        return number

    def file(self, file: LargeFile) -> int:
        """The same for the temporary of a large file."""
        number = self._files.get(file)
        if number is None:
            number = next(self._numbers)
            self.post(say.GivenFile(file=number, size=file.job.row.size, block=file.block), file.descriptor)
            self._files[file] = number
        return number

    def forget_groups(self, groups: Iterable[Group]) -> None:
        """The groups are done."""
        numbers = [number for group in groups if (number := self._folders.pop(group, None)) is not None]
        if numbers:
            self.post(say.Forget(folders=numbers))

    def forget_file(self, file: LargeFile) -> None:
        """Nothing of the file is under way."""
        number = self._files.pop(file, None)
        if number is not None:
            self.post(say.Forget(files=[number]))

    def begin_run(self, node_key: bytes, session_id: str, lock: int | None) -> None:
        """A session begins."""
        self._folders.clear()
        self._files.clear()
        self.run_ended = trio.Event()
        self.post(say.BeginRun(node_key=node_key, session_id=session_id), lock)

    async def end_run(self) -> None:
        """Have everything of the session closed: afterwards it writes nothing of it any more."""
        if self.alive:
            self.post(say.EndRun())
            with trio.move_on_after(END_WITHIN):
                await self.run_ended.wait()
            if self.run_ended.is_set():
                return
            self.kill()
        # One that was killed may hang in storage, and then write what it was writing.
        await self.gone.wait()
