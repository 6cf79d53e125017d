"""The demonstration itself: a relay, two agents, three crashes, and equal trees at the end."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent.demo import play
from agent.demo.children import leaves
from agent.demo.play import Plan
from agent.demo.stage import Stage


def test_the_demonstration_succeeds_and_leaves_nothing_running(tmp_path: Path) -> None:
    towpath = Path(sys.executable).with_name("towpath")
    directory = tmp_path / "demo"
    result = subprocess.run(
        [towpath, "demo", "--directory", directory], capture_output=True, text=True, timeout=170, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(directory) not in listed


def test_a_demonstration_that_cannot_begin_says_why_in_a_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("agent.demo.play.shutil.disk_usage", lambda _path: SimpleNamespace(free=10))
    assert play.perform(Plan(), Stage()) == 1
    assert "The demonstration cannot begin" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_what_nurseries_inside_nurseries_raised_is_found() -> None:
    first, second, third = OSError("a"), ValueError("b"), OSError("c")
    group = BaseExceptionGroup("", [ExceptionGroup("", [first, ExceptionGroup("", [second])]), third])
    assert leaves(group) == [first, second, third]
