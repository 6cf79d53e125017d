"""What the relay writes to standard error: one line for each thing that happened, as text or as JSON."""

from __future__ import annotations

import json
import logging
import sys
import time

from relay.settings import Log


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        # ASCII alone: JSON escapes neither what turns a line around nor escape sequences of one character.
        return json.dumps(document)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        # Line ends and escape sequences in a message could forge other lines or play with a terminal.
        line = f"{_utc(record.created)} {record.levelname.lower()} {record.name}: {_printable(record.getMessage())}"
        if not record.exc_info:
            return line
        # The text of an error may be a peer's, with line ends of its own: no line of it begins like one of ours.
        trace = self.formatException(record.exc_info).split("\n")
        return "\n    ".join([line, *map(_printable, trace)])


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def set_up(log: Log) -> None:
    """Send the log to standard error as the settings say. For the process's entry point alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if log.format == "json" else _TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(log.level.upper())
    # Below warning these tell of every frame and query.
    for noisy in ("hpack", "sqlalchemy", "alembic", "hypercorn", "httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _utc(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment)) + f".{int(moment % 1 * 1000):03d}Z"
