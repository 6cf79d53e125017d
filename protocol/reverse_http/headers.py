"""Checks header fields before they reach the encoder, and reads the ones this package needs.

h2 validates while it encodes; an error half way through would leave the shared compression state of the connection
damaged for every later request. So everything is checked here first (RFC 9113 section 8.2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from protocol.reverse_http.core import Header

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_METHOD = re.compile(r"[A-Z]{1,32}")
_TARGET = re.compile(r"/[\x21-\x7e]*")
# Meaningless or forbidden in HTTP/2 (section 8.2.2).
_CONNECTION_FIELDS = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})


def checked_headers(headers: Iterable[Header], most: int) -> list[Header]:
    """Well-formed lower-case fields without those of HTTP/1. Raises ValueError, also above ``most`` bytes."""
    checked: list[Header] = []
    size = 0
    for raw_name, raw_value in headers:
        name, value = bytes(raw_name).lower(), bytes(raw_value).strip(b" \t")
        if name in _CONNECTION_FIELDS:
            continue
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ValueError(f"The header field {name[:64]!r} is malformed.")
        # RFC 9113 section 6.5.2 counts 32 bytes of overhead a field.
        size += len(name) + len(value) + 32
        checked.append((name, value))
    if size > most:
        raise ValueError(f"The header fields take {size} bytes; at most {most} are allowed.")
    return checked


def request_headers(method: str, target: str, headers: Iterable[Header], length: int | None, most: int) -> list[Header]:
    """All fields of a request. Raises ValueError when the method, the target or a field is malformed or too long."""
    if not _METHOD.fullmatch(method):
        raise ValueError(f"{method[:32]!r} is no HTTP method.")
    if not _TARGET.fullmatch(target):
        raise ValueError("A request target must begin with a slash and be percent-encoded.")
    pseudo = [
        (b":method", method.encode()),
        (b":scheme", b"https"),
        (b":authority", b"agent"),
        (b":path", target.encode()),
    ]
    size = sum(len(name) + len(value) + 32 for name, value in pseudo)
    fields = checked_headers(headers, most - size - 64)
    if any(name == b"content-length" for name, _ in fields):
        raise ValueError("The content-length of a request is not the caller's to set.")
    if length is not None:
        fields.append((b"content-length", str(length).encode()))
    return pseudo + fields


def field(headers: Iterable[Header], name: bytes) -> bytes | None:
    """The first field of that lower-case name."""
    return next((value for known, value in headers if known == name), None)
