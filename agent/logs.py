"""Where the agent's log lines go and what they look like: one line an event, for people and for `grep`."""

from __future__ import annotations

import io
import logging
import logging.handlers
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

MAX_LOG = 10 * 1024 * 1024
KEPT_LOGS = 3


class _Lines(logging.Formatter):
    """``2026-11-24T02:29:42.272Z INFO towpath.link: Linked.`` in UTC; line breaks inside stay recognisable."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - logging's name
        """The moment of the event, UTC."""
        return datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{int(record.msecs):03d}Z"

    def format(self, record: logging.LogRecord) -> str:
        """One event. Text of peers cannot fake another event: what follows a line break is indented."""
        return super().format(record).replace("\n", "\n    ")


class _LogFile(logging.handlers.RotatingFileHandler):
    """A log file of bounded size, private to its owner, that also takes what is written to standard error: a crash of
    the interpreter, the words of worker processes."""

    def _open(self) -> io.TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        return open(descriptor, "a", encoding="utf-8", errors="backslashreplace")


def configure(log_file: Path | None = None) -> None:
    """Log to standard error, or to a file that is kept small and takes all other output too. Raises OSError."""
    handler: logging.Handler
    if log_file is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        handler = _LogFile(log_file, maxBytes=MAX_LOG, backupCount=KEPT_LOGS)
    # The journal of the service manager knows the time already.
    moment = "" if log_file is None and "JOURNAL_STREAM" in os.environ else "%(asctime)s "
    handler.setFormatter(_Lines(f"{moment}%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for chatty in ("httpx", "httpcore", "hypercorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
