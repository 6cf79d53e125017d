"""Where the agent's log lines go and what they look like: one line an event, for people and `grep`, or for programs.

structlog renders; all code logs through the standard library's loggers, libraries included. Extra facts given as
``extra={...}`` become ``key=value`` behind the sentence, or fields of the JSON object.
"""

from __future__ import annotations

import io
import logging
import logging.handlers
import os
import sys
from pathlib import Path

import structlog
from structlog.typing import EventDict, WrappedLogger

from agent.config.keys import LogConfig
from agent.system.files import CLOEXEC

# The journal of the service manager takes priorities as sd-daemon(3) has them.
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


class _LogFile(logging.handlers.RotatingFileHandler):
    """A log file of bounded size, private to its owner, that also takes what is written to standard error: a crash of
    the interpreter, the words of worker processes."""

    def _open(self) -> io.TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND | CLOEXEC, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        return open(descriptor, "a", encoding="utf-8", errors="backslashreplace")


class Lines:
    """``2026-11-24T02:29:42.272Z INFO towpath.link: Linked. peer=x`` in UTC.

    Text of peers cannot fake another event: what follows a line break is indented, and characters that cannot be seen
    are written as their escapes. In the journal, which knows the
    time, the line begins with its priority instead.
    """

    def __init__(self, *, for_journal: bool = False) -> None:
        self._for_journal = for_journal

    def __call__(self, _logger: WrappedLogger, _name: str, event: EventDict) -> str:
        """One event as text."""
        moment, level = str(event.pop("timestamp")), str(event.pop("level"))
        place, sentence = event.pop("logger", "towpath"), str(event.pop("event"))
        exception = event.pop("exception", "")
        facts = "".join(f" {key}={_word(value)}" for key, value in sorted(event.items()))
        head = f"<{_PRIORITIES.get(level, 6)}>" if self._for_journal else f"{moment} "
        text = f"{level.upper()} {place}: {sentence}{facts}" + (f"\n{exception}" if exception else "")
        return head + "".join(map(_visible, text)).replace("\n", "\n    ")


def _visible(letter: str) -> str:
    """A character as it may be written: what could play with a terminal, or turn a line around, as its escape."""
    return letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1]


def _word(value: object) -> str:
    text = str(value)
    return text if text and not any(c.isspace() or c in '"=' for c in text) else repr(text)


def formatter(form: str, *, for_journal: bool = False) -> logging.Formatter:
    """What turns a record into a line: ``text`` or ``json``."""
    renderer: Lines | structlog.processors.JSONRenderer
    renderer = Lines(for_journal=for_journal) if form == "text" else structlog.processors.JSONRenderer()
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ExtraAdder(),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            _sentence_first,
            renderer,
        ],
    )


def _sentence_first(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """Milliseconds are enough, and time, level and sentence come first."""
    moment = str(event.pop("timestamp", ""))
    if "." in moment:
        moment = moment[: moment.index(".") + 4] + "Z"
    return {"timestamp": moment, "level": event.pop("level", "info"), **event}


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
