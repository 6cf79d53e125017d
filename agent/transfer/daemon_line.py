"""A task worker's line to its daemon: asks for connections, hears what is desired, tells what happens."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial

import trio

from agent.connect.control_tls import ControlStream
from agent.connect.lane_tls import SecuredLane, secure_lane
from agent.connect.tls import HANDSHAKE_TIMEOUT
from agent.connect.transport import send_at_once
from agent.limits.pace import Pace
from agent.limits.processor import Governor
from agent.transfer.asking.source_session import SourceSession
from agent.transfer.basis import compression
from agent.transfer.lane_processes.lane_ahead import LaneAhead
from agent.transfer.lane_processes.lane_forks import Child
from agent.transfer.lane_processes.one_process import RemoteLane
from agent.transfer.lane_processes.pool import LaneProcesses
from agent.transfer.processes.channel import (
    Allowed,
    BetterPath,
    Channel,
    Checkpointed,
    Connect,
    Connected,
    ConnectFailed,
    Desire,
    Event,
    EventStored,
    Finished,
    Moved,
    Progress,
    RunTask,
)
from agent.transfer.processes.message_buffer import AreYouThere, Here, Message
from protocol.control import TaskObserved
from protocol.errors import RetryLater, TowpathError, error_from_document_untrusted
from protocol.identity import NodeKey
from protocol.keep_alive import give_up_unacknowledged
from protocol.session import ALPN_CONTROL_AHEAD, ALPN_LANE, ALPNS_CONTROL, SNI_SUFFIX, RenewTicket

# How often (seconds) a worker says what it has moved.
MOVED_EVERY = 0.5


class Moving:
    """What the lanes of a worker may move and compute, and what they have; one for each worker."""

    def __init__(self, rate: int | None, cpu: int | None) -> None:
        self.pace = Pace(rate)
        self.cpu = cpu
        # Seconds of processor time of the processes that work for this one.
        self.elsewhere: Callable[[], float] = lambda: 0.0

    async def tell(self, channel: Channel) -> None:
        """Keep to the limit of processor time, and tell the daemon now and then what was moved and waited for, so that
        limits are shared; until cancelled."""
        said = (0, 0.0)
        governor = Governor(time.monotonic(), time.process_time(), 0)
        while True:
            await trio.sleep(MOVED_EVERY)
            now = (self.pace.content, self.pace.waited)
            processor = time.process_time() + self.elsewhere()
            self.pace.govern(governor.look(self.cpu, time.monotonic(), processor, now[0]))
            if now != said:
                said = now
                await channel.send(Moved(content=now[0], waited=now[1]))


class DaemonLine:
    """The worker's end of the channel. `run` reads it; when the daemon dies, the worker is cancelled."""

    def __init__(self, channel: Channel, start: RunTask, identity: NodeKey, forked: Sequence[Child] = ()) -> None:
        self._channel = channel
        self._identity = identity
        self._order = start.order
        self._version = start.common.version
        self.desired = start.order.desired
        self.revision = start.order.revision
        self.ticket = start.order.ticket
        self._offers = compression.offered(start.order.options.compression)
        self.on_event_stored: Callable[[int], None] = lambda _seq: None
        self.on_better_path: Callable[[], None] = lambda: None
        # Lanes and MiB on the way, when they have changed.
        self.on_limits: Callable[[int, int], None] = lambda _lanes, _memory: None
        # What this worker may do, as the daemon last said.
        self.lanes = start.lanes
        self._moving = Moving(start.rate, start.cpu)
        self.pace = self._moving.pace
        # None where everything is received in this process.
        self.processes = LaneProcesses(forked, self.pace) if forked else None
        if self.processes is not None:
            self._moving.elsewhere = partial(getattr, self.processes, "processor")
        # Of the file that says that no other worker is at work on the task.
        self.lock: int | None = None
        self.memory = start.memory
        self.limited_by = start.limited_by
        self._next = 0
        self._waiting: dict[int, trio.MemorySendChannel[tuple[Connected | ConnectFailed, list[int]]]] = {}
        self._scopes: set[trio.CancelScope] = set()
        self._send_out, self._receive_out = trio.open_memory_channel[Message](10_000)
        self._latest: TaskObserved | None = None
        self._wake = trio.Event()
        self._session: SourceSession | None = None
        # A lane that is opened while the session is begun.
        self._ahead: LaneAhead | None = None
        self._ahead_in, self._ahead_out = trio.open_memory_channel[LaneAhead](10)
        self._said = trio.Event()

    async def run(self) -> None:
        """Read and write until the daemon is gone. Raises `ChannelClosed`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            nursery.start_soon(self._write_progress)
            nursery.start_soon(self._write_moved)
            nursery.start_soon(self._open_ahead, nursery)
            if self.processes is not None:
                nursery.start_soon(self.processes.run)
            while True:
                message, descriptors = await self._channel.receive()
                self._handle(message, descriptors)

    def _handle(self, message: Message, descriptors: list[int]) -> None:
        if isinstance(message, Connected | ConnectFailed):
            waiting = self._waiting.pop(message.request, None)
            if waiting is None:
                for descriptor in descriptors:
                    os.close(descriptor)
            else:
                waiting.send_nowait((message, descriptors))
        elif isinstance(message, Desire):
            self.desired = message.desired
            if message.ticket and message.ticket != self.ticket:
                self.ticket = message.ticket
                if self._session is not None:
                    # One that is lost, while what it brought is still being settled, needs none: the next one shows it.
                    with contextlib.suppress(TowpathError):
                        self._session.post(RenewTicket(message.ticket))
            if message.desired != "run":
                for scope in self._scopes:
                    scope.cancel()
        elif isinstance(message, BetterPath):
            self.on_better_path()
        elif isinstance(message, Allowed):
            self._allow(message)
        elif isinstance(message, EventStored):
            self.on_event_stored(message.seq)
        elif isinstance(message, AreYouThere):
            self._post(Here())

    def _allow(self, message: Allowed) -> None:
        self.pace.set_rate(message.rate)
        self.limited_by = message.limited_by
        self._moving.cpu = message.cpu
        if (message.lanes, message.memory) != (self.lanes, self.memory):
            self.lanes, self.memory = message.lanes, message.memory
            self.on_limits(message.lanes, message.memory)

    async def _open_ahead(self, nursery: trio.Nursery) -> None:
        async for ahead in self._ahead_out:
            nursery.start_soon(ahead.run)

    async def _write_moved(self) -> None:
        await self._moving.tell(self._channel)

    async def _write(self) -> None:
        async for message in self._receive_out:
            await self._channel.send(message)
            if isinstance(message, Finished | Checkpointed):
                self._said.set()

    async def _write_progress(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            if self._latest is not None:
                await self._channel.send(Progress(observed=self._latest))

    async def finish(self, message: Message) -> None:
        """Send the last message, after everything posted before it."""
        await self._send_out.send(message)
        await self._said.wait()

    def post(self, message: Event) -> None:
        """Tell the daemon, in order. What does not fit now is told again at the next start."""
        self._post(message)

    def _post(self, message: Message) -> None:
        with contextlib.suppress(trio.WouldBlock):
            self._send_out.send_nowait(message)

    def report(self, observed: TaskObserved) -> None:
        """Tell the daemon where the task is; only the latest counts."""
        self._latest = observed
        self._wake.set()

    @contextlib.contextmanager
    def while_desired(self) -> Iterator[trio.CancelScope]:
        """A scope that is cancelled when the task should not run any more."""
        with trio.CancelScope() as scope:
            if self.desired != "run":
                scope.cancel()
            self._scopes.add(scope)
            try:
                yield scope
            finally:
                self._scopes.discard(scope)

    # --- connections -----------------------------------------------------------------------------------

    async def _dial(self, kind: str) -> tuple[socket.socket, str]:
        self._next += 1
        request = self._next
        send, receive = trio.open_memory_channel[tuple[Connected | ConnectFailed, list[int]]](1)
        self._waiting[request] = send
        try:
            await self._channel.send(Connect(request=request, kind=kind))
            answer, descriptors = await receive.receive()
        finally:
            self._waiting.pop(request, None)
        if isinstance(answer, ConnectFailed):
            error = error_from_document_untrusted(answer.error)
            raise error if isinstance(error, TowpathError) else RetryLater("No path to the source.")
        sock = socket.socket(fileno=descriptors[0])
        send_at_once(sock)
        return sock, answer.certificate

    @contextlib.asynccontextmanager
    async def session(self, session_id: str) -> AsyncIterator[SourceSession]:
        """A control stream to the source, on which we have introduced ourselves. Raises `TowpathError` when there is no
        way now."""
        sock, certificate = await self._dial("control")
        if self.processes is not None:
            self.processes.begin_run(self._identity.private_key_pem, session_id, self.lock)
        # Requests that nobody acknowledges went to nobody: while some are on their way the kernel asks for no sign of
        # life. The source's answers may well be held up, when the plan is far behind.
        give_up_unacknowledged(sock)
        ahead = self._ahead = LaneAhead(self._open_lane)
        self._ahead_in.send_nowait(ahead)
        sock.setblocking(False)
        stream = ControlStream(
            trio.SocketStream(trio.socket.from_stdlib_socket(sock)),
            self._identity,
            certificate,
            server_name=session_id + SNI_SUFFIX,
            alpn=ALPNS_CONTROL,
        )
        try:
            with trio.move_on_after(HANDSHAKE_TIMEOUT) as scope:
                await stream.do_handshake()
            if scope.cancelled_caught:
                raise RetryLater("The source did not finish the handshake in time.", code="CONNECT_FAILED")
            session = SourceSession(stream, os.urandom(16))
            if stream.selected_alpn_protocol() == ALPN_CONTROL_AHEAD:
                await session.greet(self.ticket, self._version, self._offers)
            else:
                await session.hello(self.ticket, self._version, self._offers)
            self._session = session
            yield session
        except (trio.BrokenResourceError, OSError) as error:
            raise RetryLater("The connection to the source could not be secured.", code="CONNECT_FAILED") from error
        finally:
            self._session = self._ahead = None
            ahead.close()
            await trio.aclose_forcefully(stream)

    async def lane(self) -> SecuredLane | RemoteLane:
        """A secured socket for one lane, or a lane that another process has secured. Raises `TowpathError`."""
        ahead, self._ahead = self._ahead, None
        secured = await ahead.take() if ahead is not None else None
        return secured or await self._open_lane()

    async def _open_lane(
        self, dialled: Callable[[socket.socket], None] = lambda _sock: None
    ) -> SecuredLane | RemoteLane:
        sock, certificate = await self._dial("lane")
        dialled(sock)
        if self.processes is not None and self.processes.alive:
            return await self.processes.open(sock, certificate)
        try:
            return await trio.to_thread.run_sync(self._secure_lane, sock, certificate)
        except OSError as error:
            raise RetryLater("A lane to the source could not be secured.", code="CONNECT_FAILED") from error

    def _secure_lane(self, sock: socket.socket, certificate: str) -> SecuredLane:
        name = self._order.session_id + SNI_SUFFIX
        return secure_lane(sock, self._identity, certificate, server_name=name, alpn=ALPN_LANE)
