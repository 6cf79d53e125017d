"""The units under a real systemd on a machine that reboots: the user's own service, and the one of a data transfer
node. Minutes, and root; not in the default run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.installers.release_world import Relay, World
from tests.installers.systemd_machine import Machine, User, network_namespace, until, why_not

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "can run"),
    pytest.mark.timeout(1800),
]
UNIT = "towpath-agent.service"
# Bytes; seconds of work on any machine.
BIG = 3 * 1024**3


@pytest.fixture
def namespace() -> Iterator[str]:
    with network_namespace(f"towpath{os.getpid()}") as name:
        yield name


@pytest.fixture
def relay(tmp_path: Path, namespace: str) -> Iterator[Relay]:
    """It serves on the machine's loopback, and goes on while the machine is off."""
    (tmp_path / "relay").mkdir()
    made = Relay(tmp_path / "relay", namespace)
    yield made
    made.process.terminate()
    made.process.wait(30)


@pytest.fixture
def machine(public: Path, namespace: str) -> Iterator[Machine]:
    (public / "machine").mkdir()
    made = Machine(public / "machine", f"towpath{os.getpid()}", namespace)
    try:
        made.boot()
        yield made
    finally:
        made.close()


def program_of(relay: Relay) -> dict[str, str]:
    """The id and secret of a program that acts for Ada."""
    client: dict[str, str] = json.loads(relay.command("client", "add", "laptop", "--owner", "ada", "--json"))
    return client


def enrolment(relay: Relay, name: str, client: dict[str, str]) -> tuple[str, str]:
    """A collection's setup key and id; the program may do everything with it."""
    grant = ("--owner", "ada", "--grant", f"{client['client_id']}:administrator", "--json")
    made = json.loads(relay.command("collection", "add", name, *grant))
    return made["setup_key"], made["collection_id"]


def write_big(path: Path, owner: Path) -> None:
    noise = f"head -c {BIG} /dev/zero | openssl enc -aes-128-ctr -pass pass:x -nosalt >'{path}' 2>/dev/null"
    subprocess.run(["sh", "-c", noise], check=False)
    assert path.stat().st_size == BIG
    shutil.chown(path, owner.stat().st_uid, owner.stat().st_gid)


def test_a_users_own_service(world: World, machine: Machine) -> None:
    relay, figures = world.relay, world.figures
    ada = User(machine, "ada")
    (ada.home / "data").mkdir()
    shutil.chown(ada.home / "data", ada.home.stat().st_uid, ada.home.stat().st_gid)
    write_big(ada.home / "data" / "big", ada.home)
    shutil.copy(world.ca_file, machine.root / "srv" / "ca.pem")
    before = ada.files()
    client = program_of(relay)
    key, collection = enrolment(relay, "Home", client)

    options = ["--relay", relay.url, "--ca-file", "/srv/ca.pem", "--root", "/home/ada/data"]
    with world.timed("install, enrol and start s"):
        installed = ada.run("sh", "-s", "--", *options, text=relay.script(), TOWPATH_SETUP_KEY=key)
    print(installed.stderr)
    until(ada.linked, "the link")
    show = lambda *names: machine.properties(UNIT, *names, user=ada)  # noqa: E731
    first = show("ActiveState", "UnitFileState", "Type", "StatusText", "WatchdogUSec", "MainPID")
    print(first)
    assert (first["ActiveState"], first["UnitFileState"], first["Type"]) == ("active", "enabled", "notify")
    assert first["MainPID"] == str(ada.status()["pid"])
    until(lambda: "Linked to" in show("StatusText")["StatusText"], "the state of the link in systemctl status")
    assert machine.run("loginctl", "show-user", "ada", "--property=Linger").stdout.strip() == "Linger=yes"
    # Her own command reads the journal, as there is no log file.
    journal = ada.run(ada.towpath, "logs").stdout
    print(journal)
    assert "linked" in journal.lower()

    login = [ada.towpath, "login", "--relay", relay.url, "--ca-file", "/srv/ca.pem", "--client-id", client["client_id"]]
    ada.run(*login, TOWPATH_CLIENT_SECRET=client["client_secret"])
    hangs(machine, ada, figures)
    stops_in_the_midst_of_a_transfer(machine, ada, collection, figures)
    reboots_in_the_midst_of_a_transfer(machine, ada, collection, figures)
    updates(world, machine, ada)

    ada.run("sh", "/home/ada/.local/share/towpath/install.sh", "--uninstall")
    assert ada.files() == before | {"data/copy"}
    gone = show("ActiveState", "LoadState")
    assert gone == {"ActiveState": "inactive", "LoadState": "not-found"}
    assert machine.run("loginctl", "show-user", "ada", "--property=Linger", check=False).stdout.strip() != "Linger=yes"
    assert "towpath" not in machine.run("ps", "-eo", "args").stdout


