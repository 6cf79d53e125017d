"""What the relay may ask of this agent: the routes of ``/link`` and nothing else (see docs/protocol.md).

A Starlette application over shared services. Every route asks the owner's policy first; nothing about configuration,
updates or support exists here. The hello itself is answered before this application, by `agent.link_gate`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from agent.collections import Collections
from agent.config import CollectionConfig
from agent.policy import Access, Policy
from agent.services import TaskService
from agent.storage.faults import fault
from agent.storage.listing import Accounts, list_directory, stat_entry
from agent.storage.query import parse_query_untrusted
from protocol.control import (
    MAX_DOCUMENT,
    Record,
    SessionAnswer,
    SessionOrder,
    TaskOrder,
    decode_untrusted,
    encode,
)
from protocol.errors import ItemFailed, NeedsPerson, ProtocolError, RetryLater, TowpathError
from protocol.names import CollectionPath, parse_path_untrusted, unescape

# Storage calls of the relay at a time; more wait their turn.
CALLS_AT_ONCE = 16
MAX_SMALL_BODY = 64 * 1024
MAX_LINK_TARGET = 4096

_STATUS = {
    "PERMISSION_DENIED": 403,
    "READ_ONLY": 403,
    "TICKET_REFUSED": 403,
    "NOT_FOUND": 404,
    "FILE_NOT_FOUND": 404,
    "UNKNOWN_COLLECTION": 404,
    "EXISTS": 409,
    "NOT_A_DIRECTORY": 409,
    "IS_A_DIRECTORY": 409,
    "NOT_EMPTY": 409,
    "NO_SPACE": 507,
    "QUOTA_EXCEEDED": 507,
}

R = TypeVar("R", bound=Record)
T = TypeVar("T")


class _Acknowledgement(Record, frozen=True, kw_only=True):
    n: int


class _PathBody(Record, frozen=True, kw_only=True):
    path: str


class _RenameBody(Record, frozen=True, kw_only=True):
    old_path: str
    new_path: str


class _SymlinkBody(Record, frozen=True, kw_only=True):
    path: str
    symlink_target: str


def status_of(error: TowpathError) -> int:
    """The HTTP status that carries an error."""
    known = _STATUS.get(error.code)
    if known is not None:
        return known
    if isinstance(error, ProtocolError):
        return 400
    return 503 if isinstance(error, RetryLater | NeedsPerson) else 409


def error_response(error: TowpathError) -> Response:
    """An error as the documented answer."""
    return JSONResponse(error.to_document(), status_code=status_of(error))


def _answer(document: object, status: int = 200) -> Response:
    return Response(encode(document), status_code=status, media_type="application/json")


class LinkApp:
    """The routes. Create one, take `application`."""

    def __init__(self, policy: Policy, collections: Collections, tasks: TaskService) -> None:
        self._policy = policy
        self._collections = collections
        self._tasks = tasks
        self._accounts = Accounts()
        self._calls = trio.CapacityLimiter(CALLS_AT_ONCE)

    def application(self) -> Starlette:
        """The ASGI application."""
        one = "/link/collections/{collection}"
        return Starlette(
            routes=[
                Route("/link/events", self._guard("events", self._events), methods=["GET"]),
                Route("/link/events/acknowledge", self._guard("events", self._acknowledge), methods=["POST"]),
                Route("/link/collections", self._guard("collections", self._list_collections), methods=["GET"]),
                Route(f"{one}/ls", self._guard("collections", self._ls), methods=["GET"]),
                Route(f"{one}/stat", self._guard("collections", self._stat), methods=["GET"]),
                Route(f"{one}/mkdir", self._guard("collections", self._mkdir), methods=["POST"]),
                Route(f"{one}/rename", self._guard("collections", self._rename), methods=["POST"]),
                Route(f"{one}/symlink", self._guard("collections", self._symlink), methods=["POST"]),
                Route("/link/tasks/{task}", self._guard("tasks", self._put_task), methods=["PUT"]),
                Route("/link/tasks/{task}", self._guard("tasks", self._get_task), methods=["GET"]),
                Route("/link/tasks/{task}", self._guard("tasks", self._close_task), methods=["DELETE"]),
                Route("/link/tasks/{task}/session", self._guard("tasks", self._put_answer), methods=["PUT"]),
                Route("/link/tasks/{task}/successful", self._guard("tasks", self._successful), methods=["GET"]),
                Route("/link/tasks/{task}/skipped", self._guard("tasks", self._skipped), methods=["GET"]),
                Route("/link/sessions/{session}", self._guard("sessions", self._put_session), methods=["PUT"]),
                Route("/link/sessions/{session}", self._guard("sessions", self._withdraw), methods=["DELETE"]),
            ],
            exception_handlers={HTTPException: _http_error},
        )

    def _guard(
        self, operation: str, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                self._policy.check_operation(operation)
                return await handler(request)
            except TowpathError as error:
                return error_response(error)

        return guarded

    # --- events ----------------------------------------------------------------------------------------

    async def _events(self, request: Request) -> Response:
        after = _number(request, "after", 0)

        async def lines() -> AsyncIterator[bytes]:
            async with self._tasks.events(after) as events:
                async for event in events:
                    yield encode(event) + b"\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    async def _acknowledge(self, request: Request) -> Response:
        await self._tasks.acknowledge((await _body(request, _Acknowledgement)).n)
        return Response(status_code=204)

    # --- collections -----------------------------------------------------------------------------------

    async def _list_collections(self, _request: Request) -> Response:
        def work() -> object:
            return {"collections": [self._collections.report(config) for config in self._policy.collections]}

        return _answer(await self._in_thread(work))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work, limiter=self._calls, abandon_on_cancel=False)

    def _allowed(self, request: Request, text: str, access: Access) -> tuple[CollectionConfig, CollectionPath]:
        """A path of the relay, parsed and decided about. Raises `TowpathError`."""
        config = self._policy.collection(request.path_params["collection"])
        home = parse_path_untrusted(config.home)
        path = parse_path_untrusted(text, home)
        return self._policy.check(config.id, path, access), path

    async def _ls(self, request: Request) -> Response:
        query = request.query_params
        config, path = self._allowed(request, query.get("path") or "~", "r")
        wanted = parse_query_untrusted(
            filters=query.getlist("filter"),
            orderby=query.get("orderby", ""),
            limit=_number(request, "limit", 100_000),
            offset=_number(request, "offset", 0),
            show_hidden=query.get("show_hidden", "1") != "0",
        )

        def work() -> object:
            with self._collections.using(config) as root:
                return list_directory(root, path, wanted, self._accounts)

        return _answer(await self._in_thread(work))

    async def _stat(self, request: Request) -> Response:
        config, path = self._allowed(request, request.query_params.get("path") or "~", "r")

        def work() -> object:
            with self._collections.using(config) as root:
                return stat_entry(root, path, self._accounts)

        return _answer(await self._in_thread(work))

    async def _mkdir(self, request: Request) -> Response:
        config, path = self._allowed(request, (await _body(request, _PathBody)).path, "rw")
        if not path:
            raise ItemFailed("The root of the collection exists already.", code="EXISTS")

        def work() -> None:
            with self._collections.using(config) as root:
                parent, name = root.open_parent(path)
                with parent:
                    parent.mkdir(name)
                    parent.sync()

        await self._change(work, path)
        return Response(status_code=201)

    async def _change(self, work: Callable[[], None], path: CollectionPath) -> None:
        try:
            await self._in_thread(work)
        except OSError as error:
            raise fault(error, "", path) from error

    async def _rename(self, request: Request) -> Response:
        body = await _body(request, _RenameBody)
        config, old = self._allowed(request, body.old_path, "rw")
        _, new = self._allowed(request, body.new_path, "rw")

        def work() -> None:
            with self._collections.using(config) as root:
                source, old_name = root.open_parent(old)
                with source:
                    target, new_name = root.open_parent(new)
                    with target:
                        source.rename_no_replace(old_name, new_name, target)
                        target.sync()
                        source.sync()

        await self._change(work, old)
        return _answer({})

    async def _symlink(self, request: Request) -> Response:
        body = await _body(request, _SymlinkBody)
        config, path = self._allowed(request, body.path, "rw")
        target = unescape(body.symlink_target)
        if not target or len(target) > MAX_LINK_TARGET or b"\0" in target:
            raise ProtocolError("The target of the symlink is no path.", code="ILLEGAL_NAME")

        def work() -> None:
            with self._collections.using(config) as root:
                parent, name = root.open_parent(path)
                with parent:
                    parent.symlink(name, target)
                    parent.sync()

        await self._change(work, path)
        return Response(status_code=201)

    # --- tasks -----------------------------------------------------------------------------------------

    async def _put_task(self, request: Request) -> Response:
        order = await _body(request, TaskOrder, MAX_DOCUMENT)
        if order.task_id != request.path_params["task"]:
            raise ProtocolError("The order is for another task than the address says.")
        if order.desired == "run":
            self._policy.check(order.destination.collection_id, (), "rw")
        return _answer(await self._tasks.put_task(order), 202)

    async def _get_task(self, request: Request) -> Response:
        return _answer(self._tasks.get_task(request.path_params["task"]))

    async def _close_task(self, request: Request) -> Response:
        await self._tasks.close_task(request.path_params["task"])
        return Response(status_code=204)

    async def _put_answer(self, request: Request) -> Response:
        answer = await _body(request, SessionAnswer)
        await self._tasks.put_session_answer(request.path_params["task"], answer)
        return Response(status_code=204)

    async def _successful(self, request: Request) -> Response:
        return _answer(await self._tasks.successful(*_page(request)))

    async def _skipped(self, request: Request) -> Response:
        return _answer(await self._tasks.skipped(*_page(request)))

    # --- sessions --------------------------------------------------------------------------------------

    async def _put_session(self, request: Request) -> Response:
        order = await _body(request, SessionOrder, 1024 * 1024)
        if order.session_id != request.path_params["session"]:
            raise ProtocolError("The order is for another session than the address says.")
        return _answer(await self._tasks.put_session(order))

    async def _withdraw(self, request: Request) -> Response:
        await self._tasks.withdraw_session(request.path_params["session"])
        return Response(status_code=204)


def _page(request: Request) -> tuple[str, str | None, int]:
    return request.path_params["task"], request.query_params.get("marker"), _number(request, "limit", 1000)


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise ProtocolError(f"The parameter {name} must be a number.")
    return int(text)


async def _body(request: Request, kind: type[R], most: int = MAX_SMALL_BODY) -> R:
    """The request's document, never longer than ``most`` bytes. Raises `ProtocolError`."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise ProtocolError(f"The request is longer than {most} bytes.")
    except ClientDisconnect as error:
        raise ProtocolError("The request was broken off.") from error
    return decode_untrusted(body, kind)


async def _http_error(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    document: dict[str, Any] = ItemFailed("The agent has no such route.", code="NO_SUCH_ROUTE").to_document()
    return Response(msgspec.json.encode(document), status_code=status, media_type="application/json")
