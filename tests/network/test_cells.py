"""Networks beyond the table: boxes that answer with resets, lines that lose packets, two sites behind one box."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import lab as laboratory
import matrix

WHY_NOT = laboratory.why_not()
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.soak, pytest.mark.timeout(400)]

Boxes = list[dict[str, Any]]


async def transfer(directory: Path, sites: dict[str, tuple[str, Boxes]], size: int = 600_000, **options: Any) -> str:
    """A file from ``a`` to ``b``, each with an address behind boxes (innermost first); the path it took."""
    content = random.Random(size).randbytes(size)
    async with laboratory.open_lab(directory) as lab:
        for name, (address, boxes) in sites.items():
            lab.sites[name].host.use([address], str(boxes[0]["gateway"]))
        lab.emulator.use(lab.describe({name: boxes for name, (_, boxes) in sites.items()}, **options))
        await lab.start()
        (lab.sites["a"].root / "file").write_bytes(content)
        task_id = await lab.submit("a", "b", "file")
        task = await lab.finished(task_id, 200)
        assert task["status"] == "SUCCEEDED", task
        assert (lab.sites["b"].root / "file").read_bytes() == content
        path = lab.path_of("b", task_id)
        print(path)
        return path


def ordinary(kind: str) -> dict[str, tuple[str, Boxes]]:
    return {site: (matrix.address(site, kind), matrix.boxes(site, kind)) for site in ("a", "b")}


async def test_boxes_that_answer_unknown_syns_with_a_reset_are_punched(tmp_path: Path) -> None:
    path = await transfer(tmp_path, ordinary("reset"))
    assert path.startswith(("punched", "quic"))


async def test_a_line_that_loses_two_packets_of_a_hundred_is_punched(tmp_path: Path) -> None:
    path = await transfer(tmp_path, ordinary("port"), size=2_000_000, loss=0.02)
    assert path.startswith(("punched", "quic"))


@pytest.mark.parametrize(
    ("name", "delay", "loss"), [("satellite", 0.14, 0.005), ("far and lossy", 0.05, 0.03), ("ten percent", 0.015, 0.1)]
)
async def test_bad_lines_are_slow_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, delay: float, loss: float
) -> None:
    """One way to the relay, and lost at each crossing."""
    monkeypatch.setattr(laboratory, "DELAY", delay)
    print(f"{name}: ", end="")
    await transfer(tmp_path, ordinary("port"), size=1_000_000, loss=loss)


async def test_two_agents_in_one_home_use_its_inside(tmp_path: Path) -> None:
    home = matrix.boxes("a", "port")
    path = await transfer(tmp_path, {"a": ("192.168.1.10", home), "b": ("192.168.1.11", home)})
    assert path.startswith(("direct", "reversed"))
    assert "192.168.1.1" in path


def behind_one_carrier(*, hairpin: bool) -> dict[str, tuple[str, Boxes]]:
    """Two homes whose provider has one public address for both."""
    carrier = {"name": "carrier", "outside": "203.0.113.10", "gateway": "100.64.0.1", "hairpin": hairpin}
    return {
        site: (
            f"192.168.{number}.10",
            [
                {"name": f"home-{site}", "outside": f"100.64.{number}.2", "gateway": f"192.168.{number}.1"},
                carrier,
            ],
        )
        for number, site in enumerate(("a", "b"), 1)
    }


async def test_two_homes_behind_one_carrier_that_turns_packets_round_are_punched(tmp_path: Path) -> None:
    path = await transfer(tmp_path, behind_one_carrier(hairpin=True))
    assert path.startswith(("punched", "quic"))


async def test_two_homes_behind_one_carrier_that_does_not_still_transfer(tmp_path: Path) -> None:
    path = await transfer(tmp_path, behind_one_carrier(hairpin=False))
    assert path.startswith(("punched", "quic", "tunnel"))
