"""Where the agent's log lines go; what they look like is in `agent.log_lines`.

All code logs through the standard library's loggers, libraries included. A library for this was a sixth of an agent's
start.
"""

from __future__ import annotations

import io
import logging
import logging.handlers
import os
import sys
from pathlib import Path

from agent.config.keys import LogConfig
from agent.log_lines import formatter
from agent.system.files import CLOEXEC


class _LogFile(logging.handlers.RotatingFileHandler):
    """A log file of bounded size, private to its owner, that also takes what is written to standard error: a crash of
    the interpreter, the words of worker processes."""

    def _open(self) -> io.TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND | CLOEXEC, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        return open(descriptor, "a", encoding="utf-8", errors="backslashreplace")


def configure(config: LogConfig | None = None, log_file: Path | None = None) -> None:
    """Log to standard error, or to a file that is kept small and takes all other output too. Raises OSError.

    May be called again when the configuration has changed; the same file goes on.
    """
    config = config or LogConfig()
    handler: logging.Handler
    if log_file is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        handler = _LogFile(log_file, maxBytes=config.max_bytes, backupCount=config.keep)
    handler.setFormatter(formatter(config.format, for_journal=log_file is None and "JOURNAL_STREAM" in os.environ))
    logging.basicConfig(level=config.level.upper(), handlers=[handler], force=True)
    for chatty in ("httpx", "httpcore", "hypercorn", "watchdog"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
