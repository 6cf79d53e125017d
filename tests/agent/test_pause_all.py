"""Pausing a whole machine while its tasks come and go."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.daemon import Daemon
from protocol.errors import ItemFailed


@pytest.mark.parametrize("paused", [True, False])
async def test_a_task_that_is_closed_meanwhile_keeps_no_other_from_it(tmp_path: Path, *, paused: bool) -> None:
    held: list[str] = []
    told: list[str] = []

    class Tasks:
        def tasks(self) -> list[Any]:
            return [SimpleNamespace(task_id=name) for name in ("first", "closed", "last")]

        async def pause_task(self, task_id: str) -> None:
            if task_id == "closed":
                raise ItemFailed("This agent has no such task.", code="NOT_FOUND")
            held.append(task_id)

        resume_task = pause_task

        async def owner_changed(self, _collections: set[str]) -> None:
            told.append("all")

    daemon: Any = SimpleNamespace(
        _config=SimpleNamespace(state_dir=tmp_path),
        _policy=SimpleNamespace(paused=not paused, collections=()),
        _tasks=Tasks(),
        _link=SimpleNamespace(kick=lambda: told.append("relay")),
    )
    await Daemon.set_paused(daemon, paused)
    assert held == ["first", "last"]
    assert told == (["all", "relay"] if paused else ["relay"])
