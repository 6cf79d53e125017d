"""What passes the relay and what may not, and paths that swallow everything: in the lab, in mid-transfer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import trio

sys.path.insert(0, str(Path(__file__).parent))

import lab as laboratory
from test_changes import content, succeed, until_moving
from test_matrix import arrange

WHY_NOT = laboratory.why_not()
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.soak, pytest.mark.timeout(350)]

# So slow that there is time to change something.
SLOWLY = 1_000_000
# Nothing but the relay's port gets out, and what was under way is swallowed.
NARROW: dict[str, Any] = {"tcp_ports": [443], "udp": False}
WIDE: dict[str, Any] = {"tcp_ports": None, "udp": True}
# A peer that vanishes is noticed in under 15 s; then another way is looked for.
NOTICED = 15.0


def task_of(lab: laboratory.Lab, task_id: str) -> dict[str, Any]:
    """The task as the destination's agent sees it, or one that has not begun."""
    rows = [dict(row) for row in lab.sites["b"].status()["tasks"] if row["task_id"] == task_id]
    return rows[0] if rows else {"path": "", "counters": {"bytes_transferred": 0}}


async def test_a_path_that_swallows_everything_is_replaced_by_the_relay_and_comes_back(tmp_path: Path) -> None:
    data = content(60_000_000)
    async with laboratory.open_lab(tmp_path) as lab:
        arrange(lab, {"a": "port", "b": "port"})
        await lab.start()
        (lab.sites["a"].root / "big").write_bytes(data)
        task_id = await lab.submit("a", "b", "big", towpath_bandwidth_limit=SLOWLY)
        first = await until_moving(lab, task_id, 3_000_000)
        assert not str(first["path"]).startswith("tunnel"), first
        lab.emulator.use({"change": {"nat-a": NARROW, "nat-b": NARROW}})
        cut = trio.current_time()
        with trio.fail_after(60):
            while not str(task_of(lab, task_id)["path"]).startswith("tunnel"):
                await trio.sleep(0.1)
        found = trio.current_time() - cut
        have = task_of(lab, task_id)["counters"]["bytes_transferred"]
        await until_moving(lab, task_id, have + 1)
        moving = trio.current_time() - cut
        print(f"another path after {found:.1f} s, new bytes after {moving:.1f} s")
        # What notices is the kernels' clocks; another way is found within moments.
        assert found < NOTICED + 5
        lab.emulator.use({"change": {"nat-a": WIDE, "nat-b": WIDE}})
        with trio.fail_after(60):
            while str(task_of(lab, task_id)["path"]).startswith("tunnel"):
                await trio.sleep(0.1)
        task = await succeed(lab, task_id, "big", data)
        print(f"sent again {task['towpath']['bytes_sent_again']}, the path in the end {lab.path_of('b', task_id)}")


async def test_what_may_not_pass_the_relay_waits_says_so_and_goes_on(tmp_path: Path) -> None:
    data = content(3_000_000)
    async with laboratory.open_lab(tmp_path) as lab:
        arrange(lab, {"a": "symmetric", "b": "symmetric"})
        await lab.start()
        (lab.sites["a"].root / "file").write_bytes(data)
        task_id = await lab.submit("a", "b", "file", towpath_relay="never")

        def said() -> bool:
            return "may not go through the relay" in str(task_of(lab, task_id))

        with trio.fail_after(60):
            while not said():
                await trio.sleep(0.5)
        assert task_of(lab, task_id)["counters"]["bytes_transferred"] == 0
        # Both get boxes that can be punched.
        arrange(lab, {"a": "port", "b": "port"})
        await succeed(lab, task_id, "file", data)
        assert lab.path_of("b", task_id).startswith(("punched", "quic"))


async def test_once_there_was_a_direct_path_the_relay_is_not_used_again_where_that_was_asked_for(
    tmp_path: Path,
) -> None:
    data = content(30_000_000)
    async with laboratory.open_lab(tmp_path) as lab:
        arrange(lab, {"a": "port", "b": "port"})
        await lab.start()
        (lab.sites["a"].root / "big").write_bytes(data)
        task_id = await lab.submit("a", "b", "big", towpath_relay="until-direct", towpath_bandwidth_limit=SLOWLY)
        await until_moving(lab, task_id, 3_000_000)
        with trio.fail_after(30):
            while str(task_of(lab, task_id)["path"]).startswith("tunnel"):
                await trio.sleep(0.1)
        lab.emulator.use({"change": {"nat-a": NARROW, "nat-b": NARROW}})
        with trio.move_on_after(30):
            while True:
                assert not str(task_of(lab, task_id)["path"]).startswith("tunnel"), task_of(lab, task_id)
                await trio.sleep(0.5)
        lab.emulator.use({"change": {"nat-a": WIDE, "nat-b": WIDE}})
        await succeed(lab, task_id, "big", data)
