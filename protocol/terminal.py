"""Making text from elsewhere safe to show on a terminal.

File names, labels and error sentences come from peers. A terminal obeys escape sequences in what it is shown, and
bidirectional or invisible characters make a name look like another one. Names arrive already escaped
(`protocol.names`) and pass unchanged, so that what is on the screen can be typed back; whatever else would act on a
terminal is shown in the same form, ``␛HH``.
"""

from __future__ import annotations

import unicodedata

from protocol.names import ESCAPE_SIGN, escape

# Cc controls (C0, DEL, C1), Cf invisible and bidirectional formatting, Cs lone surrogates, Zl and Zp line breaks.
_UNSAFE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def is_safe(character: str) -> bool:
    """Whether one character may be shown as it is."""
    if " " <= character <= "~":
        return True
    return unicodedata.category(character) not in _UNSAFE_CATEGORIES and escape(character.encode()) == character


def _escaped(character: str) -> str:
    raw = character.encode("utf-8", "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass")
    return "".join(f"{ESCAPE_SIGN}{byte:02X}" for byte in raw)


def terminal_safe(text: object) -> str:
    """One line of text that no terminal acts on: every unsafe character becomes the ``␛HH`` of its bytes."""
    plain = str(text)
    if plain.isascii() and plain.isprintable():
        return plain
    return "".join(character if is_safe(character) else _escaped(character) for character in plain)


def terminal_safe_lines(text: object) -> str:
    """Like `terminal_safe`, but line feeds stay, for text that is meant to have several lines."""
    return "\n".join(terminal_safe(line) for line in str(text).split("\n"))


def ends_shown(text: object) -> str:
    """The text with blanks at its ends as ``␛HH``, for where nobody would see them: with them, two names look alike."""
    plain = str(text)
    if plain == plain.strip():
        return plain
    begin, end = len(plain) - len(plain.lstrip()), len(plain.rstrip())
    return "".join(c if begin <= at < end else _escaped(c) for at, c in enumerate(plain))


def typed_path(text: str) -> str:
    """A path from the command line as it travels: bytes that are not UTF-8 in their escaped form."""
    return "".join(_escaped(c) if "\udc80" <= c <= "\udcff" else c for c in text)
