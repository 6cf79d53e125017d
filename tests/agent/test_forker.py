"""The daemon's side of its fork server, which the test plays: refusals, silence, deaths and requests given up."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil
import pytest
import trio
import trio.testing

from agent.transfer.processes import forker
from agent.transfer.processes.fork_messages import MOST, Ended, FromServer, Made, Refused, packet, request
from agent.transfer.processes.forker import ForkedThere, Forker, ForkServerLink
from agent.transfer.processes.message_buffer import attached, rights, room
from agent.transfer.processes.spawn import FORK_SERVER, Spawned

pytestmark = pytest.mark.skipif(not FORK_SERVER, reason="this system has no descriptors of processes")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forker, "FIRST_REST", 0.01)
    monkeypatch.setattr(forker, "AHEAD_AFTER", 0.01)


class PlayedProcess:
    """As much of a process as the daemon's side needs."""

    pid = 1
    returncode: int | None = None

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def kill(self) -> None:
        if self.returncode is None:
            self.returncode = -9
            self._socket.close()

    def wait(self) -> int | None:
        return self.returncode

    def poll(self) -> int | None:
        return self.returncode


class Played:
    """A fork server in this process."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = PlayedProcess(theirs)
        self.link = ForkServerLink(Spawned(self.process, ours), loaded=True)  # type: ignore[arg-type]
        self._socket = theirs

    async def heard(self) -> tuple[int, int]:
        """The next request, and the channel's end that came with it."""
        await trio.lowlevel.wait_readable(self._socket)
        data, ancillary, _, _ = self._socket.recvmsg(MOST, room())
        return request(data).worker, attached(ancillary)[0]

    def say(self, message: FromServer, *descriptors: int) -> None:
        self._socket.sendmsg([packet(message)], rights(descriptors) if descriptors else [])


@asynccontextmanager
async def played() -> AsyncIterator[Played]:
    async with trio.open_nursery() as nursery:
        server = Played()
        nursery.start_soon(server.link.run)
        yield server
        nursery.cancel_scope.cancel()
    assert server.process.returncode == -9


async def refusal(link: ForkServerLink) -> int | None:
    with pytest.raises(OSError) as caught:
        await link.fork()
    return caught.value.errno


async def test_what_the_system_refuses_is_said_as_it_is() -> None:
    async with played() as server, trio.open_nursery() as nursery:

        async def refuse() -> None:
            worker, end = await server.heard()
            os.close(end)
            server.say(Refused(worker=worker, errno=errno.EAGAIN))

        nursery.start_soon(refuse)
        assert await refusal(server.link) == errno.EAGAIN


async def test_a_worker_whose_descriptor_could_not_be_received_is_let_go() -> None:
    """As the system does it where this process may open no more files."""
    async with played() as server, trio.open_nursery() as nursery:

        async def make() -> None:
            worker, end = await server.heard()
            server.say(Made(worker=worker, pid=os.getpid()))
            with socket.socket(fileno=end) as channel:
                await trio.lowlevel.wait_readable(channel)
                assert channel.recv(1) == b""

        nursery.start_soon(make)
        assert await refusal(server.link) == errno.EMFILE


async def test_a_fork_server_that_does_not_answer_is_ended(autojump_clock: trio.testing.MockClock) -> None:
    async with played() as server:
        assert await refusal(server.link) == errno.EPIPE
        assert trio.current_time() >= forker.ANSWERS_WITHIN
        assert server.process.returncode == -9
        await server.link.over.wait()
        # And is not asked again.
        assert await refusal(server.link) == errno.EPIPE


async def test_who_waits_for_a_fork_server_that_dies_hears_of_it() -> None:
    async with played() as server, trio.open_nursery() as nursery:

        async def die() -> None:
            _, end = await server.heard()
            os.close(end)
            server.process.kill()

        nursery.start_soon(die)
        assert await refusal(server.link) == errno.EPIPE


