"""`towpath collection`: changes go beside the owner's file, which stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from agent.cli.main import cli
from agent.config.exposure import exposures
from agent.config.keys import CollectionConfig
from agent.config.layers import load_config
from agent.enrol_http import RelayUnreachable, SetupRefused
from agent.policy import Policy

ONE = "6c54cade-bde5-45c1-bdea-f4bd71dba2cc"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "one").mkdir()
    path = tmp_path / "agent.yaml"
    path.write_text(f"# mine\ncollections:\n- id: {ONE}\n  name: One\n  root: {tmp_path}/one\n")
    return path


def invoke(file: Path, *arguments: str) -> Any:
    return CliRunner().invoke(cli, ["collection", *arguments, "--config", str(file)])


def test_update_changes_what_was_asked_for_and_nothing_else(file: Path, tmp_path: Path) -> None:
    before = file.read_text()
    done = invoke(
        file, "update", "One", "--name", "Uno", "--access", "read-only", "--hidden", "denied", "--sessions", "2"
    )
    assert done.exit_code == 0, done.output
    (row,) = load_config(file).collections
    assert (row.name, row.read_only, row.hidden, row.limits.sessions) == ("Uno", True, False, 2)
    assert row.root == f"{tmp_path}/one"
    assert file.read_text() == before
    (listed,) = json.loads(invoke(file, "list", "-F", "json").output)["collections"]
    assert (listed["name"], listed["access"], listed["hidden"]) == ("Uno", "read-only", "denied")
    assert invoke(file, "update", ONE, "--sessions", "0").exit_code == 0
    assert load_config(file).collections[0].limits.sessions is None
    assert invoke(file, "update", "One", "--name", "x").exit_code == 1
    assert invoke(file, "update", ONE).exit_code == 2


def test_of_a_collection_with_the_agents_own_files_it_is_said_that_they_are_not_offered(
    file: Path, tmp_path: Path
) -> None:
    """Who offers a home directory shall not look for them in vain, nor fear for them."""
    assert "Note" not in invoke(file, "update", "One", "--name", "Uno").output
    done = invoke(file, "update", ONE, "--root", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "Note: The state directory" in done.output
    assert "neither sees nor changes it" in done.output.replace("\n", " ")
    assert "Warning" not in done.output
    assert f"configuration {file}" in done.output
    hidden = tmp_path / ".config" / "agent.yaml"
    hidden.parent.mkdir()
    hidden.write_text(file.read_text().replace(f"{tmp_path}/one", str(tmp_path)))
    assert {sentence.split()[1] for _, sentence in exposures(load_config(hidden), hidden)} == {"state", "configuration"}
    assert "Note" not in invoke(hidden, "update", ONE, "--hidden", "denied").output


def test_of_a_collection_in_the_state_directory_it_is_said_that_it_cannot_be_used(file: Path) -> None:
    inside = load_config(file).state_dir / "tasks"
    inside.mkdir(parents=True)
    done = invoke(file, "update", ONE, "--root", str(inside))
    assert "Warning: The root of the collection" in done.output
    assert "cannot be used" in done.output.replace("\n", " ")


def test_remove_withdraws_it_and_keeps_the_files(file: Path, tmp_path: Path) -> None:
    before = file.read_text()
    assert invoke(file, "remove", "One", "--yes").exit_code == 0
    assert load_config(file).collections == ()
    assert file.read_text() == before
    assert (tmp_path / "one").is_dir()
    assert invoke(file, "remove", "One", "--yes").exit_code == 1


@pytest.mark.parametrize("refused", [True, False])
def test_a_collection_that_the_relay_refuses_this_agent_is_not_left_behind(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """One that it may have taken, which nobody knows when the relay is away, is."""

    def set_up(*_: object) -> None:
        raise SetupRefused("No.", who="you") if refused else RelayUnreachable("Away.")

    deleted: list[str] = []
    monkeypatch.setattr("agent.cli.collection._created", lambda *_: (ONE, None))
    monkeypatch.setattr("agent.cli.collection._deleted_at_relay", deleted.append)
    monkeypatch.setattr("agent.enrol.set_up", set_up)
    monkeypatch.delenv("TOWPATH_SETUP_KEY", raising=False)
    assert invoke(file, "add", str(tmp_path)).exit_code == 1
    assert deleted == ([ONE] if refused else [])


def test_watch_rules_name_collections_as_people_do(file: Path) -> None:
    def add(*arguments: str) -> Any:
        words = ["watch", "add", "scope", "--collection", "One", "--folder", "/in", *arguments]
        return CliRunner().invoke(cli, [*words, "--config", str(file)])

    done = add("--destination", "One", "--template", "/out/{name}", "--no-recursive", "--sync-level", "size")
    assert done.exit_code == 0, done.output
    (rule,) = load_config(file).watch
    assert (rule.collection, rule.destination, rule.recursive, rule.sync_level) == (ONE, ONE, False, "size")
    endless = add("--destination", "One", "--template", "/in/{path}")
    assert endless.exit_code == 1
    assert "take up again" in endless.output
    other = ONE.replace("6", "7")
    assert add("--destination", other, "--template", "/in/{path}").exit_code == 0
    assert "Nothing was changed" in add("--destination", other, "--template", "/in/{nothing}").output
    assert load_config(file).watch[0].template == "/in/{path}"


def test_the_limit_of_sessions_is_per_collection() -> None:
    limited = CollectionConfig(id=ONE, name="One", root="/one")
    assert Policy([limited]).has_room(ONE, 1000)
    from agent.config.keys import CollectionLimits

    limited = CollectionConfig(id=ONE, name="One", root="/one", limits=CollectionLimits(sessions=2))
    policy = Policy([limited])
    assert policy.has_room(ONE, 1)
    assert not policy.has_room(ONE, 2)
    assert policy.has_room("another", 99)
