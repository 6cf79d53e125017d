"""The whole life of an agent on the account of somebody who has nothing: install from a relay, enrol, transfer, update,
roll back, uninstall. With the real bundle and a real relay; minutes, so not in the default run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.installers.release_world import USER, Account, World

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root, to be another user"),
    pytest.mark.timeout(1800),
]
# Bytes; seconds of work on any machine.
BIG = 4 * 1024**3


def test_from_nothing_to_nothing(world: World) -> None:
    relay, account, ca_file, figures = world.relay, world.account, str(world.ca_file), world.figures
    client = json.loads(relay.command("client", "add", "laptop", "--owner", "ada", "--json"))
    client_id, secret = client["client_id"], client["client_secret"]
    before = account.files()
    grant = ("--owner", "ada", "--grant", f"{client_id}:administrator", "--json")
    made = json.loads(relay.command("collection", "add", "Home", *grant))
    key, collection = made["setup_key"], made["collection_id"]

    options = ["--relay", relay.url, "--ca-file", ca_file, "--root", str(account.home / "data")]
    relay_that_lies(world, options, key)
    assert account.files() == before
    with world.timed("install, enrol and start s"):
        account.run("sh", "-s", "--", *options, text=relay.script(), TOWPATH_SETUP_KEY=key)
    account.until(lambda: account.status()["link"]["connected"], "the link")

    signed_in = {"TOWPATH_CLIENT_SECRET": secret}
    login = [account.towpath, "login", "--relay", relay.url, "--ca-file", ca_file, "--client-id", client_id]
    account.run(*login, **signed_in)
    account.run(account.towpath, "transfer", "--wait", f"{collection}:/file", f"{collection}:/copy")
    assert (account.home / "data" / "copy").read_text() == "precious"

    # A watch rule, with the credentials that signing in left.
    rule = ["--collection", collection, "--folder", "/in", "--destination", collection, "--template", "/out/{name}"]
    account.run("mkdir", str(account.home / "data" / "in"))
    account.run(account.towpath, "watch", "add", "scope", *rule, "--settle", "1")
    account.run("sh", "-c", "echo measured >data/in/scan.tif")
    account.until(lambda: (account.home / "data" / "out" / "scan.tif").exists(), "the watch rule")
    rules = lambda: json.loads(account.run(account.towpath, "watch", "list", "-F", "json").stdout)["rules"]  # noqa: E731
    account.until(lambda: rules()[0]["batches"] == {"done": 1}, "the end of its task")
    account.run(account.towpath, "watch", "remove", "scope")

    measure_idle(account, figures)
    with world.timed("stop s"):
        account.run(account.towpath, "stop")
    with world.timed("start s"):
        account.run(account.towpath, "start")

    # A second build, and a third that is broken.
    world.release("0.1.1")
    updated = account.run(account.towpath, "update", "install")
    assert "Version 0.1.1 runs" in updated.stdout, updated
    assert account.status()["version"] == "0.1.1"
    world.release("0.1.2", broken=True)
    failed = account.run(account.towpath, "update", "install", check=False)
    assert failed.returncode == 1
    assert "version 0.1.1 runs again" in failed.stderr, failed
    assert account.status()["version"] == "0.1.1"
    assert "newest" in account.run(account.towpath, "update", "check").stdout

    account.run("sh", str(account.home / ".local/share/towpath/install.sh"), "--uninstall")
    assert account.files() == before | {f"data/{name}" for name in ("copy", "in", "in/scan.tif", "out", "out/scan.tif")}


def relay_that_lies(world: World, options: list[str], key: str) -> None:
    """Somebody has taken the relay over: neither another program nor another manifest comes in."""
    (manifest,) = (world.relay.releases / "install").glob("*.manifest")
    (bundle,) = (world.relay.releases / "targets" / "bundles").iterdir()
    for victim, words in ((manifest, "signature of the project"), (bundle, "not what was signed")):
        content = victim.read_bytes()
        victim.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        command = ["sh", "-s", "--", *options]
        refused = world.account.run(*command, text=world.relay.script(), check=False, TOWPATH_SETUP_KEY=key)
        assert refused.returncode != 0
        assert words in refused.stderr, refused.stderr
        victim.write_bytes(content)


def test_two_users_on_one_host_do_not_meet(world: World, public: Path) -> None:
    """Each has an agent of their own on a port of its own, moves data, and cannot control the other's."""
    relay, ada = world.relay, world.account
    client = json.loads(relay.command("client", "add", "laptop", "--owner", "ada", "--json"))
    bob = Account(public / "bob", USER + 1)
    collections = []
    for account in (ada, bob):
        grant = ("--owner", "ada", "--grant", f"{client['client_id']}:administrator", "--json")
        made = json.loads(relay.command("collection", "add", account.home.name, *grant))
        collections.append(made["collection_id"])
        options = ["--relay", relay.url, "--ca-file", str(world.ca_file), "--root", str(account.home / "data")]
        account.run("sh", "-s", "--", *options, text=relay.script(), TOWPATH_SETUP_KEY=made["setup_key"])
        account.until(lambda account=account: account.status()["link"]["connected"], "the link")
    assert ada.status()["data_port"] != bob.status()["data_port"]
    assert ada.pid() != bob.pid()

    # On one machine the data goes over loopback, which agents use for others only when told to.
    for account in (ada, bob):
        account.run(account.towpath, "config", "set", "data.allow_loopback", "true")
        account.run(account.towpath, "stop")
        account.run(account.towpath, "start")
        account.until(lambda account=account: account.status()["link"]["connected"], "the link")
    login = [ada.towpath, "login", "--relay", relay.url, "--ca-file", str(world.ca_file)]
    ada.run(*login, "--client-id", client["client_id"], TOWPATH_CLIENT_SECRET=client["client_secret"])
    ada.run(ada.towpath, "transfer", "--wait", f"{collections[0]}:/file", f"{collections[1]}:/from-ada")
    assert (bob.home / "data" / "from-ada").read_text() == "precious"
    assert (bob.home / "data" / "from-ada").stat().st_uid == bob.user

    pid_of_ada = ada.pid()
    socket_of_ada = next(ada.home.rglob("agent.sock"))
    reach = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    python = next((bob.home / ".local/share/towpath/current/bin").glob("python*"))
    refused = bob.run(str(python), "-c", reach, str(socket_of_ada), check=False)
    assert "PermissionError" in refused.stderr, refused
    # Even with the directories wide open, the kernel's word on who asks is what counts.
    for folder in [socket_of_ada.parent, *socket_of_ada.parent.relative_to(ada.home).parents]:
        (ada.home / folder).chmod(0o755)
    socket_of_ada.chmod(0o777)
    ask = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        "s.sendall(b'POST /stop HTTP/1.1\\r\\nHost: agent\\r\\nContent-Length: 0\\r\\n\\r\\n');"
        "print(len(s.recv(99)))"
    )
    answer = bob.run(str(python), "-c", ask, str(socket_of_ada), check=False)
    assert answer.stdout.strip() in ("0", ""), answer
    # Her own client asks nobody in a folder that is open to others.
    assert not ada.status()["running"]
    socket_of_ada.parent.chmod(0o700)
    assert ada.pid() == pid_of_ada
    for account in (ada, bob):
        account.run("sh", str(account.home / ".local/share/towpath/install.sh"), "--uninstall")


