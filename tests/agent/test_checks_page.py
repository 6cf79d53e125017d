"""The pages that say which command shows what name tests that exist, and words that choose some of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = "".join((ROOT / "docs" / name).read_text() for name in ("checks.md", "network.md"))
COMMANDS = re.findall(r"`((?:pytest |python |-m soak |tests/|make )[^`]*)`", PAGE)


def test_every_file_named_is_there() -> None:
    paths = set(re.findall(r"(?:tests|benchmarks)/[\w/]+\.py", PAGE))
    assert len(paths) > 40
    assert [path for path in sorted(paths) if not (ROOT / path).is_file()] == []
    print(f"commands: {len(COMMANDS)}, files: {len(paths)}")


@pytest.mark.parametrize("command", [one for one in COMMANDS if " -k " in one])
def test_every_word_that_chooses_tests_chooses_some(command: str) -> None:
    files = [ROOT / path for path in re.findall(r"tests/[\w/]+\.py", command)]
    names = [
        name for path in files for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE)
    ]
    # What a parameter is called counts, too.
    parameters = " ".join(path.read_text() for path in files)
    words = re.findall(r"\w+", command.rpartition(" -k ")[2].replace(" or ", " "))
    assert words
    for word in words:
        assert any(word in name for name in names) or word in parameters, word
