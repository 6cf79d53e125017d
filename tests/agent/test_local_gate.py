"""No web page and no other user controls the agent: foreign Origin, re-bound Host, missing token, symlinked socket."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from agent import local_socket
from agent.local_app import LocalApplication, local_app
from agent.local_gate import LOOPBACK_FILE, Loopback, listen_on_loopback, load_loopback, refusal
from agent.local_server import serve_local
from agent.local_socket import LocalRefused, NotRunning
from agent.policy import Policy
from tests.agent.recorded_tasks import RecordedTasks
from tests.agent.test_local_socket import FakeOwner

HOSTS = frozenset({b"127.0.0.1:4711"})
GOOD = [(b"host", b"127.0.0.1:4711"), (b"authorization", b"Bearer right")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({b"Origin": b"https://evil.example"}, "Web pages"),
        ({b"origin": b"null"}, "Web pages"),
        ({b"origin": b"http://127.0.0.1:4711"}, "Web pages"),
        ({b"sec-fetch-site": b"same-origin"}, "Web pages"),
        ({b"host": b"evil.example"}, "another host"),
        ({b"host": b"evil.example:4711"}, "another host"),
        ({b"host": b"localhost:4711"}, "another host"),
        ({b"host": b"127.0.0.1"}, "another host"),
        ({b"host": None}, "another host"),
        ({b"authorization": b"Bearer wrong"}, "token"),
        ({b"authorization": b"Basic cmlnaHQ="}, "token"),
        ({b"authorization": b"right"}, "token"),
        ({b"authorization": None}, "token"),
    ],
)
def test_what_passes_the_gate(changes: dict[bytes, bytes | None], words: str) -> None:
    headers = dict(GOOD) | changes
    found = refusal([(name, value) for name, value in headers.items() if value is not None], HOSTS, "right")
    assert (words in found) if words else found == ""


def test_a_header_given_twice_is_refused() -> None:
    assert refusal([*GOOD, (b"Host", b"127.0.0.1:4711")], HOSTS, "right")
    assert refusal([*GOOD, (b"Authorization", b"Bearer right")], HOSTS, "right")


@asynccontextmanager
async def on_loopback(state_dir: Path) -> AsyncIterator[tuple[Loopback, FakeOwner]]:
    owner = FakeOwner()
    listener, where = listen_on_loopback(state_dir)
    application = LocalApplication(owner, RecordedTasks(), Policy([]), list)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_local, listener, local_app(application), where)
        yield where, owner
        nursery.cancel_scope.cancel()


def request(port: int, headers: dict[str, str]) -> tuple[int, dict[str, object]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.putrequest("POST", "/relay/reconnect", skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.putheader("connection", "close")
        connection.endheaders()
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


async def test_the_loopback_api_answers_only_who_knows_the_token(tmp_path: Path) -> None:
    async with on_loopback(tmp_path) as (where, owner):
        assert (tmp_path / LOOPBACK_FILE).stat().st_mode & 0o777 == 0o600
        host = f"127.0.0.1:{where.port}"
        token = f"Bearer {where.token}"
        for headers in (
            {"host": host},
            {"host": host, "authorization": "Bearer x"},
            {"host": f"evil.example:{where.port}", "authorization": token},
            {"host": host, "authorization": token, "origin": "https://evil.example"},
        ):
            status, document = await trio.to_thread.run_sync(request, where.port, headers)
            assert (status, document["code"]) == (403, "PERMISSION_DENIED")
            assert where.token not in str(document)
        assert owner.calls == []
        answer = await trio.to_thread.run_sync(local_socket.ask, tmp_path, "GET", "/status")
        assert answer["pid"] == os.getpid()
        status, _ = await trio.to_thread.run_sync(request, where.port, {"host": host, "authorization": token})
        assert status == 200
        assert owner.calls == ["reconnect"]
        assert where.token not in repr(where)


async def test_the_host_counts_on_the_unix_socket_too(tmp_path: Path) -> None:
    owner = FakeOwner()
    listener, path = local_socket.listen(tmp_path)
    application = LocalApplication(owner, RecordedTasks(), Policy([]), list)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_local, listener, local_app(application))
        stream = await trio.open_unix_socket(str(path))
        async with stream:
            await stream.send_all(b"POST /stop HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n")
            with trio.fail_after(10):
                answer = b"".join([part async for part in stream])
        assert answer.startswith(b"HTTP/1.1 403")
        assert owner.calls == []
        nursery.cancel_scope.cancel()


def test_a_damaged_or_stale_loopback_file_is_no_agent(tmp_path: Path) -> None:
    (tmp_path / LOOPBACK_FILE).write_text("{")
    assert load_loopback(tmp_path) is None
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        (tmp_path / LOOPBACK_FILE).write_text(json.dumps({"port": unused.getsockname()[1], "token": "t"}))
        with pytest.raises(NotRunning):
            local_socket.ask(tmp_path, "GET", "/status", timeout=5)


def test_a_symlink_in_place_of_the_socket_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir(mode=0o700)
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "control" / "agent.sock").symlink_to(tmp_path / "victim")
    listener, path = local_socket.listen(tmp_path)
    listener.close()
    assert (tmp_path / "victim").read_text() == "precious"
    assert not path.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
async def test_another_user_of_the_machine_gets_nothing(tmp_path: Path) -> None:
    """Even with the directories open: the kernel tells who asks."""
    owner = FakeOwner()
    listener, path = local_socket.listen(tmp_path)
    application = LocalApplication(owner, RecordedTasks(), Policy([]), list)
    for folder in (tmp_path, *tmp_path.parents[:2], path.parent):
        folder.chmod(0o755)
    path.chmod(0o666)

    def ask_as_somebody_else() -> bytes:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setgid(12345)
                os.setuid(12345)
                channel = socket.socket(socket.AF_UNIX)
                channel.settimeout(10)
                channel.connect(str(path))
                channel.sendall(b"POST /stop HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n")
                os.write(writer, b"got " + channel.recv(100))
            except OSError as error:
                os.write(writer, f"failed {error.errno}".encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            said = stream.read()
        os.waitpid(child, 0)
        return said

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_local, listener, local_app(application))
        said = await trio.to_thread.run_sync(ask_as_somebody_else)
        assert said == b"got " or said.startswith(b"failed")
        assert owner.calls == []
        nursery.cancel_scope.cancel()


async def test_errors_of_the_loopback_api_are_the_agents_own(tmp_path: Path) -> None:
    async with on_loopback(tmp_path):
        with pytest.raises(LocalRefused, match="no such route"):
            await trio.to_thread.run_sync(local_socket.ask, tmp_path, "GET", "/nothing")
