"""Reading JSON of strangers: what it will take in memory is estimated first, and counted as theirs while they ask."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec
import trio
from starlette.requests import Request

from relay.api.holding import holding_of
from relay.transfer.fields import bad_request

# How msgspec says that something is none.
NOT_JSON: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
# Larger documents are read in a thread, so that nobody else waits for them.
LARGE = 64 * 1024
# The longest task has a million values; three bytes of JSON may become a hundred of memory.
_MAX_VALUES = 2_500_000
# Bytes of a value beside those of its text: an object of one name, which is counted twice, takes 232 in Python 3.11.
_OF_VALUE = 128
# One such character in a text makes four bytes of each of the others: bytes of UTF-8 with which it begins.
_WIDE = (b"\\u", b"\xf0", b"\xf1", b"\xf2", b"\xf3", b"\xf4")
_SEPARATORS = (b",", b"{", b"[")
# Once no quotation mark inside is left; one that does not end is as long as the document.
_STRING = re.compile(rb'"[^"]*+"?+')


async def decoded_untrusted(request: Request, body: bytes) -> Any:
    """The document in the body of a request, which holds it until it is answered. Raises `NOT_JSON`, and `ApiError`:
    400 for one that would take too much memory, 503 while too much is held."""
    if len(body) <= LARGE:
        holding_of(request).document(memory_of(body))
        return msgspec.json.decode(body)
    holding_of(request).document(await trio.to_thread.run_sync(memory_of, body))
    return await trio.to_thread.run_sync(msgspec.json.decode, body)


def memory_of(body: bytes) -> int:
    """How many bytes a document takes at most once it is read. Raises `ApiError` 400 for one of very many values."""
    values = _values(body)
    if values > _MAX_VALUES:
        raise bad_request(f"The document has more than {_MAX_VALUES} values.")
    width = 4 if any(mark in body for mark in _WIDE) else 1 if body.isascii() else 2
    return values * _OF_VALUE + len(body) * width


def _values(body: bytes) -> int:
    """How many values a document has at most: before all but the first is one of three characters. Those in names do
    not count where that matters."""
    count = sum(map(body.count, _SEPARATORS))
    if count > _MAX_VALUES:
        body = _STRING.sub(b"", body.replace(b"\\\\", b"").replace(b'\\"', b""))
        count = sum(map(body.count, _SEPARATORS))
    return count + 1
