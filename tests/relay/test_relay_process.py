"""The relay as a real process: set up by its command, killed at any moment, started again, ended by a signal."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import trio

from agent.demo.free_port import free_port

PATIENCE = 30.0
RELAY = (sys.executable, "-m", "relay.cli")


@dataclass
class RelayProcess:
    """One relay directory and the process that serves it, if one does."""

    directory: Path
    port: int
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def command(self) -> tuple[str, ...]:
        return (*RELAY, "--config", str(self.directory / "relay.yaml"))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *arguments], capture_output=True, text=True, timeout=60, env=self.environment
        )

    def document(self, *arguments: str) -> dict[str, str]:
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        document: dict[str, str] = json.loads(done.stdout)
        return document

    def start(self) -> None:
        """Start serving; returns when the relay says that it is ready."""
        log = (self.directory / "log").open("a")
        with log:
            self.process = subprocess.Popen([*self.command, "serve"], stderr=log, text=True, env=self.environment)
        size = 0 if not hasattr(self, "_seen") else self._seen
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            text = (self.directory / "log").read_text()
            if "Ready:" in text[size:]:
                self._seen = len(text)
                return
            assert self.process.poll() is None, text[size:]
            time.sleep(0.05)
        pytest.fail(f"The relay was not ready in {PATIENCE} s: {text[size:]}")

    def stop(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        self.process = None
        return code

    def http(self) -> httpx.AsyncClient:
        context = ssl.create_default_context(cafile=str(self.directory / "tls" / "ca.pem"))
        return httpx.AsyncClient(base_url=self.url, verify=context, timeout=PATIENCE)


@pytest.fixture(scope="session")
def first_relay(tmp_path_factory: pytest.TempPathFactory) -> RelayProcess:
    """A relay as the command leaves it; it is copied, and never runs."""
    made = RelayProcess(tmp_path_factory.mktemp("first") / "relay", free_port())
    done = subprocess.run(
        [*RELAY, "init", "--directory", str(made.directory), "--host", "127.0.0.1", "--port", str(made.port),
         "--url", made.url],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "serve" in done.stdout
    return made


@pytest.fixture
def relay(first_relay: RelayProcess, tmp_path: Path) -> Iterator[RelayProcess]:
    """A relay that is set up and not yet running."""
    made = RelayProcess(tmp_path / "relay", free_port())
    shutil.copytree(first_relay.directory, made.directory)
    configuration = made.directory / "relay.yaml"
    configuration.write_text(configuration.read_text().replace(str(first_relay.port), str(made.port)))
    yield made
    if made.process is not None:
        made.stop(signal.SIGKILL)


# What a request still had to send when its relay was killed is left to the collector by the client's library.
@pytest.mark.filterwarnings("ignore:Exception ignored in. .async_generator object ByteStream.__aiter__")
async def test_nothing_acknowledged_is_lost_to_kills(relay: RelayProcess) -> None:
    chance = random.Random(20260101)
    relay.start()
    account = relay.document("client", "add", "program")
    auth = (account["client_id"], account["client_secret"])
    given: list[str] = []
    revoked: list[str] = []

    async def sign_in(http: httpx.AsyncClient) -> None:
        form = {"grant_type": "client_credentials", "scope": "openid"}
        while True:
            try:
                answer = await http.post("/v2/oauth2/token", data=form, auth=auth)
                token = answer.json()["access_token"]
                if len(given) <= 3 * len(revoked):
                    given.append(token)
                else:
                    await http.post("/v2/oauth2/token/revoke", data={"token": token}, auth=auth)
                    revoked.append(token)
            except httpx.TransportError:
                return

    async def check() -> None:
        async with relay.http() as http:
            for tokens, active in ((given, True), (revoked, False)):
                for token in tokens:
                    answer = await http.post("/v2/oauth2/token/introspect", data={"token": token}, auth=auth)
                    assert answer.json()["active"] is active

    for _ in range(3):
        before = len(given)
        async with relay.http() as http, trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(sign_in, http)
            while len(given) < before + 8:
                await trio.sleep(0.02)
            await trio.sleep(chance.random() * 0.3)
            relay.stop(signal.SIGKILL)
        relay.start()
    await check()
    assert len(given) >= 24
    assert revoked


WRITER = """
import sys, time, trio
from functools import partial
from relay.auth.clients import add_client, new_digest
from relay.settings import load
from relay.store.database import Store

