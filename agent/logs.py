"""Where the agent's log lines go and what they look like: one line an event, for people and `grep`, or for programs.

All code logs through the standard library's loggers, libraries included. Extra facts given as ``extra={...}`` become
``key=value`` behind the sentence, or fields of the JSON object. A library for this was a sixth of an agent's start.
"""

from __future__ import annotations

import io
import json
import logging
import logging.handlers
import os
import sys
import time
from pathlib import Path

from agent.config.keys import LogConfig
from agent.system.files import CLOEXEC

# The journal of the service manager takes priorities as sd-daemon(3) has them.
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
# What every record has; anything else was given as ``extra``.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class _LogFile(logging.handlers.RotatingFileHandler):
    """A log file of bounded size, private to its owner, that also takes what is written to standard error: a crash of
    the interpreter, the words of worker processes."""

    def _open(self) -> io.TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND | CLOEXEC, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        return open(descriptor, "a", encoding="utf-8", errors="backslashreplace")


class _Lines(logging.Formatter):
    """``2026-11-24T02:29:42.272Z INFO towpath.link: Linked. peer=x`` in UTC.

    Text of peers cannot fake another event: what follows a line break is indented, and characters that cannot be seen
    are written as their escapes. In the journal, which knows the time, the line begins with its priority instead.
    """

    def __init__(self, *, for_journal: bool = False) -> None:
        super().__init__()
        self._for_journal = for_journal

    def format(self, record: logging.LogRecord) -> str:
        """One event as text."""
        level = record.levelname.lower()
        facts = "".join(f" {key}={_word(value)}" for key, value in sorted(_facts(record).items()))
        head = f"<{_PRIORITIES.get(level, 6)}>" if self._for_journal else f"{_moment(record)} "
        parts = [f"{record.levelname} {record.name}: {record.getMessage()}{facts}", *self._traces(record)]
        return head + "".join(map(_visible, "\n".join(parts))).replace("\n", "\n    ")

    def _traces(self, record: logging.LogRecord) -> list[str]:
        exception = [self.formatException(record.exc_info)] if record.exc_info else []
        return [*exception, record.stack_info] if record.stack_info else exception


class _Objects(logging.Formatter):
    """A JSON object a line: time, level and sentence first."""

    def format(self, record: logging.LogRecord) -> str:
        """One event as an object."""
        document = {
            "timestamp": _moment(record),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "logger": record.name,
            **_facts(record),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            document["stack"] = record.stack_info
        # ASCII alone: JSON escapes neither what turns a line around nor escape sequences of one character.
        return json.dumps(document, default=repr)


def _facts(record: logging.LogRecord) -> dict[str, object]:
    """What was given as ``extra``."""
    return {key: value for key, value in vars(record).items() if key not in _OWN}


def _moment(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.created % 1 * 1000):03d}Z"


def _visible(letter: str) -> str:
    """A character as it may be written: what could play with a terminal, or turn a line around, as its escape."""
    return letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1]


def _word(value: object) -> str:
    text = str(value)
    return text if text and not any(c.isspace() or c in '"=' for c in text) else repr(text)


def formatter(form: str, *, for_journal: bool = False) -> logging.Formatter:
    """What turns a record into a line: ``text`` or ``json``."""
    return _Lines(for_journal=for_journal) if form == "text" else _Objects()


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
