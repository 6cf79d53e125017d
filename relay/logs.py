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
        return json.dumps(document, ensure_ascii=False)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        # Line ends and escape sequences in a message could forge other lines or play with a terminal.
        message = "".join(
            letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in record.getMessage()
        )
        line = f"{_utc(record.created)} {record.levelname.lower()} {record.name}: {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


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
