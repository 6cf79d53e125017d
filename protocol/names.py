"""File names and collection paths: the one escape by which they travel, and the one place where they are checked.

Names are bytes. As text, printable UTF-8 stays itself and every byte of anything else becomes ``␛HH`` (U+241B and
two upper-case hexadecimal digits): bytes that are not UTF-8, control and format characters, bidirectional controls,
invisible characters, line and paragraph separators, non-characters. The sign itself is escaped only where it would be
misread. So text is safe on any screen, and comes back from users as exactly the bytes it was made from.
"""

from __future__ import annotations

import re
from typing import TypeAlias

from protocol.errors import ProtocolError

CollectionPath: TypeAlias = tuple[bytes, ...]

# Names of temporaries begin with this; listings and scans leave them out.
RESERVED_PREFIX = b".towpath."
# Looked for as a number: that is ten times as fast as looking for bytes in bytes.
SLASH = ord("/")

ESCAPE_SIGN = "\u241b"

# The longest name of common file systems, and Linux's PATH_MAX.
MAX_COMPONENT = 255
MAX_PATH = 4096
MAX_COMPONENTS = 1000
# Every byte of a path may be written as three characters; what is longer cannot be a path we accept.
MAX_PATH_TEXT = 4 * MAX_PATH

# Written out rather than asked from `unicodedata`, so that every version of Python escapes alike. Sources: Unicode 16
# general categories Cc, Cf, Zl, Zp, property Default_Ignorable_Code_Point, non-characters. Surrogates stand for
# bytes that are not UTF-8.
_HIDDEN_RANGES = (
    (0x0000, 0x001F),
    (0x007F, 0x009F),
    (0x00AD, 0x00AD),
    (0x034F, 0x034F),
    (0x0600, 0x0605),
    (0x061C, 0x061C),
    (0x06DD, 0x06DD),
    (0x070F, 0x070F),
    (0x0890, 0x0891),
    (0x08E2, 0x08E2),
    (0x115F, 0x1160),
    (0x17B4, 0x17B5),
    (0x180B, 0x180F),
    (0x200B, 0x200F),
    (0x2028, 0x202E),
    (0x2060, 0x206F),
    (0x3164, 0x3164),
    (0xD800, 0xDFFF),
    (0xFDD0, 0xFDEF),
    (0xFE00, 0xFE0F),
    (0xFEFF, 0xFEFF),
    (0xFFA0, 0xFFA0),
    (0xFFF0, 0xFFFB),
    (0x110BD, 0x110BD),
    (0x110CD, 0x110CD),
    (0x13430, 0x1343F),
    (0x1BCA0, 0x1BCA3),
    (0x1D173, 0x1D17A),
    (0xE0000, 0xE0FFF),
    *((plane << 16 | 0xFFFE, plane << 16 | 0xFFFF) for plane in range(17)),
)
_HIDDEN = re.compile(
    "["
    + "".join(f"{re.escape(chr(first))}-{re.escape(chr(last))}" for first, last in _HIDDEN_RANGES)
    + f"]|{ESCAPE_SIGN}(?=[0-9A-F][0-9A-F])"
)
_SIGN_BYTES = ESCAPE_SIGN.encode()
_ESCAPED = re.compile(re.escape(_SIGN_BYTES) + rb"([0-9A-F][0-9A-F])")


def _escape_match(match: re.Match[str]) -> str:
    return "".join(f"{ESCAPE_SIGN}{byte:02X}" for byte in match[0].encode("utf-8", "surrogateescape"))


def escape(raw: bytes) -> str:
    """Any bytes as printable text; `unescape` gives the same bytes back."""
    if raw.isascii():
        text = raw.decode("ascii")
        if text.isprintable():
            return text
        return _HIDDEN.sub(_escape_match, text)
    return _HIDDEN.sub(_escape_match, raw.decode("utf-8", "surrogateescape"))


