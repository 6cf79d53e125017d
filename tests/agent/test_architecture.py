"""The map of the code names files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
SECTION = (
    (TREE / "docs/architecture.md").read_text().split("## The largest rooms, file by file\n", 1)[1].split("\n## ", 1)[0]
)
ROOMS = ("agent/transfer", "agent/connect", "relay/transfer")


def named(room: str) -> set[str]:
    """What the part of the section about a room says in code's letters."""
    part = re.split("|".join(f"`{other}/`" for other in ROOMS if other != room), SECTION.split(f"`{room}/`", 1)[1])[0]
    return set(re.findall(r"`([a-z_]+)`", part))


@pytest.mark.parametrize("room", ROOMS)
def test_the_map_of_the_largest_rooms_names_no_file_that_is_gone(room: str) -> None:
    found = named(room)
    assert len(found) > 20
    assert found - {path.stem for path in (TREE / room).glob("*.py")} == set()
