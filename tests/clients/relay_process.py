"""A relay as a real process for the tests with real clients: its people, and the environment that points at it."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.demo.free_port import free_port

PATIENCE = 60.0
PASSWORD = "quiet boats go by"


@dataclass
class RelayProcess:
    """A running relay."""

    directory: Path
    port: int
    command: list[str]

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def ca_file(self) -> Path:
        return self.directory / "tls" / "ca.pem"

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.ca_file))

    def run(self, *arguments: str, text: str | None = None) -> str:
        """A command of the operator; its output."""
        done = subprocess.run([*self.command, *arguments], capture_output=True, text=True, timeout=PATIENCE, input=text)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def add_person(self, name: str, *more: str) -> str:
        """Somebody with the password `PASSWORD`; their id."""
        made = self.run("user", "add", name, "--password-file", "-", "--json", *more, text=PASSWORD)
        return str(json.loads(made)["id"])

    def environment(self, home: Path) -> dict[str, str]:
        """The variables that point Globus's clients here."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("GLOBUS_", "SSH_"))}
        services = ("TRANSFER", "GROUPS", "SEARCH", "TIMER", "FLOWS", "COMPUTE")
        return kept | {
            "HOME": str(home),
            "GLOBUS_SDK_SERVICE_URL_AUTH": f"{self.url}/",
            **{f"GLOBUS_SDK_SERVICE_URL_{service}": self.url for service in services},
            "GLOBUS_SDK_VERIFY_SSL": str(self.ca_file),
        }


def make_relay(directory: Path) -> RelayProcess:
    """A relay that is set up and not yet running."""
    port = free_port()
    command = [sys.executable, "-m", "relay.cli"]
    subprocess.run(
        [*command, "init", "--directory", str(directory), "--host", "127.0.0.1", "--port", str(port),
         "--url", f"https://localhost:{port}"],
        check=True, capture_output=True, timeout=PATIENCE,
    )  # fmt: skip
    return RelayProcess(directory, port, [*command, "--config", str(directory / "relay.yaml")])


@contextmanager
def serving(relay: RelayProcess) -> Iterator[RelayProcess]:
    """Run it; it must end without a traceback in its log."""
    log = relay.directory / "log"
    with log.open("w") as file, subprocess.Popen([*relay.command, "serve"], stderr=file) as process:
        deadline = time.monotonic() + PATIENCE
        while "Ready:" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        try:
            yield relay
            assert "Traceback" not in relay.log
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)
