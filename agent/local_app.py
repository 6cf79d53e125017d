"""What the owner may ask of the running agent through the private socket: state, holding up, reconnecting, ending."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent.link_app import error_response
from agent.services import Owner, TaskService
from protocol.errors import TowpathError


def _answer(document: object) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")


class LocalApp:
    """The routes of the local socket."""

    def __init__(self, owner: Owner, tasks: TaskService) -> None:
        self._owner = owner
        self._tasks = tasks

    def application(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/status", _guard(self._status), methods=["GET"]),
                Route("/stop", _guard(self._stop), methods=["POST"]),
                Route("/reload", _guard(self._reload), methods=["POST"]),
                Route("/reconnect", _guard(self._reconnect), methods=["POST"]),
                Route("/pause", _guard(self._pause), methods=["POST"]),
                Route("/resume", _guard(self._resume), methods=["POST"]),
                Route("/tasks/{task}/pause", _guard(self._pause_task), methods=["POST"]),
                Route("/tasks/{task}/resume", _guard(self._resume_task), methods=["POST"]),
                Route("/collections/{collection}/accept-root", _guard(self._accept_root), methods=["POST"]),
            ]
        )

    async def _status(self, _request: Request) -> Response:
        return _answer(self._owner.status())

    async def _stop(self, _request: Request) -> Response:
        self._owner.stop()
        return _answer({"stopping": True})

    async def _reload(self, _request: Request) -> Response:
        return _answer({"sentence": await self._owner.reload()})

    async def _reconnect(self, _request: Request) -> Response:
        self._owner.reconnect()
        return _answer({})

    async def _pause(self, _request: Request) -> Response:
        await self._owner.set_paused(True)
        return _answer({"paused": True})

    async def _resume(self, _request: Request) -> Response:
        await self._owner.set_paused(False)
        return _answer({"paused": False})

    async def _pause_task(self, request: Request) -> Response:
        await self._tasks.pause_task(request.path_params["task"])
        return _answer({})

    async def _resume_task(self, request: Request) -> Response:
        await self._tasks.resume_task(request.path_params["task"])
        return _answer({})

    async def _accept_root(self, request: Request) -> Response:
        await self._owner.accept_root(request.path_params["collection"])
        return _answer({})


def _guard(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except TowpathError as error:
            return error_response(error)

    return guarded
