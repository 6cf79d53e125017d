"""Stands before the link's application: nothing passes until the relay has proven that it is the relay."""

from __future__ import annotations

from collections.abc import Callable

import trio

from protocol.control import RelayHello, encode
from protocol.errors import AccessDenied, ProtocolError, TowpathError
from protocol.identity import NodeKey
from protocol.link import (
    HELLO_PATH,
    MAX_HELLO,
    HelloFields,
    make_agent_hello,
    verify_relay_hello_untrusted,
    watch_untrusted,
)
from protocol.reverse_http.server import ASGIApplication, Receive, Scope, Send
from protocol.ticket import TicketVerifier


class HelloGate:
    """An ASGI application around another, for one connection.

    ``POST /link/hello`` is answered here, once; everything else is 403 until its proof was verified. ``decided`` is set
    then, or with the first hello that does not verify, after which the gate stays shut; ``used`` when the relay asks
    something, so that it has accepted the agent.
    """

    def __init__(
        self,
        app: ASGIApplication,
        *,
        identity: NodeKey,
        node_id: str,
        endpoint_id: str,
        verifier: TicketVerifier,
        channel: str,
        fields: Callable[[], HelloFields],
        clock: Callable[[], float],
        blind: bool = False,
    ) -> None:
        self._app = app
        self._identity = identity
        self._node_id = node_id
        self._endpoint_id = endpoint_id
        self._verifier = verifier
        self._channel = channel
        self._fields = fields
        self._clock = clock
        # The kernels cannot see whether the other side is still there.
        self._blind = blind
        self.watch = 0.0
        self.decided = trio.Event()
        self.used = trio.Event()
        self.proven = False
        self.hello: RelayHello | None = None
        self.refusal: TowpathError | None = None

    def refuse(self, reason: TowpathError) -> None:
        """Shut the gate for good; the first reason counts."""
        if not self.decided.is_set():
            self.refusal = reason
            self.decided.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == HELLO_PATH:
            await self._hello(scope, receive, send)
        elif self.proven:
            self.used.set()
            await self._app(scope, receive, send)
        else:
            await _answer_error(send, AccessDenied("The relay has not proven itself on this connection."))

    async def _hello(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await _answer_error(send, AccessDenied("The hello is a POST."))
            return
        document = await _body_untrusted(receive)
        if self.decided.is_set() or document is None:
            await _answer_error(send, AccessDenied("The hello is said once, and in full."))
            return
        try:
            hello = verify_relay_hello_untrusted(
                document,
                verifier=self._verifier,
                node_id=self._node_id,
                channel=self._channel,
                now=self._clock(),
            )
        except ProtocolError as error:
            await _answer_error(send, error)
            self.refuse(error)
            return
        if self._blind:
            self.watch = watch_untrusted(hello.watch)
        answer = make_agent_hello(
            hello,
            self._identity,
            node_id=self._node_id,
            endpoint_id=self._endpoint_id,
            channel=self._channel,
            fields=self._fields(),
            watch=self.watch,
        )
        self.hello = hello
        # Before the answer goes out: the relay may use the link as soon as it has it.
        self.proven = True
        self.decided.set()
        await _answer(send, 200, encode(answer))


async def _body_untrusted(receive: Receive) -> bytes | None:
    """The request's body; None when it is too long or the caller left."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_HELLO:
            return None
        if not message.get("more_body", False):
            return bytes(body)


async def _answer_error(send: Send, error: TowpathError) -> None:
    await _answer(send, 403, encode(error.to_document()))


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
