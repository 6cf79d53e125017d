"""The map of the code names what is there, and leaves no package out."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
# What a package is to whoever looks for it: the schema's history belongs to the store.
PART_OF_ANOTHER = frozenset({"relay/store/migrations", "relay/store/migrations/versions"})


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
