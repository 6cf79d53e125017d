"""Names that play with terminals, on their way through everything that shows them: events, lists, states, and logs."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from pathlib import Path

import pytest

from agent.log_lines import formatter
from agent.storage.faulty import Call
from agent.transfer.books.manifest import SkippedRow, read_page
from protocol.names import escape, parse_path_untrusted
from relay.logs import _JsonFormatter, _TextFormatter
from tests.agent.engine_inside import Engine, quick_path

__all__ = ["quick_path"]

# A title is set, the screen is cleared (in two ways), a line is forged, text runs backwards, bytes are no text at all.
NAMES = [
    b"\x1b]0;owned\x07",
    b"\x1b[2J",
    b"\xc2\x9b2J",
    b"a\nb\rc",
    b"\xe2\x80\xaetxt.exe",
    b"\xff\xfe",
    b"[red]x",
    b"<b>x",
]
HARMFUL = {chr(number) for number in [*range(32), *range(127, 160)]}


def harmless(text: str) -> bool:
    return not HARMFUL & set(text)


async def test_names_in_events_and_lists_are_escaped_and_found_again(quick_path: Path) -> None:
    """Every file fails, so that every name is told of; each comes back from the list as the bytes it is."""

    def unreadable(call: Call) -> int | None:
        return errno.EACCES if call.operation in ("open_read", "read_whole") else None

    engine = Engine(quick_path, source_plan=unreadable)
    for name in NAMES:
        (engine.source / os.fsdecode(name)).write_bytes(b"content")
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", len(NAMES))
    told = [f"{event.code} {event.description} {event.details}" for event in engine.events]
    shown = [f"{one.status_sentence} {one.current} {one.path}" for one in [observed, *engine.reports]]
    assert all(map(harmless, told + shown))
    rows = read_page(engine.state / "skipped.manifest", SkippedRow, None, 100, complete=True).rows
    assert {row.source for row in rows} == set(NAMES)
    assert all(harmless(row.details) for row in rows)
    for name in NAMES:
        text = escape(name)
        assert harmless(text)
        assert parse_path_untrusted("/" + text) == (name,)
        assert any(text in one for one in told), text
    print(f"names: {len(NAMES)}, events: {len(told)}, rows: {len(rows)}")


@pytest.mark.parametrize(
    "made",
    [formatter("text"), formatter("json"), formatter("text", for_journal=True), _TextFormatter(), _JsonFormatter()],
)
def test_no_line_of_a_log_is_forged_or_plays_with_a_terminal(made: logging.Formatter) -> None:
    for name in NAMES:
        text = name.decode("utf-8", "surrogateescape")
        try:
            raise ValueError(f"{text}\n2026-01-01T00:00:00.000Z INFO forged: yes")
        except ValueError:
            record = logging.LogRecord("towpath.x", logging.ERROR, "f", 1, f"Lost {text}.", None, sys.exc_info())
        lines = made.format(record).split("\n")
        assert all(map(harmless, lines)), lines
        assert not any("\u202e" in line for line in lines)
        # What follows a line end never begins like an event.
        assert all(line.startswith("    ") for line in lines[1:])
        if lines[0].startswith("{"):
            assert len(lines) == 1
            assert "Lost" in json.dumps(json.loads(lines[0]))
