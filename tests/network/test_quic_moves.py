"""A long QUIC transfer whose address changes under way and whose agents are killed goes on, losing nothing.

``TOWPATH_LAB_MIB`` makes the file smaller or larger than 1024 MiB.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
from pathlib import Path

import pytest
import trio

sys.path.insert(0, str(Path(__file__).parent))

import lab as laboratory
import matrix
from test_changes import until_moving
from test_matrix import arrange

WHY_NOT = laboratory.why_not()
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.soak, pytest.mark.timeout(3000)]

MIB = 2**20
SIZE = int(os.environ.get("TOWPATH_LAB_MIB", "1024")) * MIB
# What one kill, or one broken path, may cost: what was asked for and not yet settled.
AT_RISK = 48 * MIB


def write(path: Path) -> str:
    """The file to transfer, and its digest."""
    digest = hashlib.sha256()
    chance = random.Random(SIZE)
    with path.open("wb") as file:
        for _ in range(SIZE // MIB):
            block = chance.randbytes(MIB)
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def until_past(lab: laboratory.Lab, task_id: str, part: float) -> dict[str, object]:
    """Wait until this part of the file has arrived; the task as the destination's agent sees it."""
    with trio.fail_after(1200):
        while True:
            tasks = lab.sites["b"].status()["tasks"]
            task = next((row for row in tasks if row["task_id"] == task_id), None)
            if task is not None and task["counters"]["bytes_transferred"] >= part * SIZE:
                return dict(task)
            await trio.sleep(0.2)


@pytest.mark.parametrize("source", ["none", "port"])
async def test_an_address_that_changes_and_a_kill_cost_time_and_nothing_else(tmp_path: Path, source: str) -> None:
    """Where the source can be reached, its end follows the packets to where they come from now (RFC 9000, section 9).
    Behind a box that lets in only who was written to, nothing comes through any more, and the agents meet anew."""
    async with laboratory.open_lab(tmp_path) as lab:
        kinds = {"a": source, "b": "port"}
        arrange(lab, kinds)
        await lab.start()
        wanted = await trio.to_thread.run_sync(write, lab.sites["a"].root / "big")
        task_id = await lab.submit("a", "b", "big", towpath_transport="quic")
        await until_moving(lab, task_id)
        before = await until_past(lab, task_id, 0.2)
        assert str(before["path"]).startswith("quic"), before["path"]
        # The destination's box gets another address, and has forgotten everything.
        chains = {site: matrix.boxes(site, kind) for site, kind in kinds.items()}
        chains["b"] = [{**chains["b"][0], "outside": "203.0.113.77"}]
        lab.emulator.use(lab.describe(chains))
        changed = trio.current_time()
        reached = before["counters"]["bytes_transferred"] / SIZE + 0.1  # type: ignore[index]
        after = await until_past(lab, task_id, reached)
        print(f"{source}: a tenth more {trio.current_time() - changed:.1f} s after the change, over {after['path']}")
        await until_past(lab, task_id, 0.6)
        await lab.sites["b"].child.kill()
        await lab.sites["b"].child.start()
        task = await lab.finished(task_id, 1500)
        assert task["status"] == "SUCCEEDED", task
        assert await trio.to_thread.run_sync(digest_of, lab.sites["b"].root / "big") == wanted
        again = task["towpath"]["bytes_sent_again"]
        print(f"{source}: sent again {again / MIB:.1f} MiB; the path in the end {lab.path_of('b', task_id)}")
        assert again <= 2 * AT_RISK, task
        if SIZE >= 512 * MIB:
            # A smaller file may be there before QUIC has taken over from the tunnel again.
            assert lab.path_of("b", task_id).startswith("quic")


def received(lab: laboratory.Lab, task_id: str) -> int:
    """Content bytes that have come to the destination over the network."""
    return int.from_bytes((lab.sites["b"].state_dir / "tasks" / task_id / "received").read_bytes(), "little")


async def test_a_source_that_was_killed_is_found_again_where_its_machine_says_nothing(tmp_path: Path) -> None:
    """The boxes pass on no ICMP message, so that only the relay can tell that the source has been started again."""
    async with laboratory.open_lab(tmp_path) as lab:
        arrange(lab, {"a": "port", "b": "port"})
        await lab.start()
        wanted = await trio.to_thread.run_sync(write, lab.sites["a"].root / "big")
        task_id = await lab.submit("a", "b", "big", towpath_transport="quic", towpath_bandwidth_limit=4 * MIB)
        await until_moving(lab, task_id)
        await until_past(lab, task_id, 0.1)
        for _ in range(3):
            await trio.sleep(4)
            assert lab.path_of("b", task_id).startswith("quic"), lab.path_of("b", task_id)
            await lab.sites["a"].child.kill()
            await trio.sleep(0.3)
            before = received(lab, task_id)
            began = trio.current_time()
            await lab.sites["a"].child.start()
            with trio.fail_after(12):
                while received(lab, task_id) == before:
                    await trio.sleep(0.02)
            print(f"first new byte {trio.current_time() - began:.1f} s after the source's start")
        task = await lab.finished(task_id, 1500)
        assert task["status"] == "SUCCEEDED", task
        assert await trio.to_thread.run_sync(digest_of, lab.sites["b"].root / "big") == wanted
