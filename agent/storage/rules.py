"""Patterns on names: globs, and the include and exclude rules of a transfer.

Wildcards stand for characters, not bytes: ``?`` matches one é. Bytes that are not UTF-8 count as a character each.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Sequence

from protocol.control import FilterRule
from protocol.names import unescape

_WILD = re.compile(rb"[*?\[]")


def has_wildcards(pattern: bytes) -> bool:
    """Whether a name is a pattern: contains ``*``, ``?`` or ``[``."""
    return _WILD.search(pattern) is not None


def matches(pattern: bytes, name: bytes, *, ignore_case: bool = False) -> bool:
    """Whether a whole name matches a glob of ``*``, ``?``, ``[abc]``, ``[a-z]`` and ``[!abc]``."""
    return _compiled(pattern, ignore_case).match(_text(name)) is not None


def shell_matches(pattern: bytes, name: bytes) -> bool:
    """`matches` as a shell does it, for deletes with ``interpret_globs``: a name that begins with a dot needs a pattern
    that does, so that ``*`` deletes nothing hidden."""
    if name.startswith(b".") and not pattern.startswith(b"."):
        return False
    return matches(pattern, name)


def included(rules: Sequence[FilterRule], name: bytes, is_directory: bool) -> bool:
    """Whether an item met in recursion belongs to the transfer: the first rule of its type whose glob matches the name
    decides, and what no rule names is included."""
    kind = "dir" if is_directory else "file"
    for rule in rules:
        if rule.type in (None, kind) and matches(_pattern(rule.name), name):
            return rule.method == "include"
    return True


@functools.lru_cache(maxsize=1024)
def _pattern(text: str) -> bytes:
    return unescape(text)


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: bytes, ignore_case: bool) -> re.Pattern[str]:
    # The translation uses atomic groups: matching time grows with the product of the lengths at most.
    return re.compile(fnmatch.translate(_text(pattern)), re.IGNORECASE if ignore_case else 0)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
