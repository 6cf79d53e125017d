"""A project that makes releases, a relay that passes them on, and accounts on which nothing of ours is there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from agent.demo.free_port import free_port
from agent.update.offer import this_platform
from agent.update.unpack import unpack_untrusted
from installers import build_bundle
from installers.release import add
from installers.repository import Keys, Repository
from tests.relay.sign_in_world import forms_of

USER = 12399
PASSWORD = "quiet boats go by"
PROGRAMS = Path(sys.executable).parent


def variant(base: Path, target: Path, version: str, root: Path, *, broken: bool = False) -> Path:
    """The same bundle under another version, with a pinned root; a broken one says its version and cannot run."""
    shutil.rmtree(target, ignore_errors=True)
    unpack_untrusted(base, target)
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
        with self.start(*command, **environment) as process:
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

    def __init__(self, folder: Path, namespace: str | None = None) -> None:
        """``namespace``: the network namespace to serve in, on its loopback; this machine's own if not given."""
        port = free_port()
        self.url = f"https://127.0.0.1:{port}"
        self.inside = ["ip", "netns", "exec", namespace] if namespace else []
        self.folder = folder
        self.releases = folder / "releases"
        where = ("--directory", str(folder), "--host", "127.0.0.1", "--port", str(port), "--url", self.url)
        self.command("init", *where, bare=True)
        with (folder / "relay.yaml").open("a") as file:
            file.write(f"\nupdates: {self.releases}\n")
        self.ca_file = folder / "tls" / "ca.pem"
        self.process = subprocess.Popen(
            [*self.inside, PROGRAMS / "towpath-relay", "--config", folder / "relay.yaml", "serve"]
        )

    def command(self, *arguments: str, bare: bool = False, text: str | None = None) -> str:
        config = [] if bare else ["--config", str(self.folder / "relay.yaml")]
        command = [str(PROGRAMS / "towpath-relay"), *config, *arguments]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=True, timeout=60).stdout

    def script(self) -> str:
        """install.sh, as anybody fetches it."""
        command = [*self.inside, "curl", "-fsS", "--cacert", self.ca_file, f"{self.url}/install.sh"]
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
