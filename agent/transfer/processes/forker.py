"""The daemon's side of its fork server: it is asked for workers, looked after, and started anew when it is gone."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
import trio

from agent.system.conditions import changed, conditions
from agent.system.process_descriptor import collect, has_ended, kill_process
from agent.system.processes import in_words
from agent.transfer.processes.fork_messages import MOST, Ended, Fork, FromServer, Made, Refused, answer, packet
from agent.transfer.processes.message_buffer import attached, rights, room
from agent.transfer.processes.spawn import Spawned, spawn_fork_server

# A fork server that has not answered after this long (seconds) is ended.
ANSWERS_WITHIN = 10.0
# The same for one that has not loaded and prepared everything.
PREPARED_WITHIN = 60.0
# How long (seconds) to wait for word of how a worker has ended.
TOLD_WITHIN = 0.5
# A fork server that nobody needed for so long (seconds), and none of whose workers is left, gives its memory back.
NEEDED_WITHIN = 900.0
# How long (seconds) after one was taken the next worker is forked, which takes some milliseconds of a processor.
AHEAD_AFTER = 0.1
# How long (seconds) before another follows one that died: longer each time, until one has lived for a while.
FIRST_REST, LONGEST_REST, LIVED_LONG = 2.0, 120.0, 60.0

_logger = logging.getLogger("towpath.tasks")


class ForkedThere:
    """A worker that a fork server has forked. One caller waits, and then closes."""

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid = pid
        # None while it runs, and where nobody could tell.
        self.returncode: int | None = None
        self.told = trio.Event()
        self._descriptor = descriptor

    def has_ended(self) -> bool:
        """Whether it is no more."""
        return has_ended(self._descriptor)

    async def wait(self) -> None:
        """Wait for its end, and a moment for how that was."""
        await trio.lowlevel.wait_readable(self._descriptor)
        with trio.move_on_after(TOLD_WITHIN):
            await self.told.wait()
        if self.returncode is None:
            self.returncode = collect(self._descriptor)

    def kill(self) -> None:
        """End it now; nothing happens when it has ended, or was let go of."""
        if self._descriptor >= 0:
            kill_process(self._descriptor)

    def close(self) -> None:
        """Let go of it."""
        # Another file may get the number, while somebody is about to kill by it.
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)


class _Answer:
    def __init__(self) -> None:
        self.come = trio.Event()
        self.worker: ForkedThere | None = None
        self.errno = errno.EPIPE


class ForkServerLink:
    """One fork server. `run` listens to it until it is over; the other methods are called in the same trio thread."""

    def __init__(self, spawned: Spawned, *, loaded: bool) -> None:
        # It forks at once; and it has done already what each worker does once.
        self.loaded, self.prepared = loaded, trio.Event()
        self.over = trio.Event()
        # No more workers come from here, though some of it may still run.
        self.leaving = trio.Event()
        self.began = self._last_used = trio.current_time()
        self.conditions = conditions()
        self.process = spawned.process
        self._socket = trio.socket.from_stdlib_socket(spawned.sock)
        self._numbers = itertools.count(1)
        self._answers: dict[int, _Answer] = {}
        self._workers: dict[int, ForkedThere] = {}
        self._listening = trio.CancelScope()

    def unused(self, waiting: ForkedThere | None) -> float:
        """For how long (seconds) none of its workers has been there, but one that waits, and none asked for."""
        if not self.prepared.is_set() or any(worker is not waiting for worker in self._workers.values()):
            return 0.0
        return trio.current_time() - self._last_used

    async def run(self) -> None:
        """Listen until it is gone, or retired and without workers, or this is cancelled; it is ended then. Its workers
        go on."""
        try:
            with self._listening:
                await self._listen()
            died = not self.leaving.is_set()
        finally:
            with trio.CancelScope(shield=True):
                await self._end()
        if died:
            _logger.warning(
                "The process that forks workers has ended (%s). Its workers go on; another one is started.",
                in_words(self.process.returncode),
            )

    async def _listen(self) -> None:
        while True:
            try:
                data, ancillary, _, _ = await self._socket.recvmsg(MOST, room())
            except OSError:
                # As when it was killed with something unread.
                return
            if not data:
                return
            descriptors = attached(ancillary)
            try:
                message = answer(data)
            except msgspec.DecodeError:
                # It is of another version: the program was replaced on disk meanwhile.
                for descriptor in descriptors:
                    os.close(descriptor)
                return
            self._take(message, descriptors)
            self._leave_if_idle()

    async def _end(self) -> None:
        self.over.set()
        self.leaving.set()
        self._socket.close()
        for waiting in self._answers.values():
            waiting.come.set()
        for worker in self._workers.values():
            worker.told.set()
        self._workers.clear()
        # It holds nothing that could be lost.
        self.process.kill()
        # With a limiter of its own: whoever waits here takes no thread from others.
        await trio.to_thread.run_sync(self.process.wait, limiter=trio.CapacityLimiter(1))

    def _take(self, message: FromServer, descriptors: list[int]) -> None:
        if isinstance(message, Made):
            self._take_worker(message, descriptors)
        elif isinstance(message, Refused):
            waiting = self._answers.get(message.worker)
            if waiting is not None:
                waiting.errno = message.errno
                waiting.come.set()
        elif isinstance(message, Ended):
            worker = self._workers.pop(message.worker, None)
            if worker is not None:
                worker.returncode = message.code
                worker.told.set()
            self._last_used = trio.current_time()
        else:
            self.loaded = True
            self.prepared.set()
            self._last_used = trio.current_time()

    def _take_worker(self, message: Made, descriptors: list[int]) -> None:
        waiting = self._answers.get(message.worker)
        if waiting is None or not descriptors:
            # Nobody wants it any more, or this process may open no more files: it ends when its channel is closed.
            for descriptor in descriptors:
                os.close(descriptor)
            if waiting is not None:
                waiting.errno = errno.EMFILE
                waiting.come.set()
            return
        waiting.worker = self._workers[message.worker] = ForkedThere(message.pid, descriptors[0])
        waiting.come.set()

    async def fork(self) -> tuple[ForkedThere, socket.socket]:
        """A worker, and the daemon's end of its channel. Raises OSError where there is none to be had, or no fork
        server any more."""
        self._last_used = trio.current_time()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        number = next(self._numbers)
        waiting = self._answers[number] = _Answer()
        try:
            with theirs, trio.move_on_after(ANSWERS_WITHIN) as patience:
                if not self.over.is_set():
                    await self._socket.sendmsg([packet(Fork(worker=number))], rights([theirs.fileno()]))
                    theirs.close()
                    await waiting.come.wait()
            if patience.cancelled_caught:
                # Stopped, or hanging.
                self.process.kill()
            if waiting.worker is None:
                raise OSError(waiting.errno, os.strerror(waiting.errno))
        except BaseException:
            ours.close()
            if waiting.worker is not None:
                waiting.worker.close()
            raise
        finally:
            del self._answers[number]
            self._leave_if_idle()
        return waiting.worker, ours

    def retire(self) -> None:
        """Let it go as soon as none of its workers is left."""
        self.leaving.set()
        self._leave_if_idle()

    def _leave_if_idle(self) -> None:
        if self.leaving.is_set() and not self._workers and not self._answers:
            self._listening.cancel()


@dataclass(frozen=True)
class _Ahead:
    process: ForkedThere
    sock: socket.socket
    conditions: tuple[bytes, ...]


class Forker:
    """Keeps a fork server, and one worker that it has forked already. ``resting`` waits until no worker computes, for a
    while at most, since starting a fork server takes nearly half a second of a processor."""

    def __init__(self, processes: int, resting: Callable[[], Awaitable[None]]) -> None:
        self._processes = processes
        self._resting = resting
        self._first: Spawned | None = None
        self._server: ForkServerLink | None = None
        self._ahead: _Ahead | None = None
        self._needed = trio.Event()
        # A worker was wanted while there was no fork server.
        self._missed = trio.Event()

    @property
    def ready(self) -> bool:
        """Whether a worker waits."""
        return self._ahead is not None

    def adopt(self, spawned: Spawned) -> None:
        """Use one that was forked from the daemon before there was this."""
        self._first = spawned

    async def run(self) -> None:
        """Keep a fork server until cancelled."""
        rest = FIRST_REST
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    # One that was forked from the daemon has loaded everything.
                    loaded = self._first is not None
                    spawned, self._first = self._first or await self._start(rest), None
                    server = self._server = ForkServerLink(spawned, loaded=loaded)
                    self._missed = trio.Event()
                    nursery.start_soon(server.run)
                    async with trio.open_nursery() as beside:
                        beside.start_soon(self._fork_ahead, server)
                        await self._watch(server)
                        beside.cancel_scope.cancel()
                    lived = trio.current_time() - server.began
                    rest = FIRST_REST if lived > LIVED_LONG else min(rest * 2, LONGEST_REST)
        finally:
            with trio.CancelScope(shield=True):
                await self._dismiss()

    async def _start(self, rest: float) -> Spawned:
        while True:
            await trio.sleep(rest)
            await self._quiet_or_missed()
            # There may be a process to be had later; meanwhile every task starts a worker of its own.
            with contextlib.suppress(OSError):
                return await trio.to_thread.run_sync(spawn_fork_server, self._processes)

    async def _quiet_or_missed(self) -> None:
        """Wait until no worker computes, or one has to be started by itself, which takes as long as a fork server."""
        async with trio.open_nursery() as nursery:

            async def rest() -> None:
                await self._resting()
                nursery.cancel_scope.cancel()

            nursery.start_soon(rest)
            await self._missed.wait()
            nursery.cancel_scope.cancel()

    async def _watch(self, server: ForkServerLink) -> None:
        """Wait until a fork server is to be followed by another."""
        while not server.leaving.is_set():
            waiting = self._ahead.process if self._ahead is not None else None
            with trio.move_on_after(max(1.0, NEEDED_WITHIN - server.unused(waiting))):
                await server.leaving.wait()
            if server.unused(waiting) >= NEEDED_WITHIN:
                server.retire()
                await self._dismiss()
                await self._needed.wait()

    async def _fork_ahead(self, server: ForkServerLink) -> None:
        """Have one worker wait, and another one when that was taken."""
        with trio.move_on_after(PREPARED_WITHIN):
            await server.prepared.wait()
        if not server.prepared.is_set():
            server.process.kill()
            return
        while not server.leaving.is_set():
            if self._ahead is None:
                # What cannot be had now is tried again when one is needed.
                with contextlib.suppress(OSError):
                    self._ahead = _Ahead(*await server.fork(), server.conditions)
            self._needed = trio.Event()
            await self._needed.wait()
            await trio.sleep(AHEAD_AFTER)

    async def _dismiss(self) -> None:
        """End the worker that waits."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.sock.close()
            # It has nothing to settle.
            ahead.process.kill()
            with trio.CancelScope(shield=True):
                await ahead.process.wait()
            ahead.process.close()

    async def take(self) -> tuple[ForkedThere, socket.socket] | None:
        """A new worker; None where there is no fork server, or it has none to give: one is started then."""
        self._needed.set()
        ahead, server = self._ahead, self._server
        now = conditions()
        if ahead is not None:
            if not changed(ahead.conditions, now) and not ahead.process.has_ended():
                self._ahead = None
                return ahead.process, ahead.sock
            await self._dismiss()
        if server is None or not server.loaded or server.leaving.is_set():
            self._missed.set()
            return None
        if changed(server.conditions, now):
            # Its workers are to have what the daemon has now.
            server.retire()
            return None
        with contextlib.suppress(OSError):
            return await server.fork()
        return None
