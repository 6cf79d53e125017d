"""A home directory with an agent in it, some of whose files are the agent's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.storage.base import Root


def fill(home: Path) -> tuple[str, ...]:
    """A home directory with an agent in it: where that keeps its own."""
    for name in (".local/state/towpath/agent/node.key", ".local/state/other", "conf/agent.yaml", "conf/mine", "work/a"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("secret" if "agent" in name else "plain")
    return str(home / ".local/state/towpath/agent"), str(home / "conf/agent.yaml"), str(home / "nowhere/else")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def own(home: Path) -> tuple[str, ...]:
    return fill(home)


def names(root: Root, *path: bytes) -> set[bytes]:
    with root.open_directory(path) as folder:
        return {node.name for node in folder.scan(reserved=True)}
