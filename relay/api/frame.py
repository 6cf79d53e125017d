"""What holds for every request: a clean path, an id, a bounded body, headers, and no error without an answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protocol.places import Places
from relay.api.client_authentication import caller_of
from relay.api.errors import new_request_id, render
from relay.audit.notes import notes
from relay.quota.requests import add_headers
from relay.refusal import ApiError

logger = logging.getLogger("relay.api")

TRANSFER_API_VERSION = "0.10"
# Bodies are counted in pieces of so many bytes; the first one is not, which is all that most requests have.
PIECE = 64 * 1024
# So many of the largest bodies are held at a time, of all people together, until their requests are answered.
BODIES_AT_ONCE = 4
_RETRY_AFTER = 5
_TRANSFER_PREFIX = "/v0.10"
# Answers with tokens or personal data must not stay in caches on the way.
_NEVER_CACHED = ("/v2/", "/v0.10/", "/towpath/")


class Frame:
    """ASGI middleware around the whole application. ``max_body`` in bytes; ``clock`` gives Unix seconds."""

    def __init__(self, app: ASGIApp, *, max_body: int, clock: Callable[[], float]) -> None:
        self._app = app
        self._max_body = max_body
        self._held = Places(max(1, BODIES_AT_ONCE * max_body // PIECE))
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Clients that join an address ending in a slash and a path beginning with one send two.
        scope["path"] = "/" + scope["path"].lstrip("/")
        request_id = new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        exchange = _Exchange(scope, receive, send, self._max_body, self._held)
        started = self._clock()
        try:
            exchange.check_announced_length()
            await self._app(scope, exchange.receive, exchange.send)
        except HTTPException as error:
            await exchange.fail(ApiError(error.status_code, "RequestTooLarge", str(error.detail)), request_id)
        except ApiError as error:
            await exchange.fail(error, request_id)
        except Exception:
            logger.exception("%s %s failed (request %s)", scope["method"], scope["path"], request_id)
            sentence = f"The relay made a mistake; its operator finds it in the log under request {request_id}."
            await exchange.fail(ApiError(500, "InternalError", sentence), request_id)
        finally:
            exchange.let_go()
            took = (self._clock() - started) * 1000
            logger.debug("%s %s %s %.0f ms %s", scope["method"], scope["path"], exchange.status, took, request_id)


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_body: int, held: Places) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._max_body = max_body
        self._received = 0
        self._held = held
        self._pieces = 0
        # As whom the pieces are counted, from the first one on.
        self._holder = ""
        self.status: int | None = None

    def check_announced_length(self) -> None:
        """Refuse a request that says itself that its body is too large."""
        length = Headers(scope=self._scope).get("content-length", "0")
        if length.isdigit() and int(length[:20]) > self._max_body:
            raise self.too_large()

    def too_large(self) -> HTTPException:
        return HTTPException(413, f"The body of a request may have at most {self._max_body} bytes.")

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            if self._received > self._max_body:
                raise self.too_large()
            self._hold()
        return message

    def _hold(self) -> None:
        """Count what has come, and the caller keeps until the answer. Raises `ApiError` 503 where too much is held."""
        while self._received > (self._pieces + 1) * PIECE:
            if not self._pieces:
                self._holder = self._caller()
            if not self._held.take(self._holder):
                sentence = f"The relay holds too many large requests at the moment; ask again in {_RETRY_AFTER} s."
                raise ApiError(503, "ServiceUnavailable", sentence, headers={"Retry-After": str(_RETRY_AFTER)})
            self._pieces += 1

    def _caller(self) -> str:
        """The person, where they have shown who they are, or else where they call from."""
        if who := notes(self._scope).get("who"):
            return str(who)
        return caller_of(Request(self._scope))

    def let_go(self) -> None:
        """Nothing of the body is held any more."""
        for _ in range(self._pieces):
            self._held.leave(self._holder)
        self._pieces = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._add_headers(message)
        await self._send(message)

    def _add_headers(self, message: MutableMapping[str, Any]) -> None:
        headers = MutableHeaders(scope=message)
        path: str = self._scope["path"]
        headers["X-Content-Type-Options"] = "nosniff"
        headers["X-Request-Id"] = self._scope["state"]["request_id"]
        add_headers(self._scope, headers)
        if path.startswith(_TRANSFER_PREFIX):
            headers["X-Transfer-API-Version"] = TRANSFER_API_VERSION
        if path.startswith(_NEVER_CACHED):
            headers.setdefault("Cache-Control", "no-store")

    async def fail(self, error: ApiError, request_id: str) -> None:
        """Answer with an error, if no answer has begun; otherwise the connection just ends early."""
        if self.status is None:
            await render(error, self._scope["path"], request_id)(self._scope, self._receive, self.send)
