"""Making text from elsewhere safe to show on a terminal.

File names, labels and error sentences come from peers. A terminal obeys escape sequences in what it is shown, and
bidirectional or invisible characters make a name look like another one; so every such character is shown as an
escape instead. The escapes are those a Python string literal would use, on one line, and readable.
"""

from __future__ import annotations

import unicodedata

# Cc controls (C0, DEL, C1), Cf invisible and bidirectional formatting, Cs lone surrogates, Zl and Zp line breaks
# other than \n, Co and Cn characters that no font agrees about.
_UNSAFE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn"})


def is_safe(character: str) -> bool:
    """Whether one character may be shown as it is."""
    return " " <= character <= "~" or unicodedata.category(character) not in _UNSAFE_CATEGORIES


def _escape(character: str) -> str:
    code = ord(character)
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def terminal_safe(text: object) -> str:
    """One line of text that no terminal acts on: unsafe characters become ``\\xNN`` or ``\\uNNNN``."""
    plain = str(text)
    if plain.isascii() and plain.isprintable():
        return plain
    return "".join(character if is_safe(character) else _escape(character) for character in plain)


def terminal_safe_lines(text: object) -> str:
    """Like `terminal_safe`, but line feeds stay, for text that is meant to have several lines."""
    return "\n".join(terminal_safe(line) for line in str(text).split("\n"))
