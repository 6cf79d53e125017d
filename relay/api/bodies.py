"""Reading the body of a request of somebody who has not shown yet who they are."""

from __future__ import annotations

from contextlib import aclosing

from fastapi import Request


async def body_untrusted(request: Request, most: int) -> bytes | None:
    """The whole body; None as soon as it has more than ``most`` bytes, of which no more than a chunk is kept."""
    body = bytearray()
    async with aclosing(request.stream()) as chunks:
        async for chunk in chunks:
            body += chunk
            if len(body) > most:
                return None
    return bytes(body)
