"""Destinations that may be written to and not listed, as folders are that many people put something into."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from agent.storage.faulty import Call
from protocol.control import TaskItem
from tests.agent.engine_inside import WHOLE, Crashed, Engine, contents, quick_path

__all__ = ["quick_path"]

SINGLE = [TaskItem(source_path=f"/{name}", destination_path=f"/box/{name}") for name in ("small", "large")]


@pytest.mark.parametrize("items", [WHOLE, SINGLE], ids=["a folder", "files"])
async def test_what_goes_into_a_drop_box_arrives_also_after_an_interruption(
    quick_path: Path, items: list[TaskItem]
) -> None:
    killed = False

    def refuse(call: Call) -> int | None:
        return errno.EACCES if call.operation in ("scan", "reserved_names") else None

    def refuse_and_die(call: Call) -> int | None:
        nonlocal killed
        if call.operation == "rename" and not killed:
            killed = True
            raise Crashed
        return refuse(call)

    engine = Engine(quick_path, items=items, plan=refuse_and_die)
    (engine.source / "small").write_bytes(b"small")
    (engine.source / "large").write_bytes(os.urandom(3 << 20))
    (engine.destination / "box").mkdir()
    with pytest.raises(Crashed):
        await engine.run()
    observed = await engine.revived(refuse).run()
    assert observed.state == "SUCCEEDED", observed
    box = engine.destination / "box" if items is SINGLE else engine.destination
    assert (
        contents(engine.source).items()
        <= {name: content for name, content in contents(box).items() if not name.startswith(".towpath.")}.items()
    )
