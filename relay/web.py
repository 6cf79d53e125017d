"""HTTP for one connection after another: Hypercorn's protocol engine on TLS streams that are handed over to it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import cast

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework
from priority.priority import PriorityError
from starlette.types import ASGIApp

from protocol.places import Places
from relay import web_protocols
from relay.proxies import Proxies
from relay.upgrade import Replayed

logger = logging.getLogger("relay.web")

# A connection that says nothing for so long is closed, even in the middle of a request.
_READ_TIMEOUT = 300
_KEEP_ALIVE = 75


@dataclass(frozen=True)
class WebStatistics:
    """Connections open now, taken in all, and turned away because there were too many."""

    open: int
    taken: int
    refused: int


class WebServer:
    """Serves an ASGI application on streams. ``max_connections`` bounds how many at a time, of which one caller gets a
    part; ``proxies`` are the operator's own."""

    def __init__(self, app: ASGIApp, *, max_connections: int, proxies: Proxies | None = None) -> None:
        web_protocols.install()
        # Two spellings of the same interface (ASGI 3).
        self._app = ASGIWrapper(cast("ASGIFramework", app))
        self._places = Places(max_connections)
        self._proxies = proxies or Proxies()
        self._context = WorkerContext(None)
        self._stopping = trio.Event()
        self._idle = trio.Event()
        self._taken = 0
        self._refused = 0
        self._config = Config()
        self._config.include_server_header = False
        self._config.keep_alive_timeout = _KEEP_ALIVE
        self._config.read_timeout = _READ_TIMEOUT
        self._config.h2_max_concurrent_streams = 100
        self._config.errorlog = logger

    async def serve(self, stream: trio.SSLStream[trio.SocketStream] | Replayed) -> None:
        """Answer requests on the stream until its end, and close it. Cancellation closes it at once."""
        caller = self._proxies.caller_at(stream)
        if self._stopping.is_set() or not self._places.take(caller):
            self._refused += 1
            await trio.aclose_forcefully(stream)
            return
        self._taken += 1
        try:
            secured = cast("trio.SSLStream[trio.SocketStream]", stream)
            await TCPServer(self._app, self._config, self._context, {}, secured).run()
        except* PriorityError:
            # Hypercorn lets a flood of priorities end the connection so; that is the caller's doing.
            logger.debug("A connection to the web server was ended: it sets too many priorities.")
        finally:
            self._places.leave(caller)
            if self._stopping.is_set() and not self._places.taken:
                self._idle.set()

    async def stop(self, grace: float) -> None:
        """Close idle connections, let requests under way finish for up to ``grace`` seconds; take no new ones."""
        self._stopping.set()
        await self._context.terminated.set()
        with trio.move_on_after(grace):
            if self._places.taken:
                await self._idle.wait()

    def statistics(self) -> WebStatistics:
        """How busy the server is."""
        return WebStatistics(self._places.taken, self._taken, self._refused)