def measure_idle(account: Account, figures: dict[str, float]) -> None:
    """Processor time and memory of an agent that has done something and has nothing to do."""
    pid = account.pid()
    time.sleep(20)
    everything = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    used = lambda: sum(process.cpu_times().user + process.cpu_times().system for process in everything)  # noqa: E731
    before, start = used(), time.monotonic()
    time.sleep(60)
    figures["idle CPU %"] = 100 * (used() - before) / (time.monotonic() - start)
    figures["idle RSS of the daemon MiB"] = everything[0].memory_info().rss / 2**20
    # Memory that processes share counts once.
    figures["idle PSS with the waiting worker MiB"] = sum(p.memory_full_info().pss for p in everything) / 2**20


def test_enrolled_by_a_code_the_agent_updates_itself_and_comes_back_from_a_broken_release(world: World) -> None:
    """Nobody types `towpath update`: the daemon finds releases, waits for the transfer, changes, and goes back."""
    relay, account = world.relay, world.account
    before = account.files()
    options = ["--relay", relay.url, "--ca-file", str(world.ca_file), "--root", str(account.home / "data")]
    with world.timed("install, enrol by code and start s"), account.start("sh", "-s", "--", *options) as install:
        assert install.stdin is not None
        assert install.stderr is not None
        install.stdin.write(relay.script())
        install.stdin.close()
        relay.allow_device(code_of(install))
        assert install.wait(60) == 0, install.stderr.read()
    account.until(lambda: account.status()["link"]["connected"], "the link")
    collection = account.status()["collections"][0]["id"]

    # Again for the login: nothing of the first one was kept.
    signing_in = ("login", "--device", "--relay", relay.url, "--ca-file", str(world.ca_file))
    with account.start(account.towpath, *signing_in) as login:
        relay.allow_device(code_of(login))
        assert login.wait(60) == 0

    # A release appears in the midst of a transfer.
    noise = f"head -c {BIG} /dev/zero | openssl enc -aes-128-ctr -pass pass:x -nosalt >data/big 2>/dev/null"
    account.run("sh", "-c", noise)
    second, fourth = world.bundle("0.1.1"), world.bundle("0.1.3")
    first = account.pid()
    account.run(account.towpath, "transfer", f"{collection}:/big", f"{collection}:/big-copy")
    account.until(lambda: states(account) == ["ACTIVE"], "the transfer")
    world.publish(second)
    account.run(account.towpath, "config", "set", "update.interval", "10")
    assert states(account) == ["ACTIVE"]
    deadline = time.monotonic() + 240
    while account.status().get("version") != "0.1.1":
        assert time.monotonic() < deadline, account.run("cat", ".local/share/towpath/update/state.json").stdout
        if account.status().get("version") == "0.1.0":
            assert account.status()["pid"] == first
        time.sleep(0.5)
    assert set(states(account)) <= {"SUCCEEDED"}, "it changed in the midst of a transfer"
    assert account.run("cmp", "data/big", "data/big-copy").returncode == 0

    # A broken one: back by itself, and not tried again.
    account.until(lambda: not update_status(account)["pending"], "the end of the change")
    world.release("0.1.2", broken=True)
    account.until(lambda: update_status(account)["failed"] == ["0.1.2"], "the broken release to be given up")
    account.until(lambda: account.status().get("version") == "0.1.1", "the version before")
    survivor = account.pid()
    time.sleep(30)
    assert account.pid() == survivor
    assert "newest" in account.run(account.towpath, "update", "check").stdout

    # By hand, in the midst of a transfer: checkpointed, and gone on with in the new version.
    account.run("rm", "data/big-copy")
    account.run(account.towpath, "config", "set", "update.mode", "off")
    account.run(account.towpath, "transfer", f"{collection}:/big", f"{collection}:/big-copy")
    account.until(lambda: moved(account) > 0, "the transfer to move something")
    world.publish(fourth)
    assert states(account)[-1] == "ACTIVE"
    with world.timed("stop in mid-transfer s"):
        account.run(account.towpath, "stop")
    account.run(account.towpath, "start")
    account.until(lambda: states(account)[-1:] == ["ACTIVE"], "the transfer to go on")
    account.run(account.towpath, "update", "install")
    assert account.status()["version"] == "0.1.3"
    account.until(lambda: set(states(account)) <= {"SUCCEEDED"}, "the transfer")
    account.until(lambda: (account.home / "data/big-copy").exists(), "the copy")
    assert account.run("cmp", "data/big", "data/big-copy").returncode == 0

    account.run(account.towpath, "logout")
    account.run("sh", str(account.home / ".local/share/towpath/install.sh"), "--uninstall")
    assert account.files() == before | {"data/big", "data/big-copy"}


def update_status(account: Account) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(account.run(account.towpath, "update", "status", "-F", "json").stdout)
    return document


def states(account: Account) -> list[str]:
    return [task["state"] for task in account.status().get("tasks", [])]


def moved(account: Account) -> int:
    tasks = account.status().get("tasks", [])
    return sum(task["counters"]["bytes_transferred"] for task in tasks if task["state"] == "ACTIVE")


def code_of(process: subprocess.Popen[str]) -> str:
    """The code that a waiting command shows."""
    assert process.stderr is not None
    said = ""
    while not (code := re.search(r"the code ([A-Z]{4}-[A-Z]{4})", said)):
        line = process.stderr.readline()
        assert line, said
        said += line
    return code[1]
