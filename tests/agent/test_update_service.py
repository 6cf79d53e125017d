"""The agent looks for updates by itself, and changes only when and where that disturbs nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.cli.update import LocalAgent
from agent.config.keys import AgentConfig, UpdateConfig
from agent.update.install import Installation
from agent.update.mirror import Mirror
from agent.update.offer import UpdateRefused
from agent.update.service import UpdateService
from agent.update.supervisor import DETACHED, NotReplaceable, check_changeable, own_unit
from protocol.errors import TowpathError
from tests.agent.update_world import FakeAgent, World, changed


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture(autouse=True)
def _no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The virtual clock would run away while a thread works."""

    async def inline(function: Callable[..., Any], *arguments: object) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    monkeypatch.setattr("agent.update.service.trio.to_thread.run_sync", inline)


class Service:
    """The service of a daemon on a virtual clock, and what it began."""

    def __init__(self, world: World, mode: str = "auto", *, busy_until: float = 0.0) -> None:
        self.begun: list[tuple[str, float]] = []
        self.asked = 0
        self.refusal: TowpathError | None = None

        def ask(*_: object) -> Mirror:
            self.asked += 1
            return world.mirror()

        def check() -> None:
            if self.refusal is not None:
                raise self.refusal

        def begin(_installation: Installation, version: str, _config_file: Path) -> None:
            self.begun.append((version, trio.current_time() - self.start))

        self.start = trio.current_time()
        self.busy_until = self.start + busy_until
        self.service = UpdateService(
            self.config(mode),
            Path("agent.yaml"),
            "node",
            "https://mirror.example",
            lambda: trio.current_time() < self.busy_until,
            lambda: 1000.0,
            installation=world.installation,
            ask=ask,
            check=check,
            begin=begin,
        )

    @staticmethod
    def config(mode: str) -> AgentConfig:
        return AgentConfig(state_dir=Path("/nowhere"), update=UpdateConfig(mode=mode, interval=3600))

    async def run(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self.service.run()


async def test_the_agent_finds_fetches_and_changes_by_itself(world: World, autojump_clock: object) -> None:
    service = Service(world)
    await service.run(4000)
    assert service.begun == []
    world.publish("0.2.0")
    await service.run(4000)
    # Nobody has changed it here, so a second look may begin it again.
    assert {version for version, _ in service.begun} == {"0.2.0"}
    assert (world.installation.versions / "0.2.0").is_dir()
    assert world.installation.running() == "0.1.0", "only the process that watches it may switch"


@pytest.mark.parametrize(("mode", "told"), [("notify", "0.2.0"), ("off", "")])
async def test_notify_only_tells_and_off_does_not_look(
    world: World, autojump_clock: object, mode: str, told: str
) -> None:
    world.publish("0.2.0")
    service = Service(world, mode)
    await service.run(10_000)
    assert service.begun == []
    assert service.service.available == told
    assert (service.asked == 0) == (mode == "off")
    assert not (world.installation.versions / "0.2.0").exists()


async def test_nothing_changes_while_data_moves_except_after_a_day(world: World, autojump_clock: object) -> None:
    world.publish("0.2.0")
    service = Service(world, busy_until=30_000)
    await service.run(40_000)
    (begun,) = [at for _, at in service.begun][:1]
    assert begun >= 30_000
    patient = Service(world, busy_until=10 * 86400)
    await patient.run(2 * 86400)
    assert 86400 <= patient.begun[0][1] < 86400 + 7200, "the tasks are checkpointed then, and go on afterwards"


async def test_switching_updates_off_counts_while_it_waits(world: World, autojump_clock: object) -> None:
    world.publish("0.2.0")
    service = Service(world, busy_until=50_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.run, 100_000)
        await trio.sleep(20_000)
        service.service.config = service.config("off")
    assert service.begun == []


async def test_a_shorter_interval_counts_at_once(world: World, autojump_clock: object) -> None:
    world.publish("0.2.0")
    service = Service(world)
    service.service.config = AgentConfig(state_dir=Path("/nowhere"), update=UpdateConfig(interval=30 * 86400))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.run, 4000)
        await trio.sleep(1000)
        assert service.asked == 1
        service.service.config = AgentConfig(state_dir=Path("/nowhere"), update=UpdateConfig(interval=300))
        await trio.sleep(100)
        assert service.asked == 2


