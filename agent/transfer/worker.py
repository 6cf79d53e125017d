"""The worker process: one task at its destination, or one session at its source. Composition only.

Started by the daemon as ``python -m agent.transfer.worker FD N`` with one end of a socket pair and the number of
processes that its session may use, itself included (0: as many as pay), or forked from the daemon; the first message
says what to be. It ends when its work ends or the daemon goes away; what it had settled is in the journal.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import trio

from agent.connect.lane_tls import SecuredLane, secure_lane
from agent.connect.tls import HANDSHAKE_TIMEOUT, check_peer, session_context
from agent.connect.transport import send_at_once
from agent.log_lines import log_to_standard_error
from agent.storage.base import Root
from agent.storage.guarded import open_guarded
from agent.storage.hiding import offered
from agent.storage.reach import Reach
from agent.system.process_name import rename_process
from agent.transfer.daemon_line import DaemonLine, Moving
from agent.transfer.lane_processes.lane_forks import Child, dismiss, fork_lane_processes
from agent.transfer.lane_processes.session_processes import lane_processes
from agent.transfer.processes.channel import (
    Allowed,
    Channel,
    ChannelClosed,
    Checkpointed,
    Common,
    Finished,
    Incoming,
    RunTask,
    ServeSession,
    ToWorker,
    WorkerCollection,
)
from agent.transfer.processes.message_buffer import AreYouThere, Here
from agent.transfer.processes.spawn import Spawned, fork_into, usable_processors
from agent.transfer.rehearsal import rehearse
from agent.transfer.settling.small_files import raise_descriptor_limit
from agent.transfer.source.serve import JOIN_PATIENCE, SourceSide, serve_lane
from agent.transfer.source.source_policy import SourcePolicy
from agent.transfer.task_runner import TaskRunner
from protocol.congestion import tune_sender
from protocol.control import FINAL_STATES
from protocol.errors import NeedsPerson, ProtocolError, TowpathError
from protocol.identity import NodeKey, fingerprint_of_certificate_untrusted
from protocol.session import ALPN_CONTROL_AHEAD, ALPN_LANE, ALPNS_CONTROL, Failed, encode
from protocol.threads import NoThread, wait_for_threads
from protocol.ticket import Grant, TicketVerifier

_logger = logging.getLogger("towpath.worker")

# A source's worker without connections ends after this many seconds.
IDLE = 60.0


def identity_of(common: Common) -> NodeKey:
    """The node key as it came over the channel."""
    return NodeKey.from_pem(common.node_key)


def _collection(common: Common, collection_id: str) -> WorkerCollection:
    return next(row for row in common.collections if row.id == collection_id)


def _root_of(common: Common, collection: WorkerCollection) -> Root:
    """The collection's root as others see it. Raises `NeedsPerson`."""
    root = open_guarded(collection.root, collection.mark, collection.disks, own=common.own_places)
    return offered(root, hidden=collection.hidden)


def _narrowed(root: Root, grant: Grant) -> Root:
    """The root as far as symlinks may lead in it by a ticket; takes the place of the one given."""
    folders = grant.folders()
    if folders is None:
        return root
    with root:
        return root.narrowed(Reach(folders))


async def _run_task(channel: Channel, start: RunTask, forked: Sequence[Child]) -> None:
    mask = os.umask(0)
    os.umask(mask)
    line = DaemonLine(channel, start, identity_of(start.common), forked)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(line.run)
        collection = _collection(start.common, start.order.destination.collection_id)
        verifier = TicketVerifier(start.common.relay_id, start.common.relay_root)

        def reached_root() -> Root:
            root = _root_of(start.common, collection)
            return _narrowed(root, verifier.at_any_time_untrusted(line.ticket).destination)

        runner = TaskRunner(start, line, 0o777 & ~mask, reached_root, numbers=collection.numbered_accounts)
        wait_for_threads(runner.short_of_threads)
        observed = await runner.run()
        final = observed.state in FINAL_STATES
        await line.finish(Finished(observed=observed) if final else Checkpointed(observed=observed))
        nursery.cancel_scope.cancel()


