"""The unmodified Globus CLI signs in with a client identity and asks who is who."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.demo.free_port import free_port
from tests.clients.calls import Calls

pytestmark = [pytest.mark.clients]

PATIENCE = 30.0


@dataclass
class World:
    """A running relay, a client identity on it, and the Globus CLI pointed at both."""

    relay: list[str]
    client_id: str
    environment: dict[str, str]
    globus_cli: str
    calls: Calls

    def globus(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.globus_cli, *arguments],
            capture_output=True, text=True, timeout=90, env={**self.environment, **more},
        )  # fmt: skip

    def answer(self, *arguments: str) -> str:
        done = self.globus(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        self.calls.append(arguments)
        return done.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, calls: Calls) -> Iterator[World]:
    binary = os.environ.get("GLOBUS_CLI")
    if not binary:
        pytest.skip("GLOBUS_CLI does not name the globus command; `make test` installs it and sets this")
    base = tmp_path_factory.mktemp("globus-cli")
    directory = base / "relay"
    port = free_port()
    command = [sys.executable, "-m", "relay.cli"]
    subprocess.run(
        [*command, "init", "--directory", str(directory), "--host", "127.0.0.1", "--port", str(port),
         "--url", f"https://localhost:{port}"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    command += ["--config", str(directory / "relay.yaml")]
    for name in ("ada", "bob"):
        subprocess.run([*command, "user", "add", name], check=True, capture_output=True, timeout=60)
    made = subprocess.run(
        [*command, "client", "add", "demo", "--json"], check=True, capture_output=True, text=True, timeout=60
    )
    account = json.loads(made.stdout)
    (base / "home").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GLOBUS_")} | {
        "HOME": str(base / "home"),
        "GLOBUS_CLI_CLIENT_ID": account["client_id"],
        "GLOBUS_CLI_CLIENT_SECRET": account["client_secret"],
        "GLOBUS_SDK_SERVICE_URL_AUTH": f"https://localhost:{port}/",
        "GLOBUS_SDK_SERVICE_URL_TRANSFER": f"https://localhost:{port}",
        "GLOBUS_SDK_SERVICE_URL_GROUPS": f"https://localhost:{port}",
        "GLOBUS_SDK_SERVICE_URL_FLOWS": f"https://localhost:{port}",
        "GLOBUS_SDK_VERIFY_SSL": str(directory / "tls" / "ca.pem"),
    }
    log = directory / "log"
    with log.open("w") as file, subprocess.Popen([*command, "serve"], stderr=file) as process:
        deadline = time.monotonic() + PATIENCE
        while "Ready:" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        try:
            yield World(command, account["client_id"], environment, binary, calls)
            assert "Traceback" not in log.read_text()
        finally:
            process.send_signal(signal.SIGTERM)


def test_whoami(world: World) -> None:
    assert world.answer("whoami").strip() == f"{world.client_id}@clients.auth.globus.org"
    document = json.loads(world.answer("whoami", "-F", "json"))
    assert document["sub"] == world.client_id
    assert document["name"] == "demo"
    assert [identity["sub"] for identity in document["identity_set"]] == [world.client_id]
    assert world.client_id in world.answer("whoami", "--linked-identities")


def test_get_identities(world: World) -> None:
    (ada,) = json.loads(world.answer("get-identities", "ada@localhost", "-F", "json"))["identities"]
    assert world.answer("get-identities", ada["id"]).strip() == "ada@localhost"
    both = world.answer("get-identities", "ada@localhost", "nobody@nowhere.example", "bob@localhost").split()
    assert both[0] == ada["id"]
    assert both[1] == "NO_SUCH_IDENTITY"
    table = world.answer("get-identities", "-v", world.client_id)
    assert f"{world.client_id}@clients.auth.globus.org" in table
    made = world.answer("get-identities", "--provision", "carol@localhost").strip()
    assert world.answer("get-identities", "carol@localhost").strip() == made


def test_session_show(world: World) -> None:
    shown = world.answer("session", "show")
    assert f"{world.client_id}@clients.auth.globus.org" in shown
    assert world.client_id in json.loads(world.answer("session", "show", "-F", "json"))["authentications"]


def test_api_and_errors(world: World) -> None:
    document = json.loads(world.answer("api", "auth", "GET", "/v2/oauth2/userinfo"))
    assert document["sub"] == world.client_id
    missing = world.globus("api", "transfer", "GET", "/v0.10/nothing")
    assert missing.returncode == 1
    assert "NotFound" in missing.stderr
    assert "Traceback" not in missing.stderr


@pytest.mark.parametrize("command", [("flows", "list"), ("group", "list")])
def test_services_that_are_not_offered_are_named(world: World, command: tuple[str, ...]) -> None:
    done = world.globus(*command)
    assert done.returncode == 1
    assert "does not offer" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_secret_is_told(world: World, tmp_path: Path) -> None:
    done = world.globus("whoami", GLOBUS_CLI_CLIENT_SECRET="wrong", HOME=str(tmp_path))
    assert done.returncode != 0
    assert "INVALID_CLIENT" in done.stderr
    assert "its secret is wrong" in done.stderr


def test_logout_ends_the_tokens(world: World, tmp_path: Path) -> None:
    home = str(tmp_path)
    assert world.globus("whoami", HOME=home).returncode == 0
    (storage,) = tmp_path.rglob("storage.db")
    with sqlite3.connect(storage) as database:
        rows = [json.loads(row[0]) for row in database.execute("SELECT token_data_json FROM token_storage")]
    database.close()
    token = rows[0]["access_token"]
    assert world.globus("logout", "--yes", HOME=home).returncode == 0
    world.calls.append(("logout", "--yes"))
    done = world.globus("api", "auth", "GET", "/v2/oauth2/userinfo", "--no-retry", HOME=home)
    assert done.returncode == 0, "a client identity gets new tokens by itself"
    request = urllib.request.Request(
        world.environment["GLOBUS_SDK_SERVICE_URL_AUTH"] + "v2/oauth2/userinfo",
        headers={"Authorization": f"Bearer {token}"},
    )
    context = ssl.create_default_context(cafile=world.environment["GLOBUS_SDK_VERIFY_SSL"])
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, context=context, timeout=30)
    caught.value.close()
    assert caught.value.code == 401
