"""What the relay may ask of this agent: the routes of ``/link`` and nothing else (see docs/protocol.md).

A Starlette application over shared services. Every route asks the owner's policy first; nothing about configuration,
updates or support exists here. The hello itself is answered before this application, by `agent.link_gate`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agent.collections import Collections
from agent.config.keys import is_uuid
from agent.link_documents import body_untrusted, document_response, number_untrusted
from agent.link_events import EventLines
from agent.link_files import LinkFiles
from agent.policy import Policy
from agent.services import TaskService
from protocol.candidates import PathAnswer, PathGo, PathOffer
from protocol.control import (
    MAX_DOCUMENT,
    CollectionReport,
    MissingCollections,
    Record,
    SessionAnswer,
    SessionOrder,
    TaskList,
    TaskOrder,
)
from protocol.errors import ItemFailed, NeedsPerson, ProtocolError, RetryLater, TowpathError

MAX_PATH_BODY = 512 * 1024

_STATUS = {
    "PERMISSION_DENIED": 403,
    "READ_ONLY": 403,
    "TICKET_REFUSED": 403,
    "NOT_FOUND": 404,
    "FILE_NOT_FOUND": 404,
    "UNKNOWN_COLLECTION": 404,
    "NO_SUCH_ROUTE": 404,
    "ILLEGAL_NAME": 400,
    "EXISTS": 409,
    "NOT_A_DIRECTORY": 409,
    "IS_A_DIRECTORY": 409,
    "NOT_EMPTY": 409,
    "NO_SPACE": 507,
    "QUOTA_EXCEEDED": 507,
}

Handler = Callable[[Request], Awaitable[Response]]

logger = logging.getLogger("towpath.link")


class _Acknowledgement(Record, frozen=True, kw_only=True):
    n: int


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


class LinkApp:
    """The routes. Create one, take `application`.

    ``look`` looks at all collections and answers with their reports; ``lacks`` is told which of them the relay does not
    have.
    """

    def __init__(
        self,
        policy: Policy,
        collections: Collections,
        tasks: TaskService,
        look: Callable[[], Awaitable[list[CollectionReport]]],
        lacks: Callable[[list[str]], None],
    ) -> None:
        self._policy = policy
        self._tasks = tasks
        self._look = look
        self._lacks = lacks
        self._files = LinkFiles(policy, collections)

    def table(self) -> list[tuple[str, str, str, Handler]]:
        """Method, path, kind of operation (see `agent.policy`) and handler of every route."""
        one = "/link/collections/{collection}"
        return [
            ("GET", "/link/events", "events", self._events),
            ("POST", "/link/events/acknowledge", "events", self._acknowledge),
            ("GET", "/link/collections", "collections", self._list_collections),
            ("POST", "/link/collections/missing", "collections", self._note_missing),
            ("GET", f"{one}/ls", "collections", self._files.ls),
            ("GET", f"{one}/stat", "collections", self._files.stat),
            ("POST", f"{one}/mkdir", "collections", self._files.mkdir),
            ("POST", f"{one}/rename", "collections", self._files.rename),
            ("POST", f"{one}/symlink", "collections", self._files.symlink),
            ("PUT", "/link/tasks/{task}", "tasks", self._put_task),
            ("GET", "/link/task-list", "tasks", self._list_tasks),
            ("GET", "/link/tasks/{task}", "tasks", self._get_task),
            ("GET", "/link/tasks/{task}/order", "tasks", self._get_order),
            ("DELETE", "/link/tasks/{task}", "tasks", self._close_task),
            ("PUT", "/link/tasks/{task}/session", "tasks", self._put_answer),
            ("GET", "/link/tasks/{task}/successful", "tasks", self._successful),
            ("GET", "/link/tasks/{task}/skipped", "tasks", self._skipped),
            ("PUT", "/link/sessions/{session}", "sessions", self._put_session),
            ("PUT", "/link/sessions/{session}/offer", "sessions", self._put_offer),
            ("PUT", "/link/sessions/{session}/go", "sessions", self._put_source_go),
            ("PUT", "/link/tasks/{task}/go", "tasks", self._put_go),
            ("PUT", "/link/tasks/{task}/candidates", "tasks", self._put_candidates),
            ("DELETE", "/link/sessions/{session}", "withdrawals", self._withdraw),
        ]

    def application(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route(path, self._guard(operation, handler), methods=[method])
                for method, path, operation, handler in self.table()
            ],
            exception_handlers={HTTPException: _http_error},
        )

    def _guard(self, operation: str, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            try:
                self._policy.check_operation(operation)
                _check_ids(request)
                return await handler(request)
            except TowpathError as error:
                return error_response(error)
            except Exception:
                logger.exception("A request of the relay failed: %s %s", request.method, request.url.path)
                failed = RetryLater("The agent failed to answer; its log says more.", code="INTERNAL_ERROR")
                return JSONResponse(failed.to_document(), status_code=500)

        return guarded

    # --- events ----------------------------------------------------------------------------------------

    async def _events(self, request: Request) -> Response:
        return EventLines(self._tasks.events(number_untrusted(request, "after", 0)))

    async def _acknowledge(self, request: Request) -> Response:
        await self._tasks.acknowledge((await body_untrusted(request, _Acknowledgement)).n)
        return Response(status_code=204)

    # --- collections -----------------------------------------------------------------------------------

    async def _list_collections(self, _request: Request) -> Response:
        return document_response({"collections": await self._look()})

    async def _note_missing(self, request: Request) -> Response:
        self._lacks((await body_untrusted(request, MissingCollections)).ids)
        return Response(status_code=204)

    # --- tasks -----------------------------------------------------------------------------------------

    async def _put_task(self, request: Request) -> Response:
        order = await body_untrusted(request, TaskOrder, MAX_DOCUMENT)
        if order.task_id != request.path_params["task"]:
            raise ProtocolError("The order is for another task than the address says.")
        if order.desired == "run":
            self._policy.check(order.destination.collection_id, (), "rw")
        observed = await self._tasks.put_task(order)
        return document_response(observed, 202)

    async def _list_tasks(self, _request: Request) -> Response:
        return document_response(TaskList(tasks=self._tasks.tasks()))

    async def _get_order(self, request: Request) -> Response:
        return document_response(self._tasks.order(request.path_params["task"]))

    async def _get_task(self, request: Request) -> Response:
        return document_response(self._tasks.get_task(request.path_params["task"]))

    async def _close_task(self, request: Request) -> Response:
        await self._tasks.close_task(request.path_params["task"])
        return Response(status_code=204)

    async def _put_answer(self, request: Request) -> Response:
        answer = await body_untrusted(request, SessionAnswer)
        await self._tasks.put_session_answer(request.path_params["task"], answer)
        return Response(status_code=204)

    async def _successful(self, request: Request) -> Response:
        return document_response(await self._tasks.successful(*_page(request)))

    async def _skipped(self, request: Request) -> Response:
        return document_response(await self._tasks.skipped(*_page(request)))

    # --- sessions --------------------------------------------------------------------------------------

    async def _put_session(self, request: Request) -> Response:
        order = await body_untrusted(request, SessionOrder, 1024 * 1024)
        if order.session_id != request.path_params["session"]:
            raise ProtocolError("The order is for another session than the address says.")
        return document_response(await self._tasks.put_session(order))

    async def _put_offer(self, request: Request) -> Response:
        offer = await body_untrusted(request, PathOffer, MAX_PATH_BODY)
        if offer.session_id != request.path_params["session"]:
            raise ProtocolError("The offer is for another session than the address says.")
        return document_response(await self._tasks.take_offer(offer))

    async def _put_source_go(self, request: Request) -> Response:
        go = await body_untrusted(request, PathGo, MAX_PATH_BODY)
        if go.session_id != request.path_params["session"]:
            raise ProtocolError("The go is for another session than the address says.")
        self._tasks.take_source_go(go)
        return Response(status_code=204)

    async def _put_go(self, request: Request) -> Response:
        go = await body_untrusted(request, PathGo, MAX_PATH_BODY)
        self._tasks.take_go(request.path_params["task"], go)
        return Response(status_code=204)

    async def _put_candidates(self, request: Request) -> Response:
        answer = await body_untrusted(request, PathAnswer, MAX_PATH_BODY)
        self._tasks.take_candidates(request.path_params["task"], answer)
        return Response(status_code=204)

    async def _withdraw(self, request: Request) -> Response:
        await self._tasks.withdraw_session(request.path_params["session"])
        return Response(status_code=204)


def _check_ids(request: Request) -> None:
    """Ids become names of files and keys of tables: nothing but a UUID may pass. Raises `ProtocolError`."""
    for name, value in request.path_params.items():
        if not is_uuid(value):
            raise ProtocolError(f"The {name} in the address is no id.")


def _page(request: Request) -> tuple[str, str | None, int]:
    return request.path_params["task"], request.query_params.get("marker"), number_untrusted(request, "limit", 1000)


async def _http_error(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    document: dict[str, Any] = ItemFailed("The agent has no such route.", code="NO_SUCH_ROUTE").to_document()
    return Response(msgspec.json.encode(document), status_code=status, media_type="application/json")