class _SourceWorker:
    """Takes incoming connections of one session from the daemon and serves them."""

    def __init__(self, channel: Channel, start: ServeSession) -> None:
        self._channel = channel
        self._start = start
        self._identity = identity_of(start.common)
        self._peer = fingerprint_of_certificate_untrusted(start.peer_certificate)
        verifier = TicketVerifier(start.common.relay_id, start.common.relay_root)
        ticket = verifier.verify_untrusted(start.ticket, time.time())
        collection_id = ticket.source.collection_id if ticket.source else ""
        collection = _collection(start.common, collection_id)
        policy = SourcePolicy(
            session_id=start.session_id,
            task_id=start.task_id,
            node_id=start.common.node_id,
            fingerprint=self._identity.fingerprint,
            collection_id=collection_id,
            ordered=ticket,
        )
        self._collection = collection
        self._policy, self._verifier = policy, verifier
        self._side: SourceSide | None = None
        # Not set before a control stream was secured: a lane that comes so early waits for it.
        self._introduced = trio.Event()
        self._moving = Moving(start.rate, start.cpu)
        self._connections = 0
        self._last = trio.current_time()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_when_idle, nursery.cancel_scope)
            nursery.start_soon(self._moving.tell, self._channel)
            while True:
                message, descriptors = await self._channel.receive()
                if isinstance(message, Allowed):
                    self._moving.pace.set_rate(message.rate)
                    self._moving.cpu = message.cpu
                elif isinstance(message, AreYouThere):
                    await self._channel.send(Here())
                elif isinstance(message, Incoming):
                    sock = socket.socket(fileno=descriptors[0])
                    nursery.start_soon(self._connection, message.kind, sock)

    async def _end_when_idle(self, scope: trio.CancelScope) -> None:
        while True:
            await trio.sleep(IDLE / 4)
            if not self._connections and trio.current_time() - self._last > IDLE:
                scope.cancel()

    async def _connection(self, kind: str, sock: socket.socket) -> None:
        self._connections += 1
        try:
            send_at_once(sock)
            if kind == "lane":
                await self._lane(sock)
            else:
                await self._control(sock)
        except* (TowpathError, OSError, trio.BrokenResourceError, trio.TooSlowError) as group:
            # One connection's trouble, whatever a peer sent, must not end the others of the session.
            error = group.exceptions[0]
            _logger.info("A connection of session %s ended: %r", self._start.session_id, error)
        finally:
            self._connections -= 1
            self._last = trio.current_time()
            sock.close()

    async def _control(self, sock: socket.socket) -> None:
        introduced = trio.Event()
        if self._side is None:
            self._introduced = introduced
        try:
            stream = await self._secure_control(sock)
            side = self._side = await self._side_for(stream)
        finally:
            introduced.set()
        ahead = stream.selected_alpn_protocol() == ALPN_CONTROL_AHEAD
        await side.serve_control(stream, self._peer, ahead=ahead)

    async def _secure_control(self, sock: socket.socket) -> trio.SSLStream[trio.SocketStream]:
        sock.setblocking(False)
        stream = trio.SSLStream(
            trio.SocketStream(trio.socket.from_stdlib_socket(sock)),
            session_context(self._identity, self._start.peer_certificate, server_side=True, alpn=ALPNS_CONTROL),
            server_side=True,
            https_compatible=True,
        )
        with trio.fail_after(HANDSHAKE_TIMEOUT):
            await stream.do_handshake()
        check_peer(stream.getpeercert(binary_form=True), self._peer)
        return stream

    async def _side_for(self, stream: trio.SSLStream[trio.SocketStream]) -> SourceSide:
        try:
            return await trio.to_thread.run_sync(self._present_side)
        except NeedsPerson as error:
            # A disk that is not mounted is not an empty folder: the destination waits, and says why.
            error.who = "source owner"
            await stream.send_all(encode(Failed(0, error.to_document())))
            await trio.aclose_forcefully(stream)
            raise

    def _present_side(self) -> SourceSide:
        """The side with a root that is known to be there now; one that went away and came back is opened again."""
        if self._side is not None:
            try:
                self._side.root.check_present()
            except NeedsPerson:
                # Lanes may still read from what was opened; the next look, here, opens what is there now.
                self._side = None
            else:
                return self._side
        collection = self._collection
        root = _root_of(self._start.common, collection)
        return SourceSide(root, self._policy, self._verifier, self._moving.pace, read_twice=collection.read_twice)

    async def _lane(self, sock: socket.socket) -> None:
        duplicate = socket.socket(fileno=os.dup(sock.fileno()))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_shut_down_when_cancelled, duplicate)
                secured = await trio.to_thread.run_sync(self._secure, sock)
                with contextlib.closing(secured[0]):
                    with trio.move_on_after(JOIN_PATIENCE):
                        await self._introduced.wait()
                    if self._side is None:
                        raise ProtocolError("A lane came before its control stream.")
                    await trio.to_thread.run_sync(serve_lane, self._side, sock, lambda _sock: secured)
                nursery.cancel_scope.cancel()
        except* (TowpathError, OSError) as group:
            # As every lane does whose destination has what it wanted.
            _logger.debug("A lane of session %s ended: %s", self._start.session_id, group.exceptions[0])
        finally:
            duplicate.close()

    def _secure(self, sock: socket.socket) -> tuple[SecuredLane, str]:
        secured = secure_lane(sock, self._identity, self._start.peer_certificate, server_name=None, alpn=ALPN_LANE)
        # After the handshake, when the round-trip time is known.
        tune_sender(secured)
        return secured, self._peer