def hangs(machine: Machine, ada: User, figures: dict[str, float]) -> None:
    """A stopped process is one whose loop hangs: the service manager ends it and starts another."""
    quick = ada.home / ".config/systemd/user" / f"{UNIT}.d"
    ada.run("mkdir", f"/home/ada/.config/systemd/user/{UNIT}.d")
    (quick / "quick.conf").write_text("[Service]\nWatchdogSec=6\n")
    ada.run("systemctl", "--user", "daemon-reload")
    ada.run("systemctl", "--user", "restart", UNIT)
    until(ada.linked, "the link")
    pid = ada.status()["pid"]
    began = time.monotonic()
    machine.run("kill", "-STOP", str(pid))
    restarted = lambda: machine.properties(UNIT, "NRestarts", user=ada)["NRestarts"] == "1"  # noqa: E731
    until(restarted, "the watchdog")
    until(ada.linked, "the link after the watchdog")
    figures["hanging for 6 s until linked again s"] = time.monotonic() - began
    assert ada.status()["pid"] != pid
    shutil.rmtree(quick)
    ada.run("systemctl", "--user", "daemon-reload")


def begin(ada: User, collection: str) -> None:
    (ada.home / "data" / "copy").unlink(missing_ok=True)
    ada.run(ada.towpath, "transfer", f"{collection}:/big", f"{collection}:/copy")
    until(lambda: ada.moved() > BIG / 20, "the transfer to move something")


def completed(ada: User, started: float) -> None:
    """The transfer has ended well, in an agent that started later than this one."""
    until(ada.linked, "the link")
    assert ada.status()["started"] > started
    until(lambda: set(ada.states()) <= {"SUCCEEDED"} and (ada.home / "data" / "copy").exists(), "the transfer", 240)
    assert ada.run("cmp", "data/big", "data/copy").returncode == 0


def stops_in_the_midst_of_a_transfer(machine: Machine, ada: User, collection: str, figures: dict[str, float]) -> None:
    begin(ada, collection)
    started = ada.status()["started"]
    began = time.monotonic()
    ada.run("systemctl", "--user", "stop", UNIT)
    figures["systemctl stop in mid-transfer s"] = time.monotonic() - began
    assert figures["systemctl stop in mid-transfer s"] < 5
    stopped = machine.properties(UNIT, "ActiveState", "Result", user=ada)
    assert stopped == {"ActiveState": "inactive", "Result": "success"}
    began = time.monotonic()
    ada.run("systemctl", "--user", "start", UNIT)
    figures["systemctl start until ready s"] = time.monotonic() - began
    assert ada.moved() > 0 or ada.states()
    completed(ada, started)


def reboots_in_the_midst_of_a_transfer(machine: Machine, ada: User, collection: str, figures: dict[str, float]) -> None:
    """Nobody signs in afterwards: lingering starts the user's services at the boot."""
    for how in ("shutdown", "power failure"):
        begin(ada, collection)
        started = ada.status()["started"]
        if how == "shutdown":
            figures["shutdown of the machine in mid-transfer s"] = machine.shut_down()
        else:
            machine.unplug()
        assert not (ada.home / "data" / "copy").exists(), "the transfer was over already"
        machine.boot()
        runs = lambda: "agent.transfer.worker" in machine.run("ps", "-u", "ada", "-o", "args").stdout  # noqa: E731
        until(runs, f"the transfer to go on by itself after a {how}")
        completed(ada, started)


def updates(world: World, machine: Machine, ada: User) -> None:
    """A second build comes in by itself; a third, that is broken, goes again by itself."""
    world.release("0.1.1")
    ada.run(ada.towpath, "config", "set", "update.interval", "10")
    until(lambda: ada.status().get("version") == "0.1.1", "the update", 180)
    pending = lambda: json.loads(ada.run(ada.towpath, "update", "status", "-F", "json").stdout)  # noqa: E731
    until(lambda: not pending()["pending"], "the end of the change")
    world.release("0.1.2", broken=True)
    until(lambda: pending()["failed"] == ["0.1.2"], "the broken release to be given up", 180)
    until(lambda: ada.status().get("version") == "0.1.1", "the version before")
    after = machine.properties(UNIT, "ActiveState", "MainPID", user=ada)
    assert after == {"ActiveState": "active", "MainPID": str(ada.status()["pid"])}


