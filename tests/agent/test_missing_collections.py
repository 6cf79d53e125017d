"""Collections that the relay does not have any more: their owner is told, and nothing on this machine changes."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from agent import local_socket
from agent.availability import MISSING
from agent.cli import service
from agent.cli.collection import collection as collection_command
from agent.config.keys import AgentConfig, CollectionConfig
from agent.daemon import Daemon
from agent.desktop.view import problems_of
from agent.doctor.machine import check_collections
from agent.doctor.registry import Examination
from tests.agent.link_scene import READ_ONLY, READ_WRITE, Link, at, link

__all__ = ["link"]
PATH = "/link/collections/missing"


async def test_the_owner_is_told_and_nothing_changes(link: Link) -> None:
    await link.availability.look()
    before = link.tree(), link.policy.collections, link.availability.reports()
    answer = await link.ask("POST", PATH, {"ids": [READ_WRITE, "unknown", READ_WRITE]})
    assert answer.status_code == 204
    gone, kept = link.availability.owners_reports()
    assert (gone.id, gone.available, gone.missing, gone.reason) == (READ_WRITE, False, True, MISSING)
    assert (kept.id, kept.available, kept.missing) == (READ_ONLY, True, False)
    # Whoever speaks for the relay takes nothing away: not from what the agent serves, nor from what it says of that.
    assert (link.tree(), link.policy.collections, link.availability.reports()) == before
    assert (await link.code("GET", at(READ_WRITE, "ls"), path="/"))[0] == 200
    await link.availability.look()
    assert link.availability.owners_reports()[0].missing


async def test_the_log_says_it_once(link: Link, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        await link.ask("POST", PATH, {"ids": [READ_WRITE]})
    assert caplog.text.count("The relay does not have it any more") == 1


async def test_a_relay_that_has_it_again_says_nothing_at_its_next_link(link: Link) -> None:
    await link.ask("POST", PATH, {"ids": [READ_WRITE]})
    daemon = Daemon.__new__(Daemon)
    daemon._availability = link.availability
    daemon._network = SimpleNamespace(take_hello=lambda _: None)  # type: ignore[assignment]
    daemon._data = SimpleNamespace(way=SimpleNamespace(known="tls"))  # type: ignore[assignment]
    daemon._take_hello(None)  # type: ignore[arg-type]
    assert not any(report.missing for report in link.availability.owners_reports())


def rows(link: Link) -> list[dict[str, Any]]:
    """As the local API tells them."""
    return list(msgspec.to_builtins(link.availability.owners_reports()))


async def test_doctor_and_tray_say_it(link: Link, tmp_path: Path) -> None:
    config = AgentConfig(state_dir=tmp_path / "state", collections=link.policy.collections)

    def failures() -> list[str]:
        status = {"collections": rows(link)}
        looked = Examination(config_file=tmp_path / "agent.yaml", config=config, status=status, now=time.time())
        return [each.sentence for each in check_collections(looked) if each.level == "failure"]

    await link.availability.look()
    assert failures() == []
    await link.ask("POST", PATH, {"ids": [READ_WRITE]})
    assert failures() == ["The relay does not have rw any more: nobody can use it."]
    status = {"link": {"connected": True}, "collections": rows(link), "tasks": []}
    assert next(entry.text for entry in problems_of(status)) == "rw is not available"


async def test_status_says_it(link: Link, capsys: pytest.CaptureFixture[str]) -> None:
    await link.availability.look()
    await link.ask("POST", PATH, {"ids": [READ_WRITE]})
    document = {
        "link": {"relay_url": "https://relay.example", "connected": True, "last_error": "", "last_code": ""},
        "version": "1",
        "pid": 1,
        "paused": False,
        "config_file": "c",
        "state_dir": "s",
        "config_problem": "",
        "collections": rows(link),
        "transfer": {"sessions": 0},
        "tasks": [],
    }
    service._print_status(document)
    said = capsys.readouterr().out
    assert f"collection rw ({READ_WRITE}): read-write, not available: {MISSING}" in said
    assert f"collection ro ({READ_ONLY}): read-only, available" in said


@pytest.mark.parametrize("missing", [True, False])
def test_what_is_taken_out_is_not_said_to_be_known_at_the_relay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, missing: bool
) -> None:
    one = CollectionConfig(id=READ_WRITE, name="Data", root=str(tmp_path))
    file = tmp_path / "agent.yaml"
    file.write_text(f"collections:\n- {{id: {one.id}, name: {one.name}, root: {one.root}}}\n")

    def ask(_state_dir: Path, _method: str, path: str, *_: object) -> dict[str, Any]:
        return {"collections": [{"id": one.id, "missing": missing}]} if path == "/collections" else {"message": ""}

    monkeypatch.setattr(local_socket, "ask", ask)
    done = CliRunner().invoke(collection_command, ["remove", one.id, "-y", "--config", str(file)])
    assert done.exit_code == 0, done.output
    assert ("The relay still knows it" in done.output) is not missing
    assert tmp_path.exists()