async def test_a_release_for_a_share_waits_for_the_others(world: World, autojump_clock: object) -> None:
    world.publish("0.2.0", share=0)
    service = Service(world)
    await service.run(8000)
    assert (service.begun, service.service.available) == ([], "0.2.0")
    world.publish("0.2.0", share=100)
    await service.run(8000)
    assert service.begun[0][0] == "0.2.0"


async def test_who_would_not_come_back_is_only_told(world: World, autojump_clock: object) -> None:
    world.publish("0.2.0")
    service = Service(world)
    service.refusal = NotReplaceable("Somebody else starts it.")
    await service.run(8000)
    assert (service.begun, service.service.available) == ([], "0.2.0")
    assert not (world.installation.versions / "0.2.0").exists()


async def test_a_mirror_that_is_away_or_lies_does_not_end_the_looking(world: World, autojump_clock: object) -> None:
    world.publish("0.2.0")
    answers: list[Iterator[bytes]] = [iter([b"lies"])]
    world.web.twist = lambda asked: answers.pop() if answers else None
    service = Service(world)
    await service.run(10_000)
    assert service.asked >= 2
    assert service.begun[0][0] == "0.2.0"


def test_a_failed_version_is_remembered_whoever_looks_meanwhile(world: World) -> None:
    """The broken version's own looking must not overwrite what the process that watches it writes down."""
    world.publish("0.2.0")
    world.fetch()

    class Looking(FakeAgent):
        def stop(self) -> None:
            super().stop()
            world.look()

    agent = Looking(world.installation, v0_2_0="mute")
    with pytest.raises(UpdateRefused):
        changed(world, agent)
    assert world.look() is None
    assert world.installation.state().failed == ["0.2.0"]


UNIT = "towpath-agent.service"


@pytest.mark.parametrize(
    ("cgroups", "unit"),
    [
        ("0::/user.slice/user@1000.service/app.slice/towpath-agent.service\n", (UNIT, True)),
        ("0::/system.slice/towpath\\x2dagent.slice/towpath-agent@ada.service\n", ("towpath-agent@ada.service", False)),
        ("1:name=systemd:/user.slice/user@1000.service/towpath-agent.service\n", (UNIT, True)),
        ("0::/user.slice/user-1000.slice/session-3.scope\n", None),
        ("4:cpu:/towpath-agent.service\n", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_unit_is_known_by_where_the_process_lies(cgroups: str, unit: tuple[str, bool] | None) -> None:
    assert own_unit(cgroups) == unit


def test_only_agents_that_somebody_starts_again_are_replaced(tmp_path: Path) -> None:
    file = tmp_path / "cgroup"
    file.write_text("0::/user@1000.service/towpath-agent.service\n")
    assert check_changeable(file, {}) is True
    file.write_text("0::/system.slice/towpath-agent@ada.service\n")
    with pytest.raises(NotReplaceable, match="administers"):
        check_changeable(file, {DETACHED: "1"})
    file.write_text("0::/\n")
    assert check_changeable(file, {DETACHED: "1"}) is False
    assert check_changeable(tmp_path / "none", {"XPC_SERVICE_NAME": "org.towpath.agent"}) is False
    with pytest.raises(NotReplaceable, match="foreground"):
        check_changeable(file, {})


def test_the_service_manager_is_asked_only_for_the_agent_that_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user may have one agent as a service and another one besides."""
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/calls\ncase $2 in show) echo 4711 ;; esac\n')
    systemctl.chmod(0o755)
    started = tmp_path / "current" / "bin" / "towpath"
    started.parent.mkdir(parents=True)
    started.write_text(f'#!/bin/sh\necho "towpath $1" >>{tmp_path}/calls\n')
    started.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for pid, call in ((4711, "--user start towpath-agent.service"), (4712, "towpath start")):
        monkeypatch.setattr(LocalAgent, "status", lambda _self, pid=pid: {"pid": pid})
        agent = LocalAgent(tmp_path / "agent.yaml", tmp_path / "current")
        (tmp_path / "calls").unlink()
        agent.start()
        assert (tmp_path / "calls").read_text().splitlines()[-1] == call
