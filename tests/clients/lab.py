"""A whole world (relay, two agents, real files) with the unmodified globus command pointed at it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.clients.calls import Calls

UP = 60.0
PATIENCE = 60.0


@dataclass
class Lab:
    """The world, and the globus command pointed at it."""

    document: dict[str, Any]
    environment: dict[str, str]
    alpha: str
    beta: str
    # Every call that ended as it should, for the check of docs/globus-cli.md.
    calls: Calls

    def run(self, *words: str, code: int = 0, text: str | None = None) -> str:
        result = subprocess.run(
            [os.environ["GLOBUS_CLI"], *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            input=text,
            check=False,
        )
        assert result.returncode == code, (words, result.stdout, result.stderr)
        self.calls.append(words)
        return result.stdout + result.stderr

    def json(self, *words: str, text: str | None = None) -> Any:
        return json.loads(self.run(*words, "-F", "json", text=text))

    def root(self, name: str) -> Path:
        return Path(self.document["endpoints"][name]["root"])

    def transfer(self, *words: str, code: int = 0, text: str | None = None) -> dict[str, Any]:
        task = self.json("transfer", *words, text=text)["task_id"]
        self.run("task", "wait", task, "--timeout", "60", "--polling-interval", "1", code=code)
        return dict(self.json("task", "show", task))

    def wait(self, task: str, *, code: int = 0) -> dict[str, Any]:
        self.run("task", "wait", task, "--timeout", "60", "--polling-interval", "1", code=code)
        return dict(self.json("task", "show", task))

    def towpath(self, *words: str | Path, code: int = 0, **more: str) -> str:
        """Our own command, in the same environment."""
        command = [Path(sys.executable).with_name("towpath"), *words]
        result = subprocess.run(
            command, env={**self.environment, **more}, capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == code, (words, result.stdout, result.stderr)
        return result.stdout + result.stderr


def eventually(met: Callable[[], Any]) -> Any:
    """What ``met`` returns as soon as that is true."""
    deadline = time.monotonic() + PATIENCE
    while True:
        found = met()
        if found:
            return found
        assert time.monotonic() < deadline, "this never came true"
        time.sleep(0.2)


@contextmanager
def open_lab(directory: Path, calls: Calls) -> Iterator[Lab]:
    """Bring the world up; it ends with the block."""
    file = directory / "world.json"
    towpath = Path(sys.executable).with_name("towpath")
    command = [towpath, "demo", "--keep", "--skip-transfer", "--json", file, "--directory", directory / "demo"]
    # What it prints are the lines with which people use the world, the program's secret among them: no log.
    with (directory / "demo.log").open("wb") as log, (directory / "demo-output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + UP
        while not file.exists():
            assert process.poll() is None, (directory / "demo.log").read_text()
            assert time.monotonic() < deadline, (directory / "demo.log").read_text()
            time.sleep(0.1)
        document = json.loads(file.read_text())
        url = document["relay_url"]
        home = directory / "home"
        home.mkdir()
        services = ("TRANSFER", "GROUPS", "SEARCH", "TIMER", "FLOWS", "COMPUTE")
        yield Lab(
            document,
            {
                "PATH": os.environ["PATH"],
                "HOME": str(home),
                "GLOBUS_SDK_SERVICE_URL_AUTH": f"{url}/",
                **{f"GLOBUS_SDK_SERVICE_URL_{name}": url for name in services},
                "GLOBUS_SDK_VERIFY_SSL": document["ca_file"],
                "GLOBUS_CLI_CLIENT_ID": document["client_id"],
                "GLOBUS_CLI_CLIENT_SECRET": document["client_secret"],
                "GLOBUS_CLI_INTERACTIVE": "0",
            },
            document["endpoints"]["alpha"]["collection_id"],
            document["endpoints"]["beta"]["collection_id"],
            calls,
        )
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
