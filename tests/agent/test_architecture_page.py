"""The map of the code names what is there, and leaves no package out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
# What a package is to whoever looks for it: the schema's history belongs to the store.
PART_OF_ANOTHER = frozenset({"relay/store/migrations", "relay/store/migrations/versions"})

# Rooms that the page takes apart file by file.
ROOMS = ("agent/transfer", "agent/connect", "relay/transfer")
FILE_BY_FILE = PAGE.split("## The largest rooms, file by file\n", 1)[1].split("\n## ", 1)[0]


def test_every_place_named_is_there() -> None:
    named = set(re.findall(r"`((?:agent|relay|protocol|tests|installers|benchmarks)/[\w./]*)`", PAGE))
    assert len(named) > 40
    missing = [name for name in sorted(named) if not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists()]
    assert missing == []


def test_every_package_has_its_place() -> None:
    packages = {
        str(path.parent.relative_to(ROOT))
        for room in ("agent", "relay", "protocol")
        for path in (ROOT / room).rglob("*.py")
    }
    assert len(packages) > 20
    unnamed = [name for name in sorted(packages - PART_OF_ANOTHER) if not re.search(rf"`{name}[/`]", PAGE)]
    assert unnamed == []


@pytest.mark.parametrize("room", ROOMS)
def test_every_file_of_the_largest_rooms_has_its_place(room: str) -> None:
    others = "|".join(f"`{other}/`" for other in ROOMS if other != room)
    named = set(re.findall(r"`([a-z_]+)`", re.split(others, FILE_BY_FILE.split(f"`{room}/`", 1)[1])[0]))
    assert named == {path.stem for path in (ROOT / room).glob("*.py")} - {"__init__"}
