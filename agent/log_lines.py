"""What a line of the agent's log looks like: one line an event, for people and `grep`, or for programs.

Extra facts given as ``extra={...}`` become ``key=value`` behind the sentence, or fields of the JSON object. Worker
processes write theirs alike; of little weight because of them.
"""

from __future__ import annotations

import json
import logging
import sys
import time

# The journal of the service manager takes priorities as sd-daemon(3) has them.
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
# What every record has; anything else was given as ``extra``.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class _Lines(logging.Formatter):
    """``2026-11-24T02:29:42.272Z INFO towpath.link: Linked. peer=x`` in UTC.

    Text of peers cannot fake another event: what follows a line break is indented, and characters that cannot be seen
    are written as their escapes. In the journal, which knows the time, the line begins with its priority instead.
    """

    def __init__(self, *, for_journal: bool = False) -> None:
        super().__init__()
        self.for_journal = for_journal

    def format(self, record: logging.LogRecord) -> str:
        """One event as text."""
        level = record.levelname.lower()
        facts = "".join(f" {key}={_word(value)}" for key, value in sorted(_facts(record).items()))
        head = f"<{_PRIORITIES.get(level, 6)}>" if self.for_journal else f"{_moment(record)} "
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


def form_now() -> str:
    """How this process logs: ``text``, ``json``, or ``journal`` (text for the service manager's journal)."""
    for handler in logging.root.handlers:
        if isinstance(handler.formatter, _Objects):
            return "json"
        if isinstance(handler.formatter, _Lines) and handler.formatter.for_journal:
            return "journal"
    return "text"


def log_to_standard_error(form: str, level: int) -> None:
    """Have a worker process log as its agent does (`form_now`), to where the agent's standard error goes."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter("text" if form == "journal" else form, for_journal=form == "journal"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
