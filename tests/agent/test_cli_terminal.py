"""What fits on a narrow terminal, and how: ids stay whole, numbers come before bars."""

from __future__ import annotations

import re
import sys

import pytest

from agent.cli.files import LONG_COLUMNS, shown_name
from agent.cli.output import Output
from agent.cli.progress import progress_of
from agent.cli.screen import display_for
from agent.cli.task import TASK_COLUMNS
from protocol.names import unescape
from tests.agent.fake_relay import TASK, task


def on_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_an_id_can_be_copied_from_every_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was folded into three lines where people have 80 columns."""
    on_terminal(monkeypatch, columns)
    row = task("SUCCEEDED", destination_endpoint_display_name="A server with a long name", label="of today")
    Output().table({}, [row], TASK_COLUMNS)
    written = capsys.readouterr().out
    assert TASK in written
    assert {"SUCCEEDED", "2026-01-02 03:04:05", "of today", "A server with a long name"} <= set(
        re.split(r"  +|\n", written)
    )


@pytest.mark.parametrize(("columns", "bar"), [(50, False), (80, False), (140, True)])
def test_numbers_come_before_the_bar(
    columns: int, bar: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_terminal(monkeypatch, columns)
    monkeypatch.setenv("TERM", "xterm")
    with display_for(Output()) as display:
        display.show(progress_of(task()), 100)
    written = capsys.readouterr().err
    assert "active" in written
    assert "512 B of 1.00 KiB, 1 of 2 files" in written
    assert ("━" in written) is bar


def test_no_time_is_promised_for_what_is_held_up(capsys: pytest.CaptureFixture[str]) -> None:
    """A full disk was told with "1 s left"."""
    moves = task(bytes_transferred=20, towpath={"bytes_total": 30, "scan_complete": True}, nice_status="OK")
    with display_for(Output()) as display:
        display.show(progress_of(moves), 10)
        display.show(progress_of({**moves, "nice_status": "NO_SPACE", "nice_status_details": "The disk is full."}), 10)
    moving, waiting = capsys.readouterr().err.splitlines()
    assert moving.endswith("10 B/s, 1 s left")
    assert waiting.startswith("active (The disk is full.): 20 B of 30 B")
    assert "left" not in waiting


@pytest.mark.parametrize("names", [["a", "a ", " a", "a\u00a0", " "], ["a b", "a  b"]])
def test_names_that_differ_look_different(names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Blanks at the ends of names, too; and what is shown can be typed."""
    rows = [{"name": name, "type": "file", "link_target": None} for name in names]
    for columns in (LONG_COLUMNS, LONG_COLUMNS[::-1]):
        Output().table({}, rows, columns)
        lines = capsys.readouterr().out.splitlines()[1:]
        assert len({line.strip() for line in lines}) == len(names)
    for row in rows:
        assert unescape(shown_name(row)) == str(row["name"]).encode()
