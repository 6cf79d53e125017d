"""The process that forks workers: what it gives them and keeps from them, and what happens when any of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest
import trio
import trio.testing

from agent.system.conditions import changed, conditions
from agent.system.processes import in_words
from agent.transfer.processes import forker, worker_process
from agent.transfer.processes.channel import ChannelClosed, EventStored
from agent.transfer.processes.spawn import FORK_SERVER
from agent.transfer.processes.worker_process import Workers

pytestmark = pytest.mark.skipif(not FORK_SERVER, reason="this system has no descriptors of processes")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forker, "FIRST_REST", 0.01)
    monkeypatch.setattr(forker, "AHEAD_AFTER", 0.01)
    monkeypatch.setattr(worker_process, "LOOK", 0.01)


# --- the fork server, asked by hand, in processes of their own: this one has threads ---------------------------------

PRELUDE = """
import contextlib, errno, os, random, signal, socket, ssl, sys, tempfile, time, uuid
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from agent.transfer import fork_server
from agent.transfer.processes.fork_messages import MOST, Ended, Fork, Made, Ready, Refused, answer, packet
from agent.transfer.processes.message_buffer import attached, rights, room
from agent.transfer.processes.spawn import fork_into

def served(work, change=lambda: None):
    def serve(sock):
        change()
        fork_server.ForkServer(sock, work, fork_server._prepare).run()
    return fork_into(serve, lambda: None, socket.SOCK_SEQPACKET)

def ask(sock, worker):
    ours, theirs = socket.socketpair()
    with theirs:
        sock.sendmsg([packet(Fork(worker=worker))], rights([theirs.fileno()]))
    return ours

def next_message(sock):
    data, ancillary, _, _ = sock.recvmsg(MOST, room())
    return answer(data), attached(ancillary)

def hear(sock):
    # It may prepare itself before what it is asked first, or after.
    while (heard := next_message(sock)) == (Ready(), []):
        pass
    return heard
"""

UNLIKE = """
def tell(sock):
    drawn = [
        os.urandom(8).hex(), random.random(), ssl.RAND_bytes(8).hex(), str(uuid.uuid4()),
        Ed25519PrivateKey.generate().private_bytes_raw().hex(), next(tempfile._get_candidate_names()),
    ]
    with sock:
        sock.sendall(repr(drawn).encode())

server, sock = served(tell)
assert next_message(sock) == (Ready(), [])
# The server's own generators have been used, so that a worker which inherited their state would show it.
told = [eval(ask(sock, number).makefile().read()) for number in range(3)]
assert all(len(set(values)) == 3 for values in zip(*told, strict=True)), told
"""

HELD = """
def list_held(sock):
    held = set()
    for fd in os.listdir("/proc/self/fd"):
        # One was that of the folder itself.
        with contextlib.suppress(FileNotFoundError):
            held.add(os.readlink(f"/proc/self/fd/{fd}"))
    with sock:
        sock.sendall(repr((os.getppid(), os.listdir("/proc/self/task"), held)).encode())
        sock.recv(1)

server, sock = served(list_held)
first, second = ask(sock, 1), ask(sock, 2)
parent, threads, held = eval(first.recv(10000))
assert parent == server.pid
assert len(threads) == 1
sockets = {one for one in held if one.startswith("socket")}
assert len(sockets) == 1, held
assert not any("pidfd" in one for one in held), held
parent, threads, more = eval(second.recv(10000))
sockets = {one for one in more if one.startswith("socket")}
assert len(sockets) == 1, more
assert not any("pidfd" in one for one in more), more
heard = [hear(sock) for _ in range(2)]
assert {type(message) for message, _ in heard} == {Made}, heard
pids = {message.worker: message.pid for message, _ in heard}
assert [len(descriptors) for _, descriptors in heard] == [1, 1]
# An end of the first channel is nowhere else, so the worker ends by it, and it alone.
first.close()
assert hear(sock)[0] == Ended(worker=1, code=0)
os.kill(pids[2], signal.SIGKILL)
assert hear(sock)[0] == Ended(worker=2, code=-9)
# Both were collected.
assert not os.path.exists(f"/proc/{pids[1]}") and not os.path.exists(f"/proc/{pids[2]}")
sock.close()
assert server.wait() == 0
"""

SHORT = """
def no_process():
    def refuse(*_):
        raise BlockingIOError(errno.EAGAIN, "none")
    fork_server.fork_with = refuse

def no_descriptor():
    def refuse(pid):
        raise OSError(errno.EMFILE, "none")
    fork_server.open_process = refuse

for change, number in ((no_process, errno.EAGAIN), (no_descriptor, errno.EMFILE)):
    server, sock = served(lambda sock: sock.recv(1), change)
    ours = ask(sock, 7)
    assert hear(sock) == (Refused(worker=7, errno=number), [])
    # Nobody holds the other end: what was forked in vain is gone.
    assert ours.recv(1) == b""
    sock.sendmsg([packet(Fork(worker=8))])
    assert hear(sock) == (Refused(worker=8, errno=errno.EMFILE), [])
    sock.close()
    assert server.wait() == 0