async def test_nothing_is_left_of_a_request_that_was_given_up() -> None:
    async with played() as server:
        with trio.move_on_after(0.05) as scope:
            await server.link.fork()
        assert scope.cancelled_caught
        worker, end = await server.heard()
        descriptor = os.pidfd_open(os.getpid())
        server.say(Made(worker=worker, pid=os.getpid()), descriptor)
        server.say(Ended(worker=worker, code=0))
        before = psutil.Process().num_fds()
        with socket.socket(fileno=end) as channel:
            await trio.lowlevel.wait_readable(channel)
            assert channel.recv(1) == b""
        os.close(descriptor)
        await trio.testing.wait_all_tasks_blocked()
        # What came was closed, too.
        assert psutil.Process().num_fds() == before - 2


async def test_one_that_leaves_does_so_with_its_last_worker() -> None:
    async with played() as server, trio.open_nursery() as nursery:
        child = subprocess.Popen(["true"])

        async def make() -> None:
            worker, end = await server.heard()
            os.close(end)
            descriptor = os.pidfd_open(child.pid)
            server.say(Made(worker=worker, pid=child.pid), descriptor)
            os.close(descriptor)

        nursery.start_soon(make)
        worker, sock = await server.link.fork()
        sock.close()
        server.link.retire()
        await trio.testing.wait_all_tasks_blocked()
        assert not server.link.over.is_set()
        server.say(Ended(worker=1, code=3))
        await worker.wait()
        assert worker.returncode == 3
        worker.close()
        await server.link.over.wait()
        child.wait()


async def test_one_that_leaves_does_so_when_the_last_request_is_refused() -> None:
    async with played() as server, trio.open_nursery() as nursery:

        async def refuse() -> None:
            worker, end = await server.heard()
            os.close(end)
            server.link.retire()
            server.say(Refused(worker=worker, errno=errno.EAGAIN))

        nursery.start_soon(refuse)
        assert await refusal(server.link) == errno.EAGAIN
        with trio.fail_after(10):
            await server.link.over.wait()


async def test_one_of_another_version_is_ended_and_the_agent_goes_on() -> None:
    """As it is started where the program was replaced on disk under a running agent."""
    async with played() as server:
        server._socket.sendmsg([b"\x81\xa1t\xa5later"], rights([0]))
        before = psutil.Process().num_fds()
        with trio.fail_after(10):
            await server.link.over.wait()
        # It had two ends, and what was attached never stayed.
        assert psutil.Process().num_fds() == before - 2
        assert await refusal(server.link) == errno.EPIPE


def test_a_worker_that_was_let_go_of_is_not_killed_any_more() -> None:
    """Whoever kills it after a while may be about to, when it ends at that very moment."""
    with subprocess.Popen(["sleep", "60"]) as other:
        worker = ForkedThere(other.pid, os.pidfd_open(other.pid))
        number = worker._descriptor
        worker.close()
        # The number of its descriptor is another worker's by now.
        descriptor = os.pidfd_open(other.pid)
        os.dup2(descriptor, number)
        worker.kill()
        other.terminate()
        for each in {descriptor, number}:
            os.close(each)
    assert other.returncode == -signal.SIGTERM


async def test_a_fork_server_that_never_gets_ready_is_ended(autojump_clock: trio.testing.MockClock) -> None:
    async with played() as server:
        with trio.fail_after(forker.PREPARED_WITHIN + 1):
            await Forker(1, trio.sleep_forever)._fork_ahead(server.link)
        assert server.process.returncode == -9


async def test_a_fork_server_follows_at_once_where_workers_have_to_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not only when no worker computes any more: where there is much to do that is never."""
    started = trio.Event()

    def start(processes: int) -> Spawned:
        trio.from_thread.run_sync(started.set)
        raise BlockingIOError(errno.EAGAIN, "none")

    monkeypatch.setattr(forker, "spawn_fork_server", start)
    made = Forker(1, trio.sleep_forever)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.run)
        with trio.move_on_after(0.1):
            await started.wait()
        assert not started.is_set()
        assert await made.take() is None
        with trio.fail_after(10):
            await started.wait()
        nursery.cancel_scope.cancel()


def test_forkers_without_a_server_have_nothing_to_give() -> None:
    async def main() -> None:
        async def resting() -> None: ...

        assert await Forker(1, resting).take() is None

    trio.run(main)
