"""What holds for every request: a clean path, an id, a bounded body, headers, and no error without an answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from relay.api.client_authentication import caller_of
from relay.api.errors import new_request_id, render
from relay.api.holding import Holding, Memory
from relay.quota.requests import add_headers
from relay.refusal import ApiError
from relay.store.database import asking

logger = logging.getLogger("relay.api")

TRANSFER_API_VERSION = "0.10"
_TRANSFER_PREFIX = "/v0.10"
# Answers with tokens or personal data must not stay in caches on the way.
_NEVER_CACHED = ("/v2/", "/v0.10/", "/towpath/")


class Frame:
    """ASGI middleware around the whole application. ``max_body`` in bytes; ``clock`` gives Unix seconds."""

    def __init__(self, app: ASGIApp, *, max_body: int, clock: Callable[[], float]) -> None:
        self._app = app
        self._max_body = max_body
        self._memory = Memory.of(max_body)
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Clients that join an address ending in a slash and a path beginning with one send two.
        scope["path"] = "/" + scope["path"].lstrip("/")
        request_id = new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        holding = Holding(scope, self._memory)
        exchange = _Exchange(scope, receive, send, self._max_body, holding)
        started = self._clock()
        before = asking.set(caller_of(Request(scope)))
        try:
            exchange.check_announced_length()
            await self._app(scope, exchange.receive, exchange.send)
        except HTTPException as error:
            await exchange.fail(ApiError(error.status_code, "RequestTooLarge", str(error.detail)), request_id)
        except ApiError as error:
            await exchange.fail(error, request_id)
        except ClientDisconnect:
            logger.debug("Whoever sent request %s left before its end.", request_id)
        except Exception:
            logger.exception("%s %s failed (request %s)", scope["method"], scope["path"], request_id)
            sentence = f"The relay made a mistake; its operator finds it in the log under request {request_id}."
            await exchange.fail(ApiError(500, "InternalError", sentence), request_id)
        finally:
            holding.let_go()
            asking.reset(before)
            took = (self._clock() - started) * 1000
            logger.debug("%s %s %s %.0f ms %s", scope["method"], scope["path"], exchange.status, took, request_id)


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_body: int, holding: Holding) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._max_body = max_body
        self._received = 0
        self._holding = holding
        # What begins an answer goes with the first bytes of it, or with none where there is no room for these.
        self._beginning: Message | None = None
        self._refused = False
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
            self._holding.body(self._received)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._beginning = message
        elif not self._refused:
            if self._beginning is not None:
                try:
                    self._holding.answer(len(message.get("body", b"")))
                except ApiError as error:
                    self._beginning = None
                    await self.fail(error, self._scope["state"]["request_id"])
                    self._refused = True
                    return
            await self._begin()
            await self._send(message)

    async def _begin(self) -> None:
        if self._beginning is not None:
            message, self._beginning = self._beginning, None
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