"""


@pytest.mark.parametrize("script", [UNLIKE, HELD, SHORT], ids=["unlike", "held", "short"])
def test_what_a_fork_server_gives(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", PRELUDE + script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


# --- with its daemon, for real ----------------------------------------------------------------------------------------


async def ready(workers: Workers) -> psutil.Process:
    """The fork server, when a worker waits."""
    with trio.fail_after(20):
        while not workers.ready:
            await trio.sleep(0.005)
    assert workers._forker is not None
    assert workers._forker._server is not None
    return psutil.Process(workers._forker._server.process.pid)


async def futile(workers: Workers) -> int:
    """A message that is no start makes a worker end: enough to see whom it reached. The id of the worker."""
    async with workers.worker(EventStored(seq=1)) as channel:
        pid = workers._at_work[-1].process.pid
        with pytest.raises(ChannelClosed):
            await channel.receive()
    return pid


async def killed_at_work(workers: Workers) -> int | None:
    """How a worker ended that was killed before it was told anything."""
    one = await workers._take()
    assert one is not None
    os.kill(one.process.pid, signal.SIGKILL)
    await worker_process._end(one)
    return one.channel.ended


async def test_deaths_of_workers_and_fork_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(spare=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.run)
        server = await ready(workers)
        # The one that waits is taken, and another one waits.
        (waiting,) = [child.pid for child in server.children()]
        assert await futile(workers) == waiting
        await ready(workers)
        (waiting,) = [child.pid for child in server.children() if child.status() != psutil.STATUS_ZOMBIE]
        # One that dies while it waits is not used.
        os.kill(waiting, signal.SIGKILL)
        with trio.fail_after(10):
            while psutil.pid_exists(waiting):
                await trio.sleep(0.005)
        assert await futile(workers) != waiting
        await ready(workers)
        # How one ends is known, also of one that is killed at work.
        assert await killed_at_work(workers) == -9
        await ready(workers)
        # One that waits does not die with the fork server, and serves.
        (waiting,) = [child.pid for child in server.children() if child.status() != psutil.STATUS_ZOMBIE]
        server.kill()
        with trio.fail_after(10):
            while psutil.pid_exists(server.pid):
                await trio.sleep(0.005)
        assert await futile(workers) == waiting
        # Who needs one meanwhile starts it.
        assert workers._forker is not None
        assert await workers._forker.take() is None
        await futile(workers)
        second = await ready(workers)
        assert second.pid != server.pid
        nursery.cancel_scope.cancel()
    assert not psutil.pid_exists(second.pid)


# A program with workers of its own: what it does when one waits is `then`.
WITH_WORKERS = """
import os, resource, trio
from agent.transfer.processes import forker
from agent.transfer.processes.worker_process import Workers
forker.FIRST_REST = 0.01

async def one_waits(workers):
    while not workers.ready:
        await trio.sleep(0.01)

async def main():
    workers = Workers(spare=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.run)
        await one_waits(workers)
        await then(workers)
        nursery.cancel_scope.cancel()
"""

DAEMON = """
async def then(workers):
    taken = await workers._forker.take()
    await one_waits(workers)
    print(workers._forker._server.process.pid, taken[0].pid, workers._forker._ahead.process.pid, flush=True)
    await trio.sleep_forever()

trio.run(main)
"""


def test_a_daemon_that_is_killed_takes_them_all_along() -> None:
    with subprocess.Popen([sys.executable, "-c", WITH_WORKERS + DAEMON], stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        below = [psutil.Process(int(word)) for word in daemon.stdout.readline().split()]
        assert [process.is_running() for process in below] == [True] * 3
        daemon.kill()
    gone, alive = psutil.wait_procs(below, timeout=10)
    assert not alive, alive
    assert len(gone) == 3


async def test_workers_have_the_conditions_that_the_daemon_has_now(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [(b"before",)]
    monkeypatch.setattr(forker, "conditions", lambda: now[0])
    workers = Workers(spare=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.run)
        first = await ready(workers)
        now[0] = (b"after",)
        plain = await futile(workers)
        assert not psutil.pid_exists(plain)
        second = await ready(workers)
        assert second.pid != first.pid
        with trio.fail_after(10):
            while psutil.pid_exists(first.pid):
                await trio.sleep(0.005)
        nursery.cancel_scope.cancel()


NO_MORE_FILES = """
async def then(workers):
    waiting, opened = workers._forker._ahead.process, []
    try:
        while True:
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        taken = await workers._forker.take()
    for descriptor in opened:
        os.close(descriptor)
    assert taken is not None and taken[0] is waiting, taken
    assert not workers._forker._server.leaving.is_set()
    taken[1].close()

resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
trio.run(main)
"""


def test_the_worker_that_waits_serves_while_no_more_files_can_be_opened() -> None:
    """The system tells no conditions then; both it and the fork server were thrown away."""
    done = subprocess.run(
        [sys.executable, "-c", WITH_WORKERS + NO_MORE_FILES], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_conditions_are_those_that_somebody_may_change() -> None:
    resource = pytest.importorskip("resource")
    before = conditions()
    assert not changed(before, conditions())
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard == 0:
        pytest.skip("no limit here can be changed and put back")
    resource.setrlimit(resource.RLIMIT_CORE, (0 if soft else 1, hard))
    try:
        assert changed(before, conditions())
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    assert not changed(before, conditions())


@pytest.mark.soak
async def test_a_fork_server_that_nobody_needs_ends_until_work_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forker, "NEEDED_WITHIN", 1.0)
    workers = Workers(spare=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.run)
        first = await ready(workers)
        with trio.fail_after(20):
            while psutil.pid_exists(first.pid) or workers.ready:
                await trio.sleep(0.01)
        monkeypatch.setattr(forker, "NEEDED_WITHIN", 900.0)
        await futile(workers)
        assert (await ready(workers)).pid != first.pid
        nursery.cancel_scope.cancel()


def test_ends_are_told_in_words() -> None:
    assert [in_words(code) for code in (-9, -11, 3, 0, -200, None)] == [
        "SIGKILL",
        "SIGSEGV",
        "exit status 3",
        "exit status 0",
        "signal 200",
        "how is not known",
    ]
