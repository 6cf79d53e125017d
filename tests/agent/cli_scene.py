"""The user's commands, run in the test's own process against a relay that is played."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.cli.main import run
from tests.agent.fake_relay import CLIENT, SECRET, FakeRelay
from tests.agent.fake_relay import fake_relay as running_fake

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def relay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeRelay]:
    for name in list(os.environ):
        if name.startswith(("TOWPATH_", "GLOBUS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with running_fake() as fake:
        monkeypatch.setenv("TOWPATH_RELAY_URL", fake.url)
        monkeypatch.setenv("TOWPATH_CLIENT_ID", CLIENT)
        monkeypatch.setenv("TOWPATH_CLIENT_SECRET", SECRET)
        yield fake


@pytest.fixture
def towpath(relay: FakeRelay, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run one command line in this process; returns exit code, output, error output."""

    def invoke(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        code = run(list(arguments))
        captured = capsys.readouterr()
        assert SECRET not in captured.out + captured.err
        return code, captured.out, captured.err

    return invoke