def test_the_service_of_a_data_transfer_node(world: World, machine: Machine) -> None:
    """Two users' agents, run by the system, in the sandbox of the unit; nobody ever signs in."""
    relay, figures = world.relay, world.figures
    shutil.copy(world.ca_file, machine.root / "srv" / "ca.pem")
    installed_for_all(world, machine)
    client = program_of(relay)
    nodes = {name: node(machine, relay, name, client) for name in ("beamline", "archive")}
    units = {name: f"towpath-agent@{name}.service" for name in nodes}
    for unit in units.values():
        machine.run("systemctl", "enable", "--now", unit)
    exposure = machine.run("systemd-analyze", "security", "--no-pager", units["archive"]).stdout.splitlines()[-1]
    print(exposure)
    score = re.search(r"archive\.service: ([0-9.]+)", exposure)
    assert score is not None
    assert float(score[1]) < 2.5
    ada = User(machine, "ada")
    program = "/usr/local/bin/towpath"
    login = [program, "login", "--relay", relay.url, "--ca-file", "/srv/ca.pem", "--client-id", client["client_id"]]
    ada.run(*login, TOWPATH_CLIENT_SECRET=client["client_secret"])
    ports = {name: status_of(machine, name)["data_port"] for name in nodes}
    assert ports["beamline"] != ports["archive"]

    # Read-only unless the administrator names the folder; the task says so.
    places = (f"{nodes['beamline']}:/run", f"{nodes['archive']}:/run")
    transfer = (program, "transfer", "--wait", "--recursive", "--format", "json", *places)
    refused = ada.run(*transfer, check=False)
    assert refused.returncode == 4, refused
    events = [ada.run(program, "task", "event-list", task).stdout for task in submitted(refused.stdout)]
    print(events)
    assert "mounted for reading only" in "".join(events)
    drop_in = machine.root / "etc/systemd/system" / f"{units['archive']}.d"
    drop_in.mkdir()
    (drop_in / "roots.conf").write_text("[Service]\nReadWritePaths=/data/archive\nWatchdogSec=6\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", units["archive"])
    until(lambda: status_of(machine, "archive")["link"]["connected"], "the link")
    ada.run(*transfer)
    assert (machine.root / "data/archive/run/scan").read_text() == "measured"
    owner = (machine.root / "data/archive/run/scan").stat()
    assert owner.st_uid == (machine.root / "data/archive").stat().st_uid

    began = time.monotonic()
    before = machine.properties(units["archive"], "MainPID")["MainPID"]
    machine.run("kill", "-STOP", before)
    until(lambda: machine.properties(units["archive"], "NRestarts")["NRestarts"] == "1", "the watchdog")
    figures["hanging for 6 s until started again s"] = time.monotonic() - began
    until(lambda: status_of(machine, "archive")["link"]["connected"], "the link")
    with world.timed("shutdown of the machine s"):
        machine.shut_down()
    machine.boot()
    for name in nodes:
        until(lambda name=name: status_of(machine, name)["link"]["connected"], "the link after the reboot")
    journal = machine.run("journalctl", "--unit", units["archive"], "--no-pager", "--output=cat").stdout
    print(journal[-1500:])
    assert "Linked" in journal
    began = time.monotonic()
    machine.run("systemctl", "disable", "--now", *units.values())
    assert time.monotonic() - began < 6
    left = machine.run("ps", "-eo", "args").stdout
    assert "agent.transfer.worker" not in left
    assert "agent.transfer.fork_server" not in left


def submitted(output: str) -> set[str]:
    """The ids of tasks in what a command printed."""
    return set(re.findall(r'"task_id": *"([0-9a-f-]{36})"', output))


def installed_for_all(world: World, machine: Machine) -> None:
    """As an administrator would put it there."""
    place = machine.root / "opt" / "towpath"
    place.mkdir()
    with tarfile.open(world.built) as archive:
        archive.extractall(place, filter="data")
    (machine.root / "usr/local/bin/towpath").symlink_to("/opt/towpath/bin/towpath")
    shutil.copy(place / "systemd" / "towpath-agent@.service", machine.root / "etc/systemd/system")
    machine.run("systemctl", "daemon-reload")


def node(machine: Machine, relay: Relay, name: str, client: dict[str, str]) -> str:
    """A user with an agent, set up as the unit says; the id of its collection."""
    machine.run("useradd", "--system", "--home-dir", f"/data/{name}", name)
    for folder in ("/etc/towpath/agents", f"/var/lib/towpath-agent/{name}", f"/data/{name}"):
        machine.run("mkdir", "-p", folder)
    machine.run("chown", name, f"/var/lib/towpath-agent/{name}", f"/data/{name}")
    if name == "beamline":
        machine.run("install", "-d", "-o", name, f"/data/{name}/run")
        (machine.root / "data" / name / "run" / "scan").write_text("measured")
    # The folder is everybody's only while the file is made.
    machine.run("chown", name, "/etc/towpath/agents")
    key, collection = enrolment(relay, name, client)
    setup = (
        "/usr/local/bin/towpath", "setup", "--config", f"/etc/towpath/agents/{name}.yaml",
        "--state-dir", f"/var/lib/towpath-agent/{name}", "--root", f"/data/{name}",
    )  # fmt: skip
    machine.run("setpriv", f"--reuid={name}", "--clear-groups", *setup, environment={"TOWPATH_SETUP_KEY": key})
    configure = ("/usr/local/bin/towpath", "config", "set", "--config", f"/etc/towpath/agents/{name}.yaml")
    machine.run("setpriv", f"--reuid={name}", "--clear-groups", *configure, "data.allow_loopback", "true")
    return collection


def status_of(machine: Machine, name: str) -> dict[str, Any]:
    """What root sees of a user's agent."""
    command = ("/usr/local/bin/towpath", "status", "-F", "json", "--config", f"/etc/towpath/agents/{name}.yaml")
    until(lambda: machine.run(*command, check=False).returncode == 0, f"the agent of {name}")
    document: dict[str, Any] = json.loads(machine.run(*command).stdout)
    return document
