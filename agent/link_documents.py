"""What requests on the link bring, and answers that are documents."""

from __future__ import annotations

import contextlib
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from protocol.control import Record, decode_untrusted, encode
from protocol.errors import ProtocolError

MAX_SMALL_BODY = 64 * 1024

R = TypeVar("R", bound=Record)


def document_response(document: object, status: int = 200) -> Response:
    """A document as an answer."""
    return Response(encode(document), status_code=status, media_type="application/json")


def number_untrusted(request: Request, name: str, default: int) -> int:
    """A parameter of the address. Raises `ProtocolError`."""
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise ProtocolError(f"The parameter {name} must be a number.")
    return int(text)


async def body_untrusted(request: Request, kind: type[R], most: int = MAX_SMALL_BODY) -> R:
    """The request's document, never longer than ``most`` bytes. Raises `ProtocolError`."""
    body = bytearray()
    try:
        async with contextlib.aclosing(request.stream()) as chunks:
            async for chunk in chunks:
                body += chunk
                if len(body) > most:
                    raise ProtocolError(f"The request is longer than {most} bytes.")
    except ClientDisconnect as error:
        raise ProtocolError("The request was broken off.") from error
    return decode_untrusted(body, kind)
