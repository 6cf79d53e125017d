"""Takes secrets out of text before it leaves this machine: known ones by value, unknown ones by their form."""

from __future__ import annotations

import re
from collections.abc import Iterable

MARK = "[removed]"
# Values shorter than this would take half of the text along.
SHORTEST = 6

_FORMS = (
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    # Setup keys, and JSON Web Tokens (tickets among them).
    re.compile(r"\btwp-[A-Za-z0-9_-]{16,}"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"),
    re.compile(r"(?i)(?<=bearer )[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(r"(?i)(?<=basic )[A-Za-z0-9+/=]{8,}"),
    # User name and password of a URL.
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
)
_NAMED = re.compile(
    r"""(?ix) ( ["']? [\w.-]*
    (?:secret|password|passwd|passphrase|token|api[_-]?key|setup[_-]?key|private[_-]?key|cookie)
    [\w-]* ["']? \s* [:=] \s* ) ( "(?:[^"\\\n]|\\.)*" | '[^'\n]*' | [^\s,;}\]"']+ )"""
)


class Redactor:
    """Replaces secrets by a mark. ``known`` are values that must not appear, whatever they look like."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        # Longest first: one value may be part of another.
        self._known = sorted({value for value in known if len(value) >= SHORTEST}, key=len, reverse=True)

    def clean(self, text: str) -> str:
        """The text without secrets."""
        for value in self._known:
            text = text.replace(value, MARK)
        for form in _FORMS:
            text = form.sub(MARK, text)
        return _NAMED.sub(_keeping_quotes, text)


def _keeping_quotes(match: re.Match[str]) -> str:
    quote = match[2][0] if match[2][0] in "\"'" else ""
    return f"{match[1]}{quote}{MARK}{quote}"
