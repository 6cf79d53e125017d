"""Serves the owner's application on the private socket: Hypercorn, one connection a task, known users only."""

from __future__ import annotations

import logging
import socket
from typing import Any, cast

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from starlette.applications import Starlette

from agent import local_socket
from agent.local_gate import Application, Loopback, loopback_gate, unix_gate

logger = logging.getLogger("towpath.local")

MAX_CONNECTIONS = 32


async def serve_local(listener: socket.socket, application: Starlette, loopback: Loopback | None = None) -> None:
    """Answer on a listening Unix socket (or loopback port) until cancelled, through the gate of each.

    Connections of other users to the Unix socket are closed unanswered.
    """
    inner = cast("Application", application)
    app = ASGIWrapper(cast("Any", unix_gate(inner) if loopback is None else loopback_gate(inner, loopback)))
    config = Config()
    config.errorlog = logger
    config.h11_max_incomplete_size = 16 * 1024
    context = WorkerContext(None)
    places = trio.Semaphore(MAX_CONNECTIONS)

    async def serve(stream: trio.SocketStream) -> None:
        async with places:
            raw = cast("socket.socket", stream.socket)
            if loopback is None and not _is_allowed(raw):
                await stream.aclose()
                return
            await TCPServer(app, config, context, cast("Any", {}), cast("Any", stream)).run()

    await trio.serve_listeners(serve, [trio.SocketListener(trio.socket.from_stdlib_socket(listener))])


def _is_allowed(connection: socket.socket) -> bool:
    try:
        allowed = local_socket.is_allowed(local_socket.peer_user(connection))
    except OSError:
        # Gone again already: macOS does not know then who it was.
        return False
    if not allowed:
        logger.warning("Another user tried to control this agent.")
    return allowed
