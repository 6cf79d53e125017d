"""Watching the configuration: no change is missed, whenever it is made."""

from __future__ import annotations

import contextlib
from pathlib import Path

import trio

from agent.config.watch import changes


async def test_a_change_made_before_the_watch_began_is_not_missed(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text("first")
    read = file.read_text()
    file.write_text("second")
    async with contextlib.aclosing(changes([file])) as changed:
        with trio.fail_after(30):
            await anext(changed)
            assert file.read_text() != read
            # And those that follow are told one by one.
            for text in ("third", "fourth"):
                file.write_text(text)
                await anext(changed)
