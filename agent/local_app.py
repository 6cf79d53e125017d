"""What the owner may ask of the running agent: an ASGI application for the private local socket.

Everything here is the owner's alone: stopping, pausing, reading the configuration again. None of it exists on the
link, whose routes are in `agent.link_app`; the two applications share services, not routes.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import msgspec
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agent.config.keys import is_uuid
from agent.policy import Policy
from agent.services import Owner, TaskService
from agent.storage.unavailable import for_owner
from protocol.control import CollectionReport, encode
from protocol.errors import MAX_SENTENCE, AccessDenied, ItemFailed, ProtocolError, RetryLater, TowpathError

Handler = Callable[[Request], Awaitable[object]]

_logger = logging.getLogger("towpath.local")


class LocalApplication:
    """The handlers; `local_app` makes them an application."""

    def __init__(
        self, owner: Owner, tasks: TaskService, policy: Policy, reports: Callable[[], Sequence[CollectionReport]]
    ) -> None:
        self._owner = owner
        self._tasks = tasks
        self._policy = policy
        self._reports = reports

    async def status(self, _: Request) -> object:
        """Everything `towpath status` shows."""
        return await self._owner.status()

    async def stop(self, _: Request) -> object:
        """End the agent; the answer goes out first."""
        answer = _json(200, {"message": "The agent is stopping."})
        answer.background = BackgroundTask(self._stop)
        return answer

    async def _stop(self) -> None:
        self._owner.stop()

    async def collections(self, _: Request) -> object:
        """The collections and whether they can be used."""
        return {"collections": self._reports()}

    async def accept_root(self, request: Request) -> object:
        """Take the root of a collection as it is now."""
        collection = self._policy.collection(_id(request))
        await self._owner.accept_root(collection.id)
        return {"message": f"The root of {collection.name} is accepted as it is now."}

    async def tasks(self, _: Request) -> object:
        """All tasks that are not closed."""
        return {"tasks": self._tasks.tasks()}

    async def pause_task(self, request: Request) -> object:
        """Hold one task up."""
        await self._tasks.pause_task(_id(request))
        return {"message": "The task is paused."}

    async def resume_task(self, request: Request) -> object:
        """Let one task go on."""
        await self._tasks.resume_task(_id(request))
        return {"message": "The task goes on."}

    async def pause(self, _: Request) -> object:
        """Hold up everything this machine takes part in."""
        await self._owner.set_pause("all")
        return {"message": "All transfers of this machine are paused."}

    async def drain(self, _: Request) -> object:
        """Finish what has begun, and begin nothing new."""
        await self._owner.set_pause("new")
        return {"message": "What has begun is finished, and nothing new begins."}

    async def resume(self, _: Request) -> object:
        """Undo `pause` and `drain`."""
        await self._owner.set_pause("none")
        return {"message": "Transfers go on."}

    async def reconnect(self, _: Request) -> object:
        """Dial the relay at once."""
        self._owner.reconnect()
        return {"message": "Connecting to the relay."}

    async def peers(self, _: Request) -> object:
        """Look for a path to each agent that data came from lately."""
        return {"peers": await self._tasks.probe_peers()}

    async def reload(self, _: Request) -> object:
        """Read the configuration again."""
        return {"message": await self._owner.reload()}

    async def watch(self, _: Request) -> object:
        """The watch rules and what they did."""
        return {"rules": self._owner.watch_status()}

    async def watch_run(self, request: Request) -> object:
        """Run a watch rule at once."""
        return self._watch_now(request, retry=False)

    async def watch_retry(self, request: Request) -> object:
        """Run a watch rule at once, with what had failed for good."""
        return self._watch_now(request, retry=True)

    def _watch_now(self, request: Request, *, retry: bool) -> object:
        name = str(request.path_params["name"])[:64]
        if not self._owner.watch_now(name, retry=retry):
            raise ItemFailed("There is no such watch rule.", code="NOT_FOUND")
        return {"message": f"Rule {name} looks now."}

    def table(self) -> list[tuple[str, str, Handler]]:
        """Method, path and handler of every route."""
        return [
            ("GET", "/status", self.status),
            ("POST", "/stop", self.stop),
            ("GET", "/collections", self.collections),
            ("POST", "/collections/{id}/accept-root", self.accept_root),
            ("GET", "/tasks", self.tasks),
            ("POST", "/tasks/{id}/pause", self.pause_task),
            ("POST", "/tasks/{id}/resume", self.resume_task),
            ("POST", "/pause", self.pause),
            ("POST", "/drain", self.drain),
            ("POST", "/resume", self.resume),
            ("POST", "/relay/reconnect", self.reconnect),
            ("POST", "/peers", self.peers),
            ("POST", "/reload", self.reload),
            ("GET", "/watch", self.watch),
            ("POST", "/watch/{name}/run", self.watch_run),
            ("POST", "/watch/{name}/retry", self.watch_retry),
        ]


def local_app(application: LocalApplication) -> Starlette:
    """The ASGI application."""
    return Starlette(
        routes=[Route(path, _answering(handler), methods=[method]) for method, path, handler in application.table()],
        exception_handlers={HTTPException: _http_error},
    )


async def _http_error(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    sentence = f"The agent has no such route (status {status}); it may be of another version than this command."
    return _json(status, ItemFailed(sentence, code="NO_SUCH_ROUTE").to_document())


def _id(request: Request) -> str:
    text = str(request.path_params["id"])
    if not is_uuid(text):
        raise ProtocolError(f"{text[:64]!r} is no id: those are UUIDs.")
    return text


def _answering(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            document = await handler(request)
            return document if isinstance(document, Response) else _json(200, document)
        except TowpathError as error:
            # Who asks here may know where on this machine things are.
            return _json(_status_of(error), error.to_document() | {"sentence": for_owner(error)[:MAX_SENTENCE]})
        except Exception:
            _logger.exception("A request on the local socket failed: %s %s", request.method, request.url.path)
            document = RetryLater("The agent failed to answer; its log says more.", code="INTERNAL_ERROR").to_document()
            return _json(500, document)

    return answer


def _status_of(error: TowpathError) -> int:
    if isinstance(error, AccessDenied):
        return 403
    if isinstance(error, ItemFailed):
        return 404
    return 400 if isinstance(error, ProtocolError) else 409


def _json(status: int, document: object) -> Response:
    return Response(encode(msgspec.to_builtins(document)), status, media_type="application/json")
