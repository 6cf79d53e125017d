"""The map of the code names what is there, and leaves no package out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
# What a package is to whoever looks for it: the schema's history belongs to the store.
PART_OF_ANOTHER = frozenset({"relay/store/migrations", "relay/store/migrations/versions"})

# Rooms that the page takes apart file by file.
ROOMS = ("agent/transfer", "agent/connect", "relay/transfer")
# Of these, the one whose rooms the page takes apart with it, each above those that it stands on.
ENGINE = "agent/transfer"
FILE_BY_FILE = PAGE.split("## The largest rooms, file by file\n", 1)[1].split("\n### ", 1)[0]
# Packages whose own files, beside their rooms, it names one by one.
PACKAGES = ("agent", "relay", "protocol")
BESIDE = PAGE.split("### Files beside the rooms\n", 1)[1].split("\n## ", 1)[0]


def test_every_place_named_is_there() -> None:
    named = set(re.findall(r"`((?:agent|relay|protocol|tests|installers|benchmarks)/[\w./]*)`", PAGE))
    assert len(named) > 40
    missing = [name for name in sorted(named) if not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists()]
    assert missing == []


@pytest.mark.parametrize("name", ["performance", "experiments", "network", "states", "protocol"])
def test_other_pages_name_places_that_are_there(name: str) -> None:
    page = (ROOT / "docs" / f"{name}.md").read_text()
    named = set(re.findall(r"`(?:python )?((?:agent|relay|protocol|tests|benchmarks)/[\w./-]*)", page))
    assert named
    assert [one for one in sorted(named) if not (ROOT / one).exists() and not (ROOT / f"{one}.py").exists()] == []


def test_every_package_has_its_place() -> None:
    packages = {
        str(path.parent.relative_to(ROOT))
        for room in ("agent", "relay", "protocol")
        for path in (ROOT / room).rglob("*.py")
    }
    assert len(packages) > 20
    unnamed = [name for name in sorted(packages - PART_OF_ANOTHER) if not re.search(rf"`{name}[/`]", PAGE)]
    assert unnamed == []


@pytest.mark.parametrize(
    ("text", "places", "place"),
    [*((FILE_BY_FILE, ROOMS, room) for room in ROOMS), *((BESIDE, PACKAGES, package) for package in PACKAGES)],
    ids=[*ROOMS, *PACKAGES],
)
def test_every_file_has_its_place(text: str, places: tuple[str, ...], place: str) -> None:
    others = "|".join(f"`{other}/`" for other in places if other != place)
    named = re.findall(r"`([a-z_]+)`", re.split(others, text.split(f"`{place}/`", 1)[1])[0])
    files = (ROOT / place).rglob("*.py") if place == ENGINE else (ROOT / place).glob("*.py")
    assert sorted(named) == sorted(path.stem for path in files if path.stem not in ("__init__", "__main__"))


def imported_by(path: Path) -> set[str]:
    """The modules and packages of the engine that a file imports, wherever in it."""
    named = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
    return {name.replace(".", "/") for name in named if name.startswith(ENGINE.replace("/", ".") + ".")}


def test_rooms_of_the_engine_stand_on_those_below_them() -> None:
    rooms = re.findall(rf"^\| `({ENGINE}/\w+)/` \|", FILE_BY_FILE, re.MULTILINE)
    assert set(rooms) == {str(path.parent.relative_to(ROOT)) for path in (ROOT / ENGINE).glob("*/__init__.py")}
    upwards = []
    for index, room in enumerate(rooms):
        for path in sorted((ROOT / room).glob("*.py")):
            for name in sorted(imported_by(path)):
                at = name if name in rooms else name.rsplit("/", 1)[0]
                if at != room and (at not in rooms or rooms.index(at) < index) and (ROOT / f"{name}.py").exists():
                    upwards.append(f"{path.relative_to(ROOT)} imports {name}")
    assert upwards == []
