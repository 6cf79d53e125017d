"""The whole life of an agent on the account of somebody who has nothing: install from a relay, enrol, transfer, update,
roll back, uninstall. With the real bundle and a real relay; minutes, so not in the default run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from agent.demo.free_port import free_port
from agent.update.offer import this_platform
from installers import build_bundle
from installers.release import add
from installers.repository import Keys, Repository
from tests.relay.sign_in_world import forms_of

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root, to be another user"),
    pytest.mark.timeout(1800),
]
USER = 12399
PASSWORD = "quiet boats go by"
# Bytes; seconds of work on any machine.
BIG = 4 * 1024**3
PROGRAMS = Path(sys.executable).parent


def variant(base: Path, target: Path, version: str, root: Path, *, broken: bool = False) -> Path:
    """The same bundle under another version, with a pinned root; a broken one says its version and cannot run."""
    shutil.rmtree(target, ignore_errors=True)
    with tarfile.open(base) as archive:
        archive.extractall(target, filter="data")
    (target / "bundle.json").write_text(json.dumps({"version": version, "platform": this_platform()}))
    (target / "trust").mkdir()
    shutil.copy(root, target / "trust" / "root.json")
    packages = next((target / "lib").glob("python*/site-packages"))
    info = next(packages.glob("towpath-*.dist-info"))
    metadata = info / "METADATA"
    metadata.write_text(re.sub(r"(?m)^Version: .*$", f"Version: {version}", metadata.read_text()))
    info.rename(packages / f"towpath-{version}.dist-info")
    if broken:
        (packages / "agent" / "daemon.py").write_text("raise RuntimeError('broken on purpose')\n")
        for path in (packages / "agent" / "__pycache__").glob("daemon.*"):
            path.unlink()
    return build_bundle.pack(target, target.with_name(f"{target.name}.tar.gz"))


class Account:
    """An empty home of a user that can see nothing of ours."""

    def __init__(self, home: Path, user: int = USER) -> None:
        self.home = home
        self.user = user
        home.mkdir()
        (home / "data").mkdir()
        (home / "data" / "file").write_text("precious")
        for path in (home, home / "data"):
            os.chown(path, user, user)
        home.chmod(0o700)
        self.towpath = str(home / ".local/bin/towpath")

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"HOME": str(self.home), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", **environment},
            cwd=self.home,
            user=self.user,
            group=self.user,
            extra_groups=[],
            text=True,
        )

    def run(self, *command: str, text: str | None = None, check: bool = True, **environment: str) -> Any:
        process = self.start(*command, **environment)
        stdout, stderr = process.communicate(text, timeout=300)
        result = subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
        assert not check or result.returncode == 0, (command, result.stdout, result.stderr)
        return result

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.run(self.towpath, "status", "-F", "json", check=False).stdout)
        return document

    def pid(self) -> int:
        return int(self.status()["pid"])

    def files(self) -> set[str]:
        return {str(path.relative_to(self.home)) for path in self.home.rglob("*")}

    def until(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + 90
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}"
            time.sleep(0.3)


class Relay:
    """A real relay that passes releases on."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.url = f"https://127.0.0.1:{port}"
        self.folder = folder
        self.releases = folder / "releases"
        where = ("--directory", str(folder), "--host", "127.0.0.1", "--port", str(port), "--url", self.url)
        self.command("init", *where, bare=True)
        with (folder / "relay.yaml").open("a") as file:
            file.write(f"\nupdates: {self.releases}\n")
        self.ca_file = folder / "tls" / "ca.pem"
        self.process = subprocess.Popen([PROGRAMS / "towpath-relay", "--config", folder / "relay.yaml", "serve"])

    def command(self, *arguments: str, bare: bool = False, text: str | None = None) -> str:
        config = [] if bare else ["--config", str(self.folder / "relay.yaml")]
        command = [str(PROGRAMS / "towpath-relay"), *config, *arguments]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=True, timeout=60).stdout

    def script(self) -> str:
        """install.sh, as anybody fetches it."""
        command = ["curl", "-fsS", "--cacert", self.ca_file, f"{self.url}/install.sh"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def allow_device(self, code: str) -> None:
        """What Ada does on her telephone: sign in, type the code, allow it."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        with httpx.Client(base_url=self.url, verify=context, follow_redirects=True) as telephone:
            page = telephone.get("/device")
            (form,) = [form for form in forms_of(page.text) if form.action == "/sign-in"]
            page = telephone.post(form.action, data={**form.fields, "username": "ada", "password": PASSWORD})
            (form,) = [form for form in forms_of(page.text) if "user_code" in form.fields]
            page = telephone.post(form.action, data={**form.fields, "user_code": code})
            form = forms_of(page.text)[0]
            page = telephone.post(form.action, data={**form.fields, "decision": "allow"})
            assert "goes on by itself" in page.text, page.text


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    (tmp_path / "relay").mkdir()
    made = Relay(tmp_path / "relay")
    yield made
    made.process.terminate()
    made.process.wait(30)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="towpath-account-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@dataclass
class World:
    """A project that makes releases, a relay that passes them on, and an account that has nothing."""

    relay: Relay
    keys: Keys
    repository: Repository
    built: Path
    folder: Path
    account: Account
    ca_file: Path
    figures: dict[str, float]

    def bundle(self, version: str, *, broken: bool = False) -> Path:
        """A bundle of the project that is not published yet; seconds of work."""
        root = self.relay.releases / "metadata" / "1.root.json"
        made = variant(self.built, self.folder / version, version, root, broken=broken)
        shutil.rmtree(self.folder / version)
        return made

    def publish(self, bundle: Path) -> None:
        add(self.repository, self.keys, bundle)
        self.repository.publish()

    def release(self, version: str, *, broken: bool = False) -> Path:
        made = self.bundle(version, broken=broken)
        self.publish(made)
        return made

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.figures[name] = time.monotonic() - began


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's bundle; one that was built before (TOWPATH_TEST_BUNDLE) saves the minutes of building one."""
    ready = os.environ.get("TOWPATH_TEST_BUNDLE")
    folder = tmp_path_factory.mktemp("bundle")
    return Path(ready) if ready else build_bundle.build(folder, build_bundle.project_version(), None)


@pytest.fixture
def world(relay: Relay, tmp_path: Path, public: Path, built: Path) -> Iterator[World]:
    keys = Keys.generate()
    repository = Repository.open(relay.releases, keys)
    repository.publish()
    relay.command("user", "add", "ada", "--password-file", "-", text=PASSWORD)
    ca_file = public / "ca.pem"
    shutil.copy(relay.ca_file, ca_file)
    ca_file.chmod(0o644)
    account = Account(public / "home")
    made = World(relay, keys, repository, built, tmp_path, account, ca_file, {})
    made.figures["bundle MiB"] = made.release("0.1.0").stat().st_size / 2**20
    yield made
    print({name: round(value, 2) for name, value in made.figures.items()})


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, text
    return match[0]


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
    with world.timed("install, enrol by code and start s"):
        install = account.start("sh", "-s", "--", *options)
        assert install.stdin is not None
        install.stdin.write(relay.script())
        install.stdin.close()
        relay.allow_device(code_of(install))
        assert install.stderr is not None
        assert install.wait(60) == 0, install.stderr.read()
    account.until(lambda: account.status()["link"]["connected"], "the link")
    collection = account.status()["collections"][0]["id"]

    # Again for the login: nothing of the first one was kept.
    login = account.start(account.towpath, "login", "--device", "--relay", relay.url, "--ca-file", str(world.ca_file))
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
