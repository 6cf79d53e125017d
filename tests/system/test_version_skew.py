"""The previous release's agents and relay together with this one's: every pairing really transfers, and a task that was
begun by the old agent is finished by the new one from the old one's journal."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.cli.relay_client import Relay
from agent.demo import world as demo_world
from agent.demo.children import Child, warden
from agent.demo.world import World, open_world
from tests.agent.engine_inside import contents
from tests.system.previous_release import install
from tests.system.test_last_paths import connected, until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    yield install(tmp_path_factory.mktemp("previous"))


def fill(folder: Path, seed: int, huge: int) -> None:
    chance = random.Random(seed)
    for number in range(40):
        below = folder / "tree" / f"folder {number % 4}"
        below.mkdir(parents=True, exist_ok=True)
        (below / f"file-{number}").write_bytes(chance.randbytes(number * 997))
    (folder / "tree" / os.fsdecode(b"not utf-8 \xff")).write_bytes(b"named in bytes")
    (folder / "tree" / "link").symlink_to("large")
    (folder / "tree" / "large").write_bytes(chance.randbytes(9 * MIB + 17))
    with (folder / "huge").open("wb") as file:
        for _ in range(huge // MIB):
            file.write(chance.randbytes(MIB))


async def submit(made: World, source: str, destination: str, path: str, target: str, **options: Any) -> str:
    def send(relay: Relay) -> str:
        item = {"DATA_TYPE": "transfer_item", "source_path": path, "destination_path": target}
        document = {
            "DATA_TYPE": "transfer",
            "submission_id": relay.transfer.get_submission_id()["value"],
            "source_endpoint": made.sites[source].collection_id,
            "destination_endpoint": made.sites[destination].collection_id,
            "verify_checksum": True,
            "recursive_symlinks": "keep",
            "DATA": [item],
            **options,
        }
        return str(relay.transfer.submit_transfer(document)["task_id"])

    return await made.call(send)


async def both_ways(made: World, what: str) -> None:
    """A tree from alpha to beta and one from beta to alpha, whole and equal."""
    for source, destination in (("alpha", "beta"), ("beta", "alpha")):
        target = f"from {source} with {what}"
        task = await submit(made, source, destination, "/tree", f"/{target}")
        end = await until(made, task, lambda task: task["status"] in ("SUCCEEDED", "FAILED"))
        assert end["status"] == "SUCCEEDED", (what, end)
        assert end["files_transferred"] == 42
        arrived, sent = made.sites[destination].root / target, made.sites[source].root / "tree"
        assert contents(arrived) == contents(sent), what
        print(f"{what}: {source} to {destination}, {end['bytes_transferred']} bytes")


def run_by(child: Child, program: str) -> None:
    child.command = [program, *child.command[1:]]


async def upgrade(made: World, name: str, current: dict[str, str]) -> None:
    """Take this release for one of the world's processes, on the same state."""
    child = made.relay if name == "relay" else made.sites[name].child
    await child.stop()
    run_by(child, current["towpath-relay" if name == "relay" else "towpath"])
    await child.start()
    for site in made.sites:
        await connected(made, site)


async def test_old_and_new_agents_and_relays_transfer_with_each_other(
    tmp_path: Path, previous: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    current = {name: demo_world.program(name) for name in previous}
    monkeypatch.setattr(demo_world, "program", lambda name: str(previous[name]))
    roots = {name: tmp_path / f"{name}-root" for name in ("alpha", "beta")}
    for number, root in enumerate(roots.values()):
        root.mkdir()
        fill(root, number, 2000 * MIB if not number else 0)
    async with warden() as guard, open_world(tmp_path, roots, guard, lambda _text: None) as made:
        # Begun by the old agent, killed, and gone on with by the new one.
        task = await submit(made, "alpha", "beta", "/huge", "/huge")
        before = await until(made, task, lambda task: task["bytes_transferred"] > 20 * MIB)
        assert before["status"] == "ACTIVE", "too fast to be interrupted"
        await made.sites["beta"].child.kill()
        await upgrade(made, "beta", current)
        end = await until(made, task, lambda task: task["status"] in ("SUCCEEDED", "FAILED"))
        assert end["status"] == "SUCCEEDED", end
        with (roots["alpha"] / "huge").open("rb") as sent, (roots["beta"] / "huge").open("rb") as arrived:
            while block := sent.read(8 * MIB):
                assert arrived.read(8 * MIB) == block
            assert not arrived.read(1)
        codes = await made.call(lambda relay: [row["code"] for row in relay.transfer.task_event_list(task)])
        assert "JOURNAL_REBUILT" not in codes, codes
        print(f"begun by the old agent, finished by the new one: {end['bytes_transferred']} bytes")
        await both_ways(made, "an old relay, an old alpha and a new beta")
        await upgrade(made, "relay", current)
        await both_ways(made, "a new relay, an old alpha and a new beta")
        await upgrade(made, "alpha", current)
        await both_ways(made, "everything new")


async def test_an_old_relay_serves_two_new_agents(
    tmp_path: Path, previous: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = demo_world.program
    monkeypatch.setattr(
        demo_world, "program", lambda name: str(previous[name]) if name == "towpath-relay" else usual(name)
    )
    roots = {name: tmp_path / f"{name}-root" for name in ("alpha", "beta")}
    for number, root in enumerate(roots.values()):
        root.mkdir()
        fill(root, number, 0)
    async with warden() as guard, open_world(tmp_path, roots, guard, lambda _text: None) as made:
        await both_ways(made, "an old relay and new agents")
