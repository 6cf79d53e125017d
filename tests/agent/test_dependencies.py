"""What the program imports, pyproject.toml asks for: libraries of libraries may go, or change, without a word."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = ("agent", "relay", "protocol")
# Sentences that begin alike name no library.
IMPORT = re.compile(r"^ *(?:from|import) ([A-Za-z_]\w*)", re.MULTILINE)


def _plain(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_every_library_that_is_imported_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {_plain(text) for text in (*project["dependencies"], *project["optional-dependencies"]["desktop"])}
    known = packages_distributions()
    imported: dict[str, str] = {}
    for file in (path for package in OURS for path in (ROOT / package).rglob("*.py")):
        for name in IMPORT.findall(file.read_text()):
            imported.setdefault(name, str(file.relative_to(ROOT)))
    libraries = {name for name in imported if name not in sys.stdlib_module_names and name not in OURS}
    assert len(libraries) > 20
    unasked = [
        f"{name} ({imported[name]})"
        for name in sorted(libraries)
        if name in known and not {_plain(distribution) for distribution in known[name]} & asked
    ]
    assert unasked == []
