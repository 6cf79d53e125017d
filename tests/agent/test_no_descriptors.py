"""An agent without descriptors for a while goes on, and does what it could not do when there are some again."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
import trio
import trio.testing

from agent import manners
from agent.config.keys import MannersConfig
from agent.connect.link_connection import LinkConnector
from agent.connect.punch import open_slot, punch
from agent.connect.relay_way import CannotConnect, RelayWay
from agent.link import dial_tcp
from agent.manners import Conditions, Manners, Observer
from agent.sdnotify import Notifier
from agent.transfer.processes.channel import Channel, Connect, ConnectFailed, ToDaemon, ToWorker
from agent.transfer.tasks.running_task import RunningTask
from agent.watch.submitter import CommandSubmitter
from protocol.errors import RetryLater
from tests.agent.dialled_relay import FakeRelay, greet_and_stay, running
from tests.system.test_agent_process import Site, wait_for


def none_left(*_arguments: Any, **_options: Any) -> NoReturn:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="service managers that listen have Unix sockets")
def test_the_service_manager_hears_again_that_the_loop_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(1)
        notifier = Notifier(address, 1.0)
        with monkeypatch.context() as shortage:
            shortage.setattr("agent.sdnotify.socket.socket", none_left)
            notifier.alive()
        notifier.alive()
        assert manager.recv(100) == b"WATCHDOG=1"


async def test_a_punching_port_takes_the_peer_when_there_is_a_descriptor_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slot = open_slot(1, (socket.AF_INET,))
    accept = trio._socket._SocketType.accept
    refusals: list[int] = []

    async def short(self: Any) -> Any:
        await trio.lowlevel.wait_readable(self)
        if len(refusals) < 2:
            refusals.append(1)
            none_left()
        return await accept(self)

    monkeypatch.setattr(trio._socket._SocketType, "accept", short)
    try:
        with trio.fail_after(5), socket.create_connection(("127.0.0.1", slot.port(socket.AF_INET))):
            found = await punch(slot, [], frozenset({"127.0.0.1"}))
            found.sock.close()
    finally:
        slot.close()
    assert len(refusals) == 2


async def test_a_connection_that_cannot_be_handed_over_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended the agent, with all its tasks."""
    near, far = socket.socketpair()
    ours, theirs = socket.socketpair()

    class Paths:
        async def connect(self, *, begins: bool) -> Any:
            from agent.connect.transport import Connection, Path

            return Connection(near, Path(kind="direct")), ""

    task = RunningTask.__new__(RunningTask)
    task._paths = Paths()  # type: ignore[assignment]
    daemon, worker = Channel(ours, ToDaemon), Channel(theirs, ToWorker)
    with far:
        try:
            with monkeypatch.context() as shortage:
                shortage.setattr("agent.transfer.tasks.worker_connections.os.dup", none_left)
                await task._connect(daemon, Connect(request=7, kind="lane"))
            answer, _ = await worker.receive()
            assert isinstance(answer, ConnectFailed)
            assert answer.request == 7
            assert "no room" in str(answer.error)
            # Nothing of it stays open.
            assert far.recv(1) == b""
        finally:
            daemon.close()
            worker.close()


async def test_the_link_is_begun_again(monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> None:
    async with running(FakeRelay(greet_and_stay)) as link:
        monkeypatch.setattr(link._connector, "open", none_left)
        while link.statistics().attempts < 3:
            await trio.sleep(1)
        assert "Too many open files" in link.statistics().last_error


@pytest.mark.parametrize("none", [True, False])
async def test_why_the_relay_cannot_be_reached_is_told(none: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    connector = LinkConnector("127.0.0.1", 9, None, dial_tcp, RelayWay("raw"))
    if none:
        monkeypatch.setattr("trio._highlevel_open_tcp_stream.socket", none_left)
    with pytest.raises(CannotConnect, match="Too many open files" if none else "Connection refused"):
        await connector.open()


async def test_a_watch_rule_submits_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.watch.submitter.trio.run_process", none_left)
    with pytest.raises(RetryLater, match="Too many open files"):
        await CommandSubmitter().look("task")


async def test_what_was_decided_of_this_machine_holds_until_it_can_be_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[Conditions | None] = [Conditions(on_battery=True), None, None, Conditions(on_battery=False)]

    def look(_self: Observer, _config: MannersConfig) -> Conditions:
        found = looks.pop(0) if looks else Conditions(on_battery=False)
        return none_left() if found is None else found

    monkeypatch.setattr(Observer, "look", look)
    monkeypatch.setattr(manners, "LOOK_EVERY", 0.001)
    heard: list[tuple[str, int]] = []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:

            async def apply(reason: str) -> None:
                heard.append((reason, len(looks)))
                if len(heard) == 2:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(Manners(lambda: MannersConfig(on_battery="pause"), apply).run)
    assert [bool(reason) for reason, _ in heard] == [True, False]
    assert heard[1][1] == 0


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="other systems let nobody change the limits of a running process")
def test_a_real_agent_without_descriptors_goes_on_when_there_are_some(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with site.running() as process:
        wait_for(lambda: site.status()["link"]["last_error"], "the first failure to connect")
        before = site.status()
        _, most = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        attempts = before["link"]["attempts"]
        # The next socket would have a number that is not allowed.
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, most))
        callers = []

        def call() -> None:
            # Waits unanswered for as long as there is no descriptor for it.
            callers.append(site.call("status", "--format", "json").returncode)

        waiting = threading.Thread(target=call)
        waiting.start()
        peers = [socket.create_connection(("127.0.0.1", before["data_port"])) for _ in range(20)]
        for _ in range(6):
            process.send_signal(signal.SIGHUP)
            (site.config_file).touch()
            time.sleep(2)
            assert process.poll() is None, (tmp_path / "output").read_text()[-3000:]
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (most, most))
        waiting.join(60)
        for peer in peers:
            peer.close()
        after = site.status()
        assert after["pid"] == before["pid"]
        assert psutil.Process(process.pid).is_running()
        wait_for(lambda: site.status()["link"]["attempts"] > attempts, "another try to connect")
        print(f"while there were none: status ended with {callers}, then {after['link']['last_error']}")
    site.call("stop")
