"""The owner's socket: private, where it fits, and answering the owner's questions only."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from agent import local_socket
from agent.local_app import LocalApplication, local_app
from agent.local_server import serve_local
from agent.local_socket import LocalRefused, NotRunning
from agent.policy import Pause, Policy
from agent.storage.unavailable import unavailable
from protocol.control import TaskObserved
from protocol.errors import MAX_SENTENCE, TowpathError
from tests.agent.recorded_tasks import RecordedTasks

TASK = "00000000-0000-4000-8000-0000000000b1"


class FakeOwner:
    def __init__(self) -> None:
        self.calls: list[str] = []

    async def status(self) -> dict[str, Any]:
        return {"running": True, "pid": os.getpid()}

    async def reload(self) -> str:
        self.calls.append("reload")
        return "Read again."

    async def set_pause(self, pause: Pause) -> None:
        self.calls.append(f"pause {pause}")

    async def accept_root(self, collection_id: str) -> None:
        self.calls.append(f"accept {collection_id}")

    def watch_status(self) -> list[dict[str, Any]]:
        return [{"name": "scope"}]

    def watch_now(self, name: str, *, retry: bool) -> bool:
        self.calls.append(f"watch {name} {retry}")
        return name == "scope"

    def reconnect(self) -> None:
        self.calls.append("reconnect")

    def stop(self) -> None:
        self.calls.append("stop")


class World:
    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.owner = FakeOwner()
        self.tasks = RecordedTasks()

    async def ask(self, method: str, path: str) -> dict[str, Any]:
        return await trio.to_thread.run_sync(local_socket.ask, self.state_dir, method, path)


@asynccontextmanager
async def serving(state_dir: Path) -> AsyncIterator[World]:
    world = World(state_dir)
    listener, path = local_socket.listen(state_dir)
    application = LocalApplication(world.owner, world.tasks, Policy([]), list)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_local, listener, local_app(application))
        yield world
        nursery.cancel_scope.cancel()
    local_socket.forget(state_dir, path)


@pytest.fixture
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    (tmp_path / "runtime").mkdir(mode=0o700)
    (tmp_path / "s").mkdir(mode=0o700)
    return tmp_path / "s"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_the_owner_asks_and_the_agent_answers(state_dir: Path) -> None:
    async with serving(state_dir) as world:
        world.tasks.known[TASK] = TaskObserved(task_id=TASK, revision=1, state="ACTIVE")
        assert (await world.ask("GET", "/status"))["pid"] == os.getpid()
        assert (await world.ask("GET", "/collections")) == {"collections": []}
        (task,) = (await world.ask("GET", "/tasks"))["tasks"]
        assert task["task_id"] == TASK
        for path in ("/pause", "/drain", "/resume", "/relay/reconnect", "/reload", "/stop"):
            assert (await world.ask("POST", path))["message"]
        await world.ask("POST", f"/tasks/{TASK}/pause")
        await world.ask("POST", f"/tasks/{TASK}/resume")
        assert world.owner.calls == ["pause all", "pause new", "pause none", "reconnect", "reload", "stop"]
        assert world.tasks.calls == [("pause_task", TASK), ("resume_task", TASK)]


async def test_whoever_is_gone_before_it_is_known_who_it_was_ends_nothing(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[socket.socket] = []

    def gone(connection: socket.socket) -> int | None:
        asked.append(connection)
        raise OSError(errno.ENOTCONN, "not connected")

    async with serving(state_dir) as world:
        with monkeypatch.context() as patched:
            patched.setattr(local_socket, "peer_user", gone)
            with pytest.raises(NotRunning):
                await world.ask("GET", "/status")
        assert asked
        assert (await world.ask("GET", "/status"))["running"]


async def test_socket_and_directory_are_private(state_dir: Path) -> None:
    before = os.umask(0)
    try:
        async with serving(state_dir):
            path = local_socket.address(state_dir)
            assert path == state_dir / "control" / "agent.sock"
            assert (mode(path), mode(path.parent), mode(state_dir / "local.socket")) == (0o600, 0o700, 0o600)
    finally:
        os.umask(before)
    assert not path.exists()
    with pytest.raises(NotRunning):
        local_socket.ask(state_dir, "GET", "/status")


async def test_a_loose_directory_from_before_is_made_private(state_dir: Path) -> None:
    (state_dir / "control").mkdir(mode=0o777)
    (state_dir / "control").chmod(0o777)
    async with serving(state_dir) as world:
        assert mode(state_dir / "control") == 0o700
        assert (await world.ask("GET", "/status"))["running"]


async def test_a_long_state_path_moves_the_socket_to_the_runtime_directory(state_dir: Path, tmp_path: Path) -> None:
    long = state_dir / ("x" * 120)
    long.mkdir(mode=0o700)
    async with serving(long) as world:
        path = local_socket.address(long)
        assert path.is_relative_to(tmp_path / "runtime") or path.is_relative_to("/tmp")
        assert len(os.fsencode(path)) <= local_socket.MAX_ADDRESS
        assert (mode(path), mode(path.parent)) == (0o600, 0o700)
        assert (await world.ask("GET", "/status"))["running"]
    assert not path.parent.exists()


def test_two_long_state_paths_do_not_meet(state_dir: Path) -> None:
    places = [set(local_socket.places(state_dir / name)) for name in ("a" * 120, "b" * 120)]
    assert places[0].isdisjoint(places[1])


def test_somebody_elses_link_in_place_of_the_directory_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    (tmp_path / "trap").mkdir(mode=0o700)
    long = tmp_path / ("x" * 120)
    long.mkdir()
    # pytest's own directories may be too deep for the address of a socket.
    with tempfile.TemporaryDirectory(prefix="t") as short:
        monkeypatch.setattr("tempfile.gettempdir", lambda: short)
        *_, last = local_socket.places(long)
        last.parent.symlink_to(tmp_path / "trap")
        with pytest.raises(TowpathError, match="not a directory of this user"):
            local_socket.listen(long)
    assert not any((tmp_path / "trap").iterdir())


def test_the_client_asks_only_in_a_private_directory(state_dir: Path) -> None:
    listener, path = local_socket.listen(state_dir)
    with listener:
        path.parent.chmod(0o755)
        with pytest.raises(NotRunning, match="not private"):
            local_socket.ask(state_dir, "GET", "/status")
        path.parent.chmod(0o700)
        path.parent.rename(state_dir / "real")
        path.parent.symlink_to(state_dir / "real")
        with pytest.raises(NotRunning, match="not private"):
            local_socket.ask(state_dir, "GET", "/status")


def test_a_stale_socket_is_replaced(state_dir: Path) -> None:
    first, path = local_socket.listen(state_dir)
    first.close()
    with pytest.raises(NotRunning):
        local_socket.ask(state_dir, "GET", "/status")
    second, again = local_socket.listen(state_dir)
    assert again == path
    second.close()


async def test_another_user_gets_no_answer(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(state_dir) as world:
        monkeypatch.setattr(local_socket, "peer_user", lambda _: os.geteuid() + 1)
        with pytest.raises(NotRunning):
            await world.ask("POST", "/stop")
        assert world.owner.calls == []


def test_the_kernel_says_who_is_there() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert local_socket.peer_user(one) == os.geteuid()
    assert local_socket.is_allowed(os.geteuid())
    assert local_socket.is_allowed(0)
    assert not local_socket.is_allowed(os.geteuid() + 1)


async def raw(state_dir: Path, request: bytes) -> bytes:
    async with await trio.open_unix_socket(local_socket.address(state_dir)) as stream:
        await stream.send_all(request)
        received = b""
        async for chunk in stream:
            received += chunk
            if b"}" in received or b"\r\n\r\n" in received:
                break
        return received


async def test_a_web_page_cannot_control_the_agent(state_dir: Path) -> None:
    async with serving(state_dir) as world:
        answer = await raw(state_dir, b"POST /stop HTTP/1.1\r\nhost: agent\r\norigin: https://evil.example\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 403")
        assert world.owner.calls == []


async def test_garbage_on_the_socket_hurts_nobody(state_dir: Path) -> None:
    async with serving(state_dir) as world:
        for garbage in (b"\x00\xff\x16\x03\x01\r\n\r\n", b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n"):
            with trio.move_on_after(2):
                try:
                    await raw(state_dir, garbage)
                except trio.BrokenResourceError:
                    pass
        assert (await world.ask("GET", "/status"))["running"]


async def test_errors_are_sentences(state_dir: Path) -> None:
    async with serving(state_dir) as world:
        with pytest.raises(LocalRefused, match="'nonsense' is no id"):
            await world.ask("POST", "/tasks/nonsense/pause")
        with pytest.raises(LocalRefused, match="does not offer"):
            await world.ask("POST", f"/collections/{TASK}/accept-root")
        with pytest.raises(LocalRefused, match="404"):
            await world.ask("GET", "/nothing")

        async def away() -> str:
            raise unavailable("/srv/data", "cannot be found")

        async def far_away() -> str:
            raise unavailable("/srv/data", "x" * 2 * MAX_SENTENCE)

        world.owner.reload = far_away  # type: ignore[method-assign]
        with pytest.raises(LocalRefused) as caught:
            await world.ask("POST", "/reload")
        assert len(caught.value.sentence) == MAX_SENTENCE

        world.owner.reload = away  # type: ignore[method-assign]
        # Others are told no path of this machine; who asks here is its owner.
        with pytest.raises(LocalRefused, match="folder /srv/data cannot be found"):
            await world.ask("POST", "/reload")

        async def broken() -> str:
            raise RuntimeError("inner details")

        world.owner.reload = broken  # type: ignore[method-assign]
        with pytest.raises(LocalRefused, match="log says more") as caught:
            await world.ask("POST", "/reload")
        assert "inner details" not in json.dumps(str(caught.value))
