"""What a source says first on a connection that it dialled to a destination's data port: for which offer it is.

The destination is the TLS client whoever dialled, so without this line it could not tell what a silent caller wants.
The token comes from the destination's own offer; it finds the waiting transfer and proves nothing: both sides
authenticate in the TLS handshake that follows.
"""

from __future__ import annotations

import re
import secrets

_MAGIC = b"TOWPATH-REVERSED/1 "
_TOKEN = re.compile(rb"[0-9a-f]{32}\n")
LENGTH = len(_MAGIC) + 33


def new_token() -> str:
    """128 random bits, as hex."""
    return secrets.token_hex(16)


def is_token(text: str) -> bool:
    """Whether a peer's text can be a token."""
    return _TOKEN.fullmatch(text.encode() + b"\n") is not None


def preamble(token: str) -> bytes:
    """The line for one offer. Raises ValueError for what is no token."""
    if not is_token(token):
        raise ValueError("no token")
    return _MAGIC + token.encode() + b"\n"


def parse_preamble_untrusted(data: bytes) -> tuple[bool, str | None]:
    """Whether a connection that begins so may be a reversed one, and its token once the line is complete.

    (False, None): it is something else. Raises nothing.
    """
    if not _MAGIC.startswith(data[: len(_MAGIC)]):
        return False, None
    if len(data) < LENGTH:
        return True, None
    token = data[len(_MAGIC) : LENGTH]
    return (True, token[:-1].decode()) if _TOKEN.fullmatch(token) else (False, None)
