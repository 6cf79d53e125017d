"""A machine of its own for tests: a minimal Debian with systemd as its first process, in a container that keeps its
files over reboots. The network is a namespace that holds nothing but its loopback."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Small, and what every desktop and server has: sessions, the user's bus, the right to let one's services linger.
PACKAGES = (
    "systemd-sysv",
    "dbus-user-session",
    "libpam-systemd",
    "polkitd",
    "curl",
    "openssl",
    "ca-certificates",
    "procps",
)
TOOLS = ("mmdebstrap", "systemd-nspawn", "apt-get", "ip", "nsenter")
COMMAND_TIMEOUT = 300


def why_not() -> str:
    """Why there can be no such machine here; empty if there can."""
    if os.geteuid() != 0:
        return "needs root, to boot a container"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"needs {', '.join(missing)} (packages mmdebstrap and systemd-container)" if missing else ""


def image() -> Path:
    """The root file system, made once from where this machine's own packages come from, kept in a temporary folder."""
    asked = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    sources = [line.split() for line in asked.stdout.splitlines()]
    suites = [(mirror, suite) for mirror, suite in sources if "-" not in suite]
    assert suites, "apt has no index yet: apt-get update"
    mirror, suite = suites[0]
    digest = hashlib.sha256(" ".join((mirror, suite, *PACKAGES)).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"towpath-debian-{digest}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    assert folder.stat().st_uid == 0
    root = folder / "root"
    if not root.exists():
        making = folder / "making"
        shutil.rmtree(making, ignore_errors=True)
        command = [
            "mmdebstrap",
            "--quiet",
            "--variant=minbase",
            f"--include={','.join(PACKAGES)}",
            suite,
            making,
            mirror,
        ]
        made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
        assert made.returncode == 0, made.stderr[-2000:]
        making.rename(root)
    return root


class Machine:
    """A computer that can be switched on, restarted and unplugged. Files below ``root`` are there while it is off."""

    def __init__(self, folder: Path, name: str, namespace: str) -> None:
        self.name = name
        self.namespace = namespace
        self.root = folder / "root"
        layers = {layer: folder / layer for layer in ("upper", "work")}
        for path in (self.root, *layers.values()):
            path.mkdir()
        options = f"lowerdir={image()},upperdir={layers['upper']},workdir={layers['work']}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, self.root], check=True)
        # Data is on a file system of its own, as on any such machine; inodes of an overlay do not last.
        for path in (folder / "data", self.root / "data"):
            path.mkdir()
        subprocess.run(["mount", "--bind", folder / "data", self.root / "data"], check=True)
        self.container: subprocess.Popen[bytes] | None = None
        self.console = folder / "console.log"

    def boot(self) -> None:
        """Switch it on and wait until systemd has started everything."""
        with self.console.open("ab") as log:
            self.container = subprocess.Popen(
                [
                    "systemd-nspawn", "--boot", "--directory", self.root, "--machine", self.name, "--register=no",
                    "--keep-unit", "--console=read-only", f"--network-namespace-path=/run/netns/{self.namespace}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # One hierarchy of control groups, as any current system has it, whatever is mounted on the host.
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            )  # fmt: skip
        until(self._is_up, "the machine to boot", 120)

    def _is_up(self) -> bool:
        assert self.container is not None
        assert self.container.poll() is None, self.console.read_text(errors="replace")[-3000:]
        state = self.run("systemctl", "is-system-running", check=False).stdout.strip() if self._leader() else ""
        assert state != "degraded", self.run("systemctl", "--failed").stdout
        return bool(state == "running")

    def _leader(self) -> int:
        """Its first process, as the host numbers it; 0 while there is none."""
        assert self.container is not None
        children = Path(f"/proc/{self.container.pid}/task/{self.container.pid}/children").read_text().split()
        for child in map(int, children):
            with contextlib.suppress(OSError):
                if os.path.basename(os.readlink(f"/proc/{child}/exe")) == "systemd":
                    return child
        return 0

    def run(
        self, *command: str, text: str | None = None, check: bool = True, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """As root."""
        result = subprocess.run(
            ["nsenter", "--target", str(self._leader()), "--all", "--", *command],
            input=text, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", **(environment or {})},
        )  # fmt: skip
        assert not check or result.returncode == 0, (command, result.stdout, result.stderr)
        return result

    def shut_down(self) -> float:
        """Switch it off as a person would; seconds that took."""
        began = time.monotonic()
        self.run("systemctl", "poweroff")
        assert self.container is not None
        self.container.wait(90)
        return time.monotonic() - began

    def unplug(self) -> None:
        """No process of it lives on, none is told, as when the power fails."""
        assert self.container is not None
        os.kill(self._leader(), signal.SIGKILL)
        self.container.wait(30)

    def close(self) -> None:
        """End it, whatever it does."""
        if self.container is not None and self.container.poll() is None:
            if leader := self._leader():
                os.kill(leader, signal.SIGKILL)
            else:
                self.container.kill()
            self.container.wait(30)
        subprocess.run(["umount", "--recursive", self.root], check=True)

    def properties(self, unit: str, *names: str, user: User | None = None) -> dict[str, str]:
        """What the service manager knows of a unit; the user's own one if a user is given."""
        words = ["systemctl", *(["--user"] if user else []), "show", unit, f"--property={','.join(names)}"]
        said = (user.run if user else self.run)(*words).stdout
        return dict(line.split("=", 1) for line in said.splitlines())


class User:
    """Somebody who signs in on the machine for each command, and signs out."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine = machine
        self.name = name
        machine.run("useradd", "--create-home", "--shell", "/bin/sh", name)
        self.home = machine.root / "home" / name
        self.towpath = f"/home/{name}/.local/bin/towpath"

    def run(self, *command: str, text: str | None = None, check: bool = True, **environment: str) -> Any:
        """Variables do not become arguments, which all users of a machine see."""
        quoted = " ".join(f"'{word}'" for word in command)
        words = ["su", "--login", self.name, f"--whitelist-environment={','.join(environment)}", "--command", quoted]
        return self.machine.run(*words, text=text, check=check, environment=environment)

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.run(self.towpath, "status", "-F", "json", check=False).stdout)
        return document

    def states(self) -> list[str]:
        return [task["state"] for task in self.status().get("tasks", [])]

    def moved(self) -> int:
        tasks = self.status().get("tasks", [])
        return sum(task["counters"]["bytes_transferred"] for task in tasks if task["state"] == "ACTIVE")

    def linked(self) -> bool:
        return bool(self.status().get("link", {}).get("connected"))

    def files(self) -> set[str]:
        return {str(path.relative_to(self.home)) for path in self.home.rglob("*")}


def until(condition: Callable[[], object], what: str, seconds: float = 90) -> None:
    """Wait for something that processes outside the test's reach do."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)


@contextlib.contextmanager
def network_namespace(name: str) -> Iterator[str]:
    """One with a loopback and nothing else."""
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)
