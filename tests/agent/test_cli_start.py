"""How `towpath` starts: what a bare ``--help`` loads, and what shells are told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOWPATH = Path(sys.executable).with_name("towpath")
# Each costs more than all of the rest; a command loads what it needs when it runs.
HEAVY = ("globus_sdk", "requests", "trio", "cryptography", "rich", "sqlalchemy", "starlette", "msgspec.json", "httpx")


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; from agent.cli.main import main\n"
        "sys.argv = ['towpath', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "transfer" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_its_script(shell: str) -> None:
    done = subprocess.run([TOWPATH, "completion", shell], capture_output=True, text=True, check=True, timeout=60)
    assert f"_TOWPATH_COMPLETE={shell}_complete" in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("towpath trans", {"transfer"}),
        ("towpath transfer --sync", {"--sync-level"}),
        ("towpath transfer --sync-level ch", {"checksum"}),
        ("towpath task wa", {"wait"}),
    ],
)
def test_words_are_completed(words: str, expected: set[str]) -> None:
    environment = {
        **os.environ,
        "_TOWPATH_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run([TOWPATH], capture_output=True, text=True, env=environment, check=False, timeout=60)
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == expected
