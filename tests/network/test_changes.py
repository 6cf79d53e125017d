"""What changes under way: paths get better, relays restart, uplinks switch; nothing is lost and nothing comes twice."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

sys.path.insert(0, str(Path(__file__).parent))

import lab as laboratory
import matrix
from test_matrix import arrange

WHY_NOT = laboratory.why_not()
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.soak, pytest.mark.timeout(400)]


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


async def until_moving(lab: laboratory.Lab, task_id: str, least: int = 1) -> dict[str, Any]:
    """Wait until some bytes have arrived; the task as the destination's agent sees it."""
    with trio.fail_after(60):
        while True:
            tasks = lab.sites["b"].status()["tasks"]
            task = next((row for row in tasks if row["task_id"] == task_id), None)
            if task is not None and task["counters"]["bytes_transferred"] >= least:
                return dict(task)
            await trio.sleep(0.2)


async def succeed(lab: laboratory.Lab, task_id: str, name: str, data: bytes) -> dict[str, Any]:
    task = await lab.finished(task_id, 240)
    assert task["status"] == "SUCCEEDED", task
    assert (lab.sites["b"].root / name).read_bytes() == data
    return task


async def test_a_relayed_transfer_moves_to_a_direct_path_without_a_break(tmp_path: Path) -> None:
    data = content(30_000_000)
    async with laboratory.open_lab(tmp_path) as lab:
        arrange(lab, {"a": "port", "b": "port"})
        stubborn = {"crossing": False, "udp": False}
        lab.emulator.use({"change": {"nat-a": stubborn, "nat-b": stubborn}})
        await lab.start()
        (lab.sites["a"].root / "big").write_bytes(data)
        task_id = await lab.submit("a", "b", "big")
        first = await until_moving(lab, task_id)
        assert first["path"].startswith("tunnel"), first
        # Both boxes learn to let crossing SYNs pass.
        lab.emulator.use({"change": {"nat-a": {"crossing": True}, "nat-b": {"crossing": True}}})
        task = await succeed(lab, task_id, "big", data)
        assert lab.path_of("b", task_id).startswith("punched")
        assert task["faults"] == 0, task
        assert task["towpath"]["bytes_sent_again"] == 0, task


async def test_a_relay_that_restarts_is_not_noticed_by_a_direct_transfer(tmp_path: Path) -> None:
    data = content(60_000_000)
    async with laboratory.open_lab(tmp_path) as lab:
        arrange(lab, {"a": "port", "b": "port"})
        await lab.start()
        (lab.sites["a"].root / "big").write_bytes(data)
        task_id = await lab.submit("a", "b", "big")
        await until_moving(lab, task_id)
        await lab.relay.kill()
        await trio.sleep(2)
        await lab.relay.start()
        for name in lab.sites:
            await lab.until_connected(name)
        task = await succeed(lab, task_id, "big", data)
        assert task["towpath"]["bytes_sent_again"] == 0, task
        assert lab.path_of("b", task_id).startswith("punched")


async def test_an_uplink_that_switches_costs_time_and_nothing_else(tmp_path: Path) -> None:
    data = content(40_000_000)
    async with laboratory.open_lab(tmp_path) as lab:
        arrange(lab, {"a": "port", "b": "port"})
        await lab.start()
        (lab.sites["a"].root / "big").write_bytes(data)
        task_id = await lab.submit("a", "b", "big")
        await until_moving(lab, task_id)
        # The destination's site comes back behind another box with another address: every flow is gone.
        chains = {"a": matrix.boxes("a", "port"), "b": [{**matrix.boxes("b", "port")[0], "outside": "203.0.113.77"}]}
        lab.emulator.use(lab.describe(chains))
        await succeed(lab, task_id, "big", data)