async def _shut_down_when_cancelled(sock: socket.socket) -> None:
    try:
        await trio.sleep_forever()
    finally:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


async def _main(channel: Channel, start: Any, forked: Sequence[Child]) -> None:
    try:
        if isinstance(start, RunTask):
            await _run_task(channel, start, forked)
        elif isinstance(start, ServeSession):
            await _SourceWorker(channel, start).run()
    except* ChannelClosed:
        # The session is over; or the daemon is gone, and its successor starts a worker of its own.
        _logger.debug("The agent has closed its channel; this worker ends.")


def main() -> None:
    """Entry point of the process."""
    _work(int(sys.argv[1]), int(sys.argv[2]))


def _work(descriptor: int, processes: int, *, rehearsed: bool = False) -> None:
    # Ctrl-C at a terminal reaches the whole group; the daemon decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise_descriptor_limit()
    channel = Channel(socket.socket(fileno=descriptor), ToWorker)
    if not rehearsed and channel.is_waiting():
        # Nothing is wanted yet.
        with contextlib.suppress(NoThread):
            rehearse()
    # What is loaded by now stays, and what comes are many small objects in few cycles: seldom is often enough.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()
    forked: Sequence[Child] = ()
    try:
        start, _ = channel.receive_first()
        if isinstance(start, RunTask):
            # Now, while there is one thread; and not before, as one that waits would keep them for nothing.
            count = lane_processes(processes, start.order, usable_processors())
            forked = fork_lane_processes(count, close=descriptor)
        log_to_standard_error(start.common.log_form, start.common.log_level)
        wait_for_threads()
        trio.run(_main, channel, start, forked)
    except ChannelClosed:
        # It waited as a spare and was never needed.
        return
    finally:
        channel.close()
        # Not left to whoever inherits them.
        dismiss(forked)


def fork_worker(processes: int, let_go: Callable[[], None]) -> Spawned:
    """A worker made of this process, which has loaded what it needs already; to be called where `FORKS` says so, before
    there is another thread or an event loop. ``let_go`` is called in the worker and closes what is this process's.
    Raises OSError."""
    return Spawned(*fork_into(partial(_become_worker, processes), let_go))


def _become_worker(processes: int, sock: socket.socket) -> None:
    """In a process that was forked from the daemon: leave behind what was the daemon's, and work."""
    leave_behind()
    work_as_forked(processes, sock)


def leave_behind() -> None:
    """In a process that was forked from the daemon: let go of its log and its standard input."""
    for handler in logging.root.handlers[:]:
        # Two processes would turn one log over. What is said on standard error comes there all the same.
        logging.root.removeHandler(handler)
        handler.close()
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)


def work_as_forked(processes: int, sock: socket.socket, *, rehearsed: bool = False) -> None:
    """Be the worker at this end of a channel; returns when that ends."""
    rename_process(["python", "-m", "agent.transfer.worker", str(sock.fileno()), str(processes)])
    _work(sock.detach(), processes, rehearsed=rehearsed)


if __name__ == "__main__":
    main()
