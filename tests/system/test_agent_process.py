"""The agent as real processes: starts without its relay, tells how it is, holds its lock, ends when told."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent.config.edit import append_collection, set_value
from agent.demo.free_port import free_port
from agent.enrol import template
from agent.identity_file import KEY_FILE, Identity, make_state_dir, save_identity
from agent.transfer.processes.spawn import FORK_SERVER
from protocol.identity import NodeKey
from protocol.ticket import RelayRoot

COLLECTION = "00000000-0000-4000-8000-0000000000a1"
SECOND = "00000000-0000-4000-8000-0000000000a2"


class Site:
    """A machine that was set up with a relay nobody can reach, and the commands to run on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "root"
        self.root.mkdir()
        self.state_dir = folder / "state"
        self.config_file = folder / "agent.yaml"
        self.relay_url = f"https://127.0.0.1:{free_port()}"
        make_state_dir(self.state_dir)
        key = NodeKey.generate()
        key.save(self.state_dir / KEY_FILE)
        identity = Identity(
            endpoint_id=str(uuid.uuid4()),
            node_id=str(uuid.uuid4()),
            relay_id=str(uuid.uuid4()),
            relay_root=RelayRoot.generate().public_pem,
            relay_url=self.relay_url,
            fingerprint=key.fingerprint,
        )
        save_identity(self.state_dir, identity)
        text = set_value(template(), "relay", "url", self.relay_url, self.config_file)
        text = set_value(text, None, "state_dir", str(self.state_dir), self.config_file)
        text = set_value(text, "data", "listen", "127.0.0.1", self.config_file)
        entry = {"id": COLLECTION, "name": "Data", "root": str(self.root)}
        self.config_file.write_text(append_collection(text, entry, self.config_file))

    def arguments(self, *command: str) -> list[str]:
        return [sys.executable, "-m", "agent", *command, "--config", str(self.config_file)]

    def call(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.arguments(*command), capture_output=True, text=True, timeout=60, check=False)

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.call("status", "--format", "json").stdout)
        return document

    @contextlib.contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """`towpath run`, ready. It says so as to a service manager."""
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as channel:
            address = self.folder / "notify"
            address.unlink(missing_ok=True)
            channel.bind(str(address))
            channel.settimeout(30)
            environment = {**os.environ, "NOTIFY_SOCKET": str(address)}
            with (
                (self.folder / "output").open("ab") as output,
                subprocess.Popen(self.arguments("run"), stdout=output, stderr=output, env=environment) as process,
            ):
                try:
                    message = channel.recv(4096)
                    assert message.startswith(b"READY=1\n"), message
                    assert f"MAINPID={process.pid}".encode() in message
                    yield process
                finally:
                    process.kill()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.call("stop")


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