async def main():
    store = Store(load(__import__('pathlib').Path(sys.argv[1])).database_url)
    _, digest = new_digest()
    while True:
        client, _ = await store.write(partial(add_client, name='x', now=time.time(), digest=digest))
        print(client.id, flush=True)

trio.run(main)
"""


def test_clients_added_by_a_killed_process_are_there_whole(relay: RelayProcess) -> None:
    acknowledged: set[str] = set()
    for enough in (1, 7, 23):
        command = [sys.executable, "-c", WRITER, str(relay.directory / "relay.yaml")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for line in writer.stdout:
                acknowledged.add(line.strip())
                if len(acknowledged) >= enough:
                    break
            writer.kill()
            acknowledged |= {line.strip() for line in writer.stdout if line.endswith("\n")}
    with sqlite3.connect(relay.directory / "relay.sqlite") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        clients = {row[0] for row in database.execute("SELECT id FROM clients")}
        identities = {row[0] for row in database.execute("SELECT id FROM identities")}
        secrets = {row[0] for row in database.execute("SELECT client_id FROM client_secrets")}
    database.close()
    assert acknowledged <= clients
    # A client without its identity or secret would be half a client.
    assert clients == identities == secrets


def test_a_kill_during_the_first_start_is_made_good_by_the_next(tmp_path: Path) -> None:
    for delay in (0.25, 0.4, 0.5, 0.6, 0.7):
        command = [*RELAY, "init", "--directory", str(tmp_path / "relay"), "--port", "18443"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            time.sleep(delay)
            process.kill()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    checked = subprocess.run(
        [*RELAY, "--config", str(tmp_path / "relay" / "relay.yaml"), "root", "show"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stderr
    assert "certified until" in checked.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_relay_cleanly_and_systemd_is_told(
    relay: RelayProcess, tmp_path: Path, number: signal.Signals
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(PATIENCE)
        relay.environment["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        relay.start()
        assert systemd.recv(100) == b"READY=1"
        assert relay.stop(number) == 0
        assert systemd.recv(100) == b"STOPPING=1"
    log = (relay.directory / "log").read_text()
    assert log.rstrip().endswith("Ended.")
    assert "Traceback" not in log
    # Everything is in the one file again: SQLite has taken its log in.
    assert not (relay.directory / "relay.sqlite-wal").exists()


def test_a_reload_takes_up_a_certificate_at_once(relay: RelayProcess) -> None:
    """Whoever renews certificates, or rotates logs, sends SIGHUP, which ends what does not know it."""
    relay.start()
    assert relay.process is not None
    address = ("localhost", relay.port)
    before = ssl.get_server_certificate(address)
    (relay.directory / "tls" / "server.pem").unlink()
    relay.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + PATIENCE
    while ssl.get_server_certificate(address) == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ssl.get_server_certificate(address) != before
    assert relay.process.poll() is None
    assert "counts from the next start on" in (relay.directory / "log").read_text()


async def test_requests_under_way_are_finished_at_the_end(relay: RelayProcess) -> None:
    relay.start()
    account = relay.document("client", "add", "program")
    form = {"grant_type": "client_credentials", "scope": "openid"}
    statuses = []

    async def sign_in(http: httpx.AsyncClient) -> None:
        answer = await http.post("/v2/oauth2/token", data=form, auth=(account["client_id"], account["client_secret"]))
        statuses.append(answer.status_code)

    async with relay.http() as http, trio.open_nursery() as nursery:
        # All connections stand before it counts: on a busy machine their handshakes take longer than the pause below.
        async with trio.open_nursery() as connecting:
            for _ in range(8):
                connecting.start_soon(http.get, "/towpath/v1/relay")
        for _ in range(8):
            nursery.start_soon(sign_in, http)
        await trio.sleep(0.15)
        assert relay.process is not None
        relay.process.send_signal(signal.SIGTERM)
    assert statuses == [200] * 8
    assert relay.process.wait(PATIENCE) == 0
    relay.process = None


def test_one_relay_for_one_directory(relay: RelayProcess) -> None:
    relay.start()
    second = relay.run("serve")
    assert second.returncode == 1
    assert relay.process is not None
    assert f"process {relay.process.pid}" in second.stderr
    assert "Traceback" not in second.stderr


async def test_http_on_the_port(relay: RelayProcess) -> None:
    relay.start()
    async with relay.http() as http:
        answer = await http.get("/v0.10/nothing")
        date = time.strptime(answer.headers["date"], "%a, %d %b %Y %H:%M:%S GMT")
        assert abs(time.time() - (time.mktime(date) - time.timezone)) < 60
        assert answer.headers["x-transfer-api-version"] == "0.10"
        assert "server" not in answer.headers
        assert (await http.get("/openapi.json")).json()["info"]["title"] == "Towpath relay"
    async with httpx.AsyncClient() as plain:
        answer = await plain.get(f"http://localhost:{relay.port}/")
        assert answer.status_code == 400
        assert "HTTPS" in answer.text


def test_accounts_are_added_beside_a_running_relay(relay: RelayProcess) -> None:
    relay.start()
    ada = relay.document("user", "add", "Ada", "--full-name", "Ada L.")
    assert ada["username"] == "ada@localhost"
    account = relay.document("client", "add", "program", "--owner", "ada")
    assert account["owner_id"] == ada["id"]
    grant = f"{account['client_id']}:administrator"
    made = relay.document("collection", "add", "Data", "--owner", "ada", "--grant", grant)
    assert made["setup_key"].startswith("twp-")
    more = relay.document("client", "add-secret", account["client_id"])
    assert relay.run("client", "remove-secret", account["client_id"], account["secret_id"]).returncode == 0
    (listed,) = json.loads(relay.run("client", "list", "--json").stdout)
    assert listed["secret_ids"] == [more["secret_id"]]
    # Secrets are shown once and leave no trace in the log.
    log = (relay.directory / "log").read_text()
    for secret in (account["client_secret"], more["client_secret"], made["setup_key"]):
        assert secret not in log


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("user", "add", "a b"), "is no username"),
        (("client", "add", "x", "--owner", "nobody"), "There is no user or client 'nobody'"),
        (("collection", "add", "x", "--owner", "nobody"), "There is no user or client 'nobody'"),
        (("client", "add-secret", "x"), "There is no client x"),
        (("client", "remove-secret", "x", "y"), "has no secret"),
        (("root", "move", "{directory}/relay.yaml"), "exists already"),
        (("backup", "{directory}/relay.yaml"), "exists already"),
        (("restore", "{directory}/relay.yaml"), "cannot be read"),
    ],
)
def test_mistakes_on_the_command_line_get_one_sentence(
    relay: RelayProcess, arguments: tuple[str, ...], complaint: str
) -> None:
    done = relay.run(*(argument.format(directory=relay.directory) for argument in arguments))
    assert done.returncode == 1
    assert complaint in done.stderr
    assert done.stderr.startswith("towpath-relay: ")
    assert "Traceback" not in done.stderr


def test_a_mistake_in_the_configuration_is_named(relay: RelayProcess) -> None:
    path = relay.directory / "relay.yaml"
    path.write_text(path.read_text() + "lissten: 1\n")
    for command in (("serve",), ("config", "check"), ("user", "list")):
        done = relay.run(*command)
        assert done.returncode == 1
        assert "there is no key lissten" in done.stderr
    assert "Traceback" not in done.stderr