async def test_ipv6_between_stateful_firewalls_is_punched_where_ipv4_cannot(tmp_path: Path) -> None:
    async with laboratory.open_lab(tmp_path) as lab:
        chains = {site: matrix.boxes(site, "symmetric") for site in ("a", "b")}
        for number, site in enumerate(("a", "b"), 1):
            addresses = [matrix.address(site, "symmetric"), f"2001:db8:{number}::10"]
            lab.sites[site].host.use(addresses, str(chains[site][0]["gateway"]))
        lab.emulator.use(lab.describe(chains))
        await lab.start()
        (lab.sites["a"].root / "file").write_bytes(content(300_000))
        task_id = await lab.submit("a", "b", "file")
        await succeed(lab, task_id, "file", content(300_000))
        assert lab.path_of("b", task_id).startswith("punched tcp [2001:db8:1::10]"), lab.path_of("b", task_id)


@pytest.mark.parametrize(
    ("kind", "mapping"),
    [("port", "endpoint-independent"), ("symmetric", "address-and-port-dependent"), ("none", "none")],
)
async def test_the_doctor_tells_what_stands_in_between(tmp_path: Path, kind: str, mapping: str) -> None:
    async with laboratory.open_lab(tmp_path) as lab:
        arrange(lab, {"a": kind, "b": "none"})
        await lab.start()
        checks = {row["name"]: row["findings"] for row in await lab.doctor("a")}
        udp = next(row["details"] for row in checks["nat"] if "udp" in row["details"])
        assert udp["udp"] is True
        assert udp["mapping"] == mapping
        levels = {row["level"] for row in checks["relay"]}
        assert levels == {"ok"}, checks["relay"]
        details = [row["details"] for row in checks["relay"]]
        trip = next(row["round_trip_ms"] for row in details if "round_trip_ms" in row)
        assert trip >= 2 * laboratory.DELAY * 1000 * 0.8


@pytest.mark.parametrize(("kind", "way"), [("port", "punched"), ("none", "direct"), ("symmetric", "")])
async def test_the_doctor_looks_for_a_way_to_who_sent_something_lately(tmp_path: Path, kind: str, way: str) -> None:
    async with laboratory.open_lab(tmp_path) as lab:
        arrange(lab, {"a": kind, "b": kind})
        await lab.start()
        (lab.sites["a"].root / "file").write_bytes(content(300_000))
        task_id = await lab.submit("a", "b", "file")
        await succeed(lab, task_id, "file", content(300_000))
        ((finding,),) = [row["findings"] for row in await lab.doctor("b", "peers")]
        print(finding["sentence"])
        assert finding["details"]["kind"] == way
        assert finding["level"] == ("ok" if way else "warning")
        # Whatever TCP does, UDP and the tunnel were looked at.
        assert finding["details"]["udp"] is (kind != "symmetric"), finding
        assert finding["details"]["tunnel"] is True, finding
        # Nothing was said, and nothing is left of it.
        assert lab.sites["a"].status()["tasks"] == []


async def test_a_link_into_a_black_hole_is_missed_at_both_ends(tmp_path: Path) -> None:
    """Nothing is said and nothing refused: packets simply go nowhere."""
    async with laboratory.open_lab(tmp_path) as lab:
        arrange(lab, {"a": "port", "b": "none"})
        await lab.start()
        site = lab.sites["a"]
        assert site.status()["link"]["connected"]
        lab.emulator.use({"change": {"nat-a": {"tcp_ports": [9], "udp": False}}})
        cut = trio.current_time()
        missed: dict[str, float] = {}
        # A goal of the product, not of this machine's speed: what decides is the kernels' clocks.
        with trio.move_on_after(40):
            while len(missed) < 2:
                await trio.sleep(0.2)
                if "agent" not in missed and not site.status()["link"]["connected"]:
                    missed["agent"] = trio.current_time() - cut
                document = await lab.call(lambda relay: relay.transfer.get_endpoint(site.collection_id).data)
                if "relay" not in missed and not document["gcp_connected"]:
                    missed["relay"] = trio.current_time() - cut
        print(f"missed after: {missed}")
        assert missed.keys() == {"agent", "relay"}
        assert max(missed.values()) < 16
        lab.emulator.use({"change": {"nat-a": {"tcp_ports": None, "udp": True}}})
        await lab.until_connected("a")