def unescape(text: str) -> bytes:
    """The bytes that text stands for. Defined for all text a person can type, and `escape` of the result is the
    canonical spelling of it. Raises `ProtocolError` for lone surrogates, which no UTF-8 text contains."""
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ProtocolError("A name contains half of a surrogate pair; it is not text.", code="ILLEGAL_NAME") from error
    if _SIGN_BYTES not in raw:
        return raw
    return _ESCAPED.sub(lambda match: bytes((int(match[1], 16),)), raw)


def is_reserved(name: bytes) -> bool:
    """Whether a name belongs to temporaries."""
    return name.startswith(RESERVED_PREFIX)


def check_component_untrusted(raw: bytes) -> bytes:
    """The name itself if it can be one component of a path, else `ProtocolError` with code ILLEGAL_NAME."""
    if not raw or raw == b"." or raw == b"..":
        raise _illegal(raw, "is no name of a file or folder")
    if len(raw) > MAX_COMPONENT:
        raise _illegal(raw[:64], f"begins a name of {len(raw)} bytes; a name has {MAX_COMPONENT} bytes at most")
    if SLASH in raw or 0 in raw:
        raise _illegal(raw, "contains a slash or a null byte, which no name may")
    return raw


def parse_path_untrusted(text: str, home: CollectionPath = ()) -> CollectionPath:
    """A path as Globus users and clients write it, as components below the collection's root.

    ``/x`` is absolute; ``x``, ``~/x`` and ``/~/x`` are below ``home``; an empty text and ``~`` are ``home``. Repeated
    slashes count once. ``.`` and ``..`` are resolved on the text, and ``..`` at the root stays there (as in RFC 3986,
    5.2.4). Raises only `ProtocolError`.
    """
    if len(text) > MAX_PATH_TEXT:
        raise _illegal(text[:64].encode("utf-8", "replace"), f"begins a path longer than {MAX_PATH} bytes")
    parts = [part for part in text.split("/") if part]
    if parts and parts[0] == "~":
        path = list(home)
        parts = parts[1:]
    else:
        path = [] if text.startswith("/") else list(home)
    for part in parts:
        if part == ".":
            continue
        if part == "..":
            del path[-1:]
            continue
        path.append(check_component_untrusted(unescape(part)))
    return check_path_untrusted(tuple(path))


def below_home(text: str) -> bool:
    """Whether a path begins at home, by the rule of `parse_path_untrusted`."""
    return not text.startswith("/") or text.lstrip("/").split("/", 1)[0] == "~"


def check_path_untrusted(path: CollectionPath) -> CollectionPath:
    """The path itself if its length and depth are within bounds, else `ProtocolError`; components are not looked at."""
    if len(path) > MAX_COMPONENTS:
        raise _illegal(path[0], f"begins a path of {len(path)} folders; the limit is {MAX_COMPONENTS}")
    length = sum(map(len, path)) + len(path)
    if length > MAX_PATH:
        raise _illegal(path[0], f"begins a path of {length} bytes; the limit is {MAX_PATH}")
    return path


def format_path(path: CollectionPath, directory: bool = False) -> str:
    """A path as text, from the collection's root; `parse_path_untrusted` gives the same path back, whatever ``home``.

    With ``directory`` it ends in a slash.
    """
    if not path:
        return "/"
    # A folder that is really called "~" must not be read as the home.
    first = f"{ESCAPE_SIGN}7E" if path[0] == b"~" else escape(path[0])
    text = "/" + "/".join((first, *map(escape, path[1:])))
    return text + "/" if directory else text


def is_within(path: CollectionPath, prefix: CollectionPath) -> bool:
    """Whether ``path`` is ``prefix`` itself or below it."""
    return path[: len(prefix)] == prefix


def _illegal(raw: bytes, why: str) -> ProtocolError:
    shown = escape(raw)
    return ProtocolError(f"“{shown}” {why}.", code="ILLEGAL_NAME", subject=shown)


def split_path(path: bytes) -> CollectionPath:
    """Components of a session path of our own."""
    return tuple(path.split(b"/")) if path else ()
