"""The whole life of an agent on the account of somebody who has nothing: install from a relay, enrol, transfer, update,
roll back, uninstall. With the real bundle and a real relay; minutes, so not in the default run."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.update.offer import this_platform
from installers import build_bundle
from installers.release import add
from installers.repository import Keys, Repository

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root, to be another user"),
    pytest.mark.timeout(1800),
]
USER = 12399
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
    return build_bundle.pack(target, target.with_suffix(".tar.gz"))


class Account:
    """An empty home of a user that can see nothing of ours."""

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir()
        os.chown(home, USER, USER)
        home.chmod(0o700)
        self.towpath = str(home / ".local/bin/towpath")

    def run(self, *command: str, text: str | None = None, check: bool = True, **environment: str) -> Any:
        result = subprocess.run(
            command,
            input=text,
            env={"HOME": str(self.home), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", **environment},
            cwd=self.home,
            user=USER,
            group=USER,
            extra_groups=[],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert not check or result.returncode == 0, (command, result.stdout, result.stderr)
        return result

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.run(self.towpath, "status", "-F", "json", check=False).stdout)
        return document

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
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        self.url = f"https://127.0.0.1:{port}"
        self.folder = folder
        self.releases = folder / "releases"
        where = ("--directory", str(folder), "--host", "127.0.0.1", "--port", str(port), "--url", self.url)
        self.command("init", *where, bare=True)
        with (folder / "relay.yaml").open("a") as file:
            file.write(f"\nupdates: {self.releases}\n")
        self.ca_file = folder / "tls" / "ca.pem"
        self.process = subprocess.Popen([PROGRAMS / "towpath-relay", "--config", folder / "relay.yaml", "serve"])

    def command(self, *arguments: str, bare: bool = False) -> str:
        config = [] if bare else ["--config", str(self.folder / "relay.yaml")]
        command = [str(PROGRAMS / "towpath-relay"), *config, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


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


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, text
    return match[0]


def test_from_nothing_to_nothing(relay: Relay, tmp_path: Path, public: Path) -> None:
    figures: dict[str, float] = {}
    keys = Keys.generate()
    repository = Repository.open(relay.releases, keys)
    repository.publish()
    root = relay.releases / "metadata" / "1.root.json"
    # A bundle that was built before saves the minutes of building one.
    ready = os.environ.get("TOWPATH_TEST_BUNDLE")
    built = Path(ready) if ready else build_bundle.build(tmp_path, build_bundle.project_version(), None)
    base = variant(built, tmp_path / "first", "0.1.0", root)
    figures["bundle MiB"] = base.stat().st_size / 2**20
    add(repository, keys, base)
    repository.publish()
    relay.command("user", "add", "ada")
    client = json.loads(relay.command("client", "add", "laptop", "--owner", "ada", "--json"))
    client_id, secret = client["client_id"], client["client_secret"]
    ca_file = public / "ca.pem"
    shutil.copy(relay.ca_file, ca_file)
    ca_file.chmod(0o644)
    account = Account(public / "home")
    (account.home / "data").mkdir()
    (account.home / "data" / "file").write_text("precious")
    os.chown(account.home / "data", USER, USER)
    before = account.files()
    grant = ("--owner", "ada", "--grant", f"{client_id}:administrator", "--json")
    made = json.loads(relay.command("collection", "add", "Home", *grant))
    key, collection = made["setup_key"], made["collection_id"]

    script = subprocess.run(
        ["curl", "-fsS", "--cacert", ca_file, f"{relay.url}/install.sh"], capture_output=True, text=True, check=True
    ).stdout
    began = time.monotonic()
    options = ["--relay", relay.url, "--ca-file", str(ca_file), "--root", str(account.home / "data")]
    account.run("sh", "-s", "--", *options, text=script, TOWPATH_SETUP_KEY=key)
    figures["install, enrol and start s"] = time.monotonic() - began
    account.until(lambda: account.status()["link"]["connected"], "the link")

    signed_in = {"TOWPATH_CLIENT_SECRET": secret}
    login = [account.towpath, "login", "--relay", relay.url, "--ca-file", str(ca_file), "--client-id", client_id]
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

    # Idle cost.
    pid = account.status()["pid"]
    time.sleep(20)
    ticks = lambda: sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[11:13]))  # noqa: E731
    start_ticks, start = ticks(), time.monotonic()
    time.sleep(60)
    figures["idle CPU %"] = 100 * (ticks() - start_ticks) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - start)
    rss = found(r"VmRSS:\s+\d+", Path(f"/proc/{pid}/status").read_text())
    figures["idle RSS MiB"] = int(rss.split()[1]) / 1024
    began = time.monotonic()
    account.run(account.towpath, "stop")
    figures["stop s"] = time.monotonic() - began
    began = time.monotonic()
    account.run(account.towpath, "start")
    figures["start s"] = time.monotonic() - began

    # A second build, and a third that is broken.
    add(repository, keys, variant(built, tmp_path / "second", "0.1.1", root))
    repository.publish()
    updated = account.run(account.towpath, "update", "install")
    assert "Version 0.1.1 runs" in updated.stdout, updated
    assert account.status()["version"] == "0.1.1"
    add(repository, keys, variant(built, tmp_path / "third", "0.1.2", root, broken=True))
    repository.publish()
    failed = account.run(account.towpath, "update", "install", check=False)
    assert failed.returncode == 1
    assert "version 0.1.1 runs again" in failed.stderr, failed
    assert account.status()["version"] == "0.1.1"
    assert "newest" in account.run(account.towpath, "update", "check").stdout

    account.run("sh", str(account.home / ".local/share/towpath/install.sh"), "--uninstall")
    assert account.files() == before | {f"data/{name}" for name in ("copy", "in", "in/scan.tif", "out", "out/scan.tif")}
    print({name: round(value, 2) for name, value in figures.items()})
