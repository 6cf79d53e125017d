"""What the relay may ask of this agent: the routes of ``/link`` and nothing else (see docs/protocol.md).

A Starlette application over shared services. Every route asks the owner's policy first; nothing about configuration,
updates or support exists here. The hello itself is answered before this application, by `agent.link_gate`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agent.collections import Collections
from agent.config.keys import CollectionConfig, is_uuid
from agent.link_events import EventLines, until_disconnected
from agent.policy import Access, Policy
from agent.services import TaskService
from agent.storage.base import Directory, Root
from agent.storage.faults import fault
from agent.storage.listing import Accounts, list_directory, stat_entry
from agent.storage.own_files import HoldsOwn
from agent.storage.query import parse_query_untrusted
from agent.storage.reach import Reach
from protocol.candidates import PathAnswer, PathGo, PathOffer
from protocol.control import (
    MAX_DOCUMENT,
    MAX_ENTRIES,
    CollectionReport,
    Entry,
    Listing,
    MissingCollections,
    Record,
    SessionAnswer,
    SessionOrder,
    TaskList,
    TaskOrder,
    decode_untrusted,
    encode,
)
from protocol.errors import ItemFailed, NeedsPerson, ProtocolError, RetryLater, TowpathError
from protocol.names import CollectionPath, format_path, parse_path_untrusted, unescape

# Storage calls at a time, for each collection: a file server that hangs holds up its own collection only.
CALLS_AT_ONCE = 4
MAX_SMALL_BODY = 64 * 1024
MAX_LINK_TARGET = 4096
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

R = TypeVar("R", bound=Record)
T = TypeVar("T")
AskAgain = Callable[[], None]
Handler = Callable[[Request], Awaitable[Response]]

logger = logging.getLogger("towpath.link")


class _Acknowledgement(Record, frozen=True, kw_only=True):
    n: int


class _Body(Record, frozen=True, kw_only=True):
    reach: list[str] | None = None


class _PathBody(_Body, frozen=True, kw_only=True):
    path: str


class _RenameBody(_Body, frozen=True, kw_only=True):
    old_path: str
    new_path: str


class _SymlinkBody(_Body, frozen=True, kw_only=True):
    path: str
    symlink_target: str


@dataclass(frozen=True)
class _Asked:
    """What was allowed: an access to one or more paths of a collection, as it is set up then."""

    config: CollectionConfig
    access: Access
    paths: tuple[CollectionPath, ...]

    @property
    def path(self) -> CollectionPath:
        """The only path, or the first one."""
        return self.paths[0]


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
        self._collections = collections
        self._tasks = tasks
        self._look = look
        self._lacks = lacks
        self._accounts = Accounts()
        self._limiters: dict[str, trio.CapacityLimiter] = {}

    def table(self) -> list[tuple[str, str, str, Handler]]:
        """Method, path, kind of operation (see `agent.policy`) and handler of every route."""
        one = "/link/collections/{collection}"
        return [
            ("GET", "/link/events", "events", self._events),
            ("POST", "/link/events/acknowledge", "events", self._acknowledge),
            ("GET", "/link/collections", "collections", self._list_collections),
            ("POST", "/link/collections/missing", "collections", self._note_missing),
            ("GET", f"{one}/ls", "collections", self._ls),
            ("GET", f"{one}/stat", "collections", self._stat),
            ("POST", f"{one}/mkdir", "collections", self._mkdir),
            ("POST", f"{one}/rename", "collections", self._rename),
            ("POST", f"{one}/symlink", "collections", self._symlink),
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
        after = _number(request, "after", 0)

        return EventLines(self._tasks.events(after))

    async def _acknowledge(self, request: Request) -> Response:
        await self._tasks.acknowledge((await _body(request, _Acknowledgement)).n)
        return Response(status_code=204)

    # --- collections -----------------------------------------------------------------------------------

    async def _list_collections(self, _request: Request) -> Response:
        return _answer({"collections": await self._look()})

    async def _note_missing(self, request: Request) -> Response:
        self._lacks((await _body(request, MissingCollections)).ids)
        return Response(status_code=204)

    async def _on(
        self, request: Request, asked: _Asked, reach: Sequence[str] | None, work: Callable[[Root, AskAgain], T]
    ) -> T:
        """Do something to a collection's root, in a thread. ``work`` gets the root, and what it calls right before it
        changes or shows anything: after waiting for a turn or a disk it may be allowed no more, or wanted by nobody.

        ``reach`` names the folders in which symlinks may end; None is the whole collection. Raises `TowpathError`.
        """
        narrow = None if reach is None else Reach(tuple(parse_path_untrusted(folder) for folder in reach))
        left = False

        def ask_again() -> None:
            if left:
                raise ProtocolError("The request was broken off.")
            self._check_again(asked)

        def in_thread() -> T | TowpathError:
            try:
                with self._collections.using(asked.config) as whole:
                    if narrow is None:
                        return work(whole, ask_again)
                    with whole.narrowed(narrow) as root:
                        return work(root, ask_again)
            except OSError as error:
                return fault(error, "", asked.path)
            except TowpathError as error:
                return error

        limiter = self._limiters.setdefault(asked.config.id, trio.CapacityLimiter(CALLS_AT_ONCE))
        # What the relay wants no more: nothing else would tell before the time for it has run out.
        done: T | TowpathError = ProtocolError("The request was broken off.")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(until_disconnected, request.receive, nursery.cancel_scope)
                done = await trio.to_thread.run_sync(in_thread, limiter=limiter, abandon_on_cancel=True)
                nursery.cancel_scope.cancel()
        finally:
            # A thread that waits for a disk cannot be stopped; it does nothing more once it goes on.
            left = True
        if isinstance(done, TowpathError):
            raise done
        return done

    def _allowed(self, request: Request, access: Access, *texts: str) -> _Asked:
        """Paths of the relay, parsed and decided about. Raises `TowpathError`."""
        config = self._policy.collection(request.path_params["collection"])
        home = parse_path_untrusted(config.home)
        paths = tuple(parse_path_untrusted(text, home) for text in texts)
        for path in paths:
            config = self._policy.check(config.id, path, access)
        return _Asked(config, access, paths)

    def _check_again(self, asked: _Asked) -> None:
        """Whether what was allowed still is. May be called from any thread. Raises `TowpathError`."""
        for path in asked.paths:
            now = self._policy.check(asked.config.id, path, asked.access)
            if (now.root, now.hidden) != (asked.config.root, asked.config.hidden):
                raise RetryLater("The owner has changed this collection; ask again.", code="COLLECTION_CHANGED")

    async def _ls(self, request: Request) -> Response:
        query = request.query_params
        asked = self._allowed(request, "r", query.get("path") or "~")
        wanted = parse_query_untrusted(
            filters=query.getlist("filter"),
            orderby=query.get("orderby", ""),
            limit=_number(request, "limit", MAX_ENTRIES),
            offset=_number(request, "offset", 0),
            show_hidden=query.get("show_hidden", "1") != "0",
        )

        def work(root: Root, ask_again: AskAgain) -> Listing:
            ask_again()
            listing = list_directory(root, asked.path, wanted, self._accounts)
            ask_again()
            return listing

        return _answer(await self._on(request, asked, query.getlist("reach") or None, work))

    async def _stat(self, request: Request) -> Response:
        query = request.query_params
        asked = self._allowed(request, "r", query.get("path") or "~")

        def work(root: Root, ask_again: AskAgain) -> Entry:
            entry = stat_entry(root, asked.path, self._accounts)
            ask_again()
            return entry

        return _answer(await self._on(request, asked, query.getlist("reach") or None, work))

    async def _mkdir(self, request: Request) -> Response:
        body = await _body(request, _PathBody)
        asked = self._allowed(request, "rw", body.path)
        if not asked.path:
            raise ItemFailed("The root of the collection exists already.", code="EXISTS")

        def work(root: Root, ask_again: AskAgain) -> None:
            parent, name = _open_parent(root, asked.path)
            with parent:
                ask_again()
                parent.mkdir(name)
                parent.sync()

        await self._on(request, asked, body.reach, work)
        return Response(status_code=201)

    async def _rename(self, request: Request) -> Response:
        body = await _body(request, _RenameBody)
        asked = self._allowed(request, "rw", body.old_path, body.new_path)
        old, new = asked.paths
        if old and len(new) > len(old) and new[: len(old)] == old:
            raise ItemFailed(f"{format_path(old)} cannot be moved into itself.", code="ILLEGAL_NAME", who="you")

        def work(root: Root, ask_again: AskAgain) -> None:
            source, old_name = root.open_parent(old)
            with source:
                # What is missing or in the way is named by the path it concerns.
                source.lstat(old_name)
                try:
                    target, new_name = _open_parent(root, new)
                    with target:
                        ask_again()
                        source.rename_no_replace(old_name, new_name, target)
                        target.sync()
                except HoldsOwn:
                    raise
                except OSError as error:
                    raise fault(error, "", new) from error
                source.sync()

        await self._on(request, asked, body.reach, work)
        return _answer({})

    async def _symlink(self, request: Request) -> Response:
        body = await _body(request, _SymlinkBody)
        asked = self._allowed(request, "rw", body.path)
        target = unescape(body.symlink_target)
        if not target or len(target) > MAX_LINK_TARGET or b"\0" in target:
            raise ProtocolError("The target of the symlink is no path.", code="ILLEGAL_NAME")

        def work(root: Root, ask_again: AskAgain) -> None:
            parent, name = _open_parent(root, asked.path)
            with parent:
                ask_again()
                parent.symlink(name, target)
                parent.sync()

        await self._on(request, asked, body.reach, work)
        return Response(status_code=201)

    # --- tasks -----------------------------------------------------------------------------------------

    async def _put_task(self, request: Request) -> Response:
        order = await _body(request, TaskOrder, MAX_DOCUMENT)
        if order.task_id != request.path_params["task"]:
            raise ProtocolError("The order is for another task than the address says.")
        if order.desired == "run":
            self._policy.check(order.destination.collection_id, (), "rw")
        observed = await self._tasks.put_task(order)
        return _answer(observed, 202)

    async def _list_tasks(self, _request: Request) -> Response:
        return _answer(TaskList(tasks=self._tasks.tasks()))

    async def _get_order(self, request: Request) -> Response:
        return _answer(self._tasks.order(request.path_params["task"]))

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

    async def _put_offer(self, request: Request) -> Response:
        offer = await _body(request, PathOffer, MAX_PATH_BODY)
        if offer.session_id != request.path_params["session"]:
            raise ProtocolError("The offer is for another session than the address says.")
        return _answer(await self._tasks.take_offer(offer))

    async def _put_source_go(self, request: Request) -> Response:
        go = await _body(request, PathGo, MAX_PATH_BODY)
        if go.session_id != request.path_params["session"]:
            raise ProtocolError("The go is for another session than the address says.")
        self._tasks.take_source_go(go)
        return Response(status_code=204)

    async def _put_go(self, request: Request) -> Response:
        go = await _body(request, PathGo, MAX_PATH_BODY)
        self._tasks.take_go(request.path_params["task"], go)
        return Response(status_code=204)

    async def _put_candidates(self, request: Request) -> Response:
        answer = await _body(request, PathAnswer, MAX_PATH_BODY)
        self._tasks.take_candidates(request.path_params["task"], answer)
        return Response(status_code=204)

    async def _withdraw(self, request: Request) -> Response:
        await self._tasks.withdraw_session(request.path_params["session"])
        return Response(status_code=204)


def _open_parent(root: Root, path: CollectionPath) -> tuple[Directory, bytes]:
    """The folder in which something is to be made, and its name there. Where that folder is not there it is what is
    missing, and not the thing that is to be made. Raises OSError, `TowpathError`."""
    try:
        return root.open_parent(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise fault(error, "", path[:-1]) from error


def _check_ids(request: Request) -> None:
    """Ids become names of files and keys of tables: nothing but a UUID may pass. Raises `ProtocolError`."""
    for name, value in request.path_params.items():
        if not is_uuid(value):
            raise ProtocolError(f"The {name} in the address is no id.")


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
        async with contextlib.aclosing(request.stream()) as chunks:
            async for chunk in chunks:
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