def _has_in_memory(pid: int, wanted: bytes) -> bool:
    """Whether a process holds these bytes anywhere that it may write to."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            place, mode = line.split()[:2]
            if mode.startswith("rw"):
                begin, end = (int(number, 16) for number in place.split("-"))
                memory.seek(begin)
                # What a region does not have any more by now is read short, or not at all.
                with contextlib.suppress(OSError):
                    if wanted in memory.read(end - begin):
                        return True
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of processes is read from /proc")
def test_workers_do_not_have_the_agents_key(site: Site) -> None:
    key = NodeKey.load(site.state_dir / KEY_FILE).private_key.private_bytes_raw()
    with site.running() as process:
        # A fork server and what it has forked, or a worker that waits.
        if FORK_SERVER:
            wait_for(lambda: len(psutil.Process(process.pid).children(recursive=True)) > 1, "a worker that waits")
        workers = [
            child.pid
            for child in psutil.Process(process.pid).children(recursive=True)
            if {"agent.transfer.worker", "agent.transfer.fork_server"} & set(child.cmdline())
        ]
        assert len(workers) == 1 + FORK_SERVER
        assert _has_in_memory(process.pid, key)
        assert not any(_has_in_memory(worker, key) for worker in workers)


def test_an_agent_without_its_relay_runs_and_says_how_it_is(site: Site) -> None:
    with site.running() as process:
        wait_for(lambda: site.status()["link"]["last_error"], "the first failure to connect")
        status = site.status()
        assert status["pid"] == process.pid
        assert status["state_dir"] == str(site.state_dir)
        assert status["config_file"] == str(site.config_file)
        assert status["link"]["connected"] is False
        assert status["link"]["relay_url"] == site.relay_url
        assert [(row["id"], row["available"]) for row in status["collections"]] == [(COLLECTION, True)]
        assert status["tasks"] == []
        human = site.call("status")
        assert human.returncode == 0
        assert "not linked" in human.stdout
        assert "collection Data" in human.stdout
        site.root.rmdir()
        (row,) = site.status()["collections"]
        assert not row["available"]
        assert str(site.root) in row["reason"]

        stopped = site.call("stop")
        assert stopped.returncode == 0, stopped.stderr
        assert process.wait(timeout=10) == 0
    assert site.status() == {
        "running": False,
        "held_by": None,
        "config_file": str(site.config_file),
        "state_dir": str(site.state_dir),
    }
    assert site.call("status").returncode == 1
    assert not (site.state_dir / "control" / "agent.sock").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_cleanly_and_soon(site: Site, number: signal.Signals) -> None:
    with site.running() as process:
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=10) == 0
        assert time.monotonic() - began < 5
    assert (site.state_dir / "agent.lock").read_bytes() == b""


def test_a_second_agent_on_the_same_state_directory_is_refused(site: Site) -> None:
    other = site.folder / "other.yaml"
    other.write_text(site.config_file.read_text())
    with site.running() as process:
        for command in ("run", "start"):
            refused = subprocess.run(
                [sys.executable, "-m", "agent", command, "--config", str(other)],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert refused.returncode == 1
            assert f"process {process.pid} on host {socket.gethostname()} holds it" in refused.stderr
        assert site.status()["pid"] == process.pid


def test_a_killed_agent_leaves_the_way_free(site: Site) -> None:
    with site.running() as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (site.state_dir / "control" / "agent.sock").exists()
    assert site.call("status").returncode == 1
    with site.running() as process:
        assert site.status()["pid"] == process.pid


def test_start_detaches_and_logs_to_a_private_file(site: Site) -> None:
    started = site.call("start", "-F", "json")
    assert started.returncode == 0, started.stderr
    status = site.status()
    log = site.state_dir / "agent.log"
    document = json.loads(started.stdout)
    assert (document["running"], document["pid"], document["log_file"]) == (True, status["pid"], str(log))
    assert log.stat().st_mode & 0o777 == 0o600
    assert "INFO towpath.agent: Serving 1 collection(s)" in log.read_text()
    assert os.getsid(status["pid"]) == status["pid"]
    assert site.call("start").returncode == 1
    assert (status["draining"], status["idle"]) == (False, True)
    assert json.loads(site.call("pause", "-F", "json").stdout)["state"] == "paused"
    stopped = site.call("stop", "--drain", "-F", "json")
    assert (json.loads(stopped.stdout)["stopped"], "Nothing runs any more" in stopped.stderr) == (True, True)
    assert (site.state_dir / "paused").read_bytes() == b"drain\n", "for the next start"
    assert "No agent runs" in site.call("stop", "--drain").stdout


def test_start_says_what_went_wrong(site: Site) -> None:
    (site.state_dir / "roots.json").write_text("{")
    failed = site.call("start")
    assert failed.returncode == 1
    assert "roots.json cannot be read" in failed.stderr
    (site.state_dir / "roots.json").unlink()
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as other:
        text = site.config_file.read_text()
        port = other.getsockname()[1]
        site.config_file.write_text(set_value(text, "data", "port", port, site.config_file))
        taken = site.call("start")
        assert taken.returncode == 1
        assert f"cannot listen on 127.0.0.1 port {port}" in taken.stderr
        assert "Traceback" not in taken.stderr
    (site.state_dir / "identity.json").unlink()
    unknown = site.call("start")
    assert unknown.returncode == 1
    assert "not set up yet" in unknown.stderr


def test_a_changed_configuration_is_taken_up_and_a_broken_one_is_not(site: Site) -> None:
    (site.folder / "second").mkdir()
    good = site.config_file.read_text()
    with site.running():
        entry = {"id": SECOND, "name": "Two", "root": str(site.folder / "second"), "access": "read-only"}
        site.config_file.write_text(append_collection(good, entry, site.config_file))
        wait_for(lambda: len(site.status()["collections"]) == 2, "the second collection")
        assert [row["read_only"] for row in site.status()["collections"]] == [False, True]
        site.config_file.write_text(good + "\nsurprise: 1\n")
        wait_for(lambda: "surprise" in site.status()["config_problem"], "the refusal")
        line = len(good.splitlines()) + 2
        mistake = f"{site.config_file}:{line}: Unknown key `surprise`"
        assert mistake in site.status()["config_problem"]
        assert mistake in site.call("status").stdout
        assert len(site.status()["collections"]) == 2
        checked = site.call("config", "check")
        assert checked.returncode == 1
        assert mistake in checked.stderr
        # The agent's own files are offered to nobody; the folder of tasks is made by the agent.
        entry = {"id": SECOND, "name": "Own", "root": str(site.state_dir / "tasks")}
        site.config_file.write_text(append_collection(good, entry, site.config_file))
        wait_for(lambda: not site.status()["collections"][-1]["available"], "the refusal of its own folder")
        assert "belongs to the agent itself" in site.status()["collections"][-1]["reason"]
        site.config_file.write_text(good)
        wait_for(lambda: len(site.status()["collections"]) == 1, "one collection again")
        assert site.status()["config_problem"] == ""


def test_settings_made_by_command_count_at_once_and_say_what_has_to_wait(site: Site) -> None:
    before = site.config_file.read_text()
    with site.running() as process:
        renamed = site.call("config", "set", f"collections.{COLLECTION}.name", "Renamed")
        assert "The configuration was read again" in renamed.stdout
        assert [row["name"] for row in site.status()["collections"]] == ["Renamed"]
        # The log tells it as well, and not that nothing has changed because the watch of the file comes second.
        assert "The configuration was read again: 1 collection(s)." in (site.folder / "output").read_text()
        later = site.call("config", "set", "data.port", "50123")
        assert "data.port will count from the next start on" in later.stdout
        assert site.call("config", "set", "log.level", "debug").returncode == 0
        refused = site.call("config", "set", "limits.lanes", "0")
        assert (refused.returncode, "between 1 and 32" in refused.stderr) == (1, True)
        assert site.status()["pid"] == process.pid
        assert "nothing has changed" not in (site.folder / "output").read_text()
    assert site.config_file.read_text() == before


def test_config_check_warns_of_what_an_owner_may_not_have_meant(site: Site) -> None:
    good = site.call("config", "check")
    assert (good.returncode, good.stderr) == (0, "")
    site.root.rmdir()
    missing = site.call("config", "check")
    assert missing.returncode == 0
    assert "is not a directory now" in missing.stderr
    text = site.config_file.read_text().replace(str(site.root), str(site.folder))
    site.config_file.write_text(text)
    inside = site.call("config", "check")
    assert "lies inside the collection" in inside.stderr
