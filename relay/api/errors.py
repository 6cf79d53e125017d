"""Errors of the HTTP APIs, each in the shape that clients of that Globus service understand.

Routes raise `ApiError`; everything else that can go wrong (a malformed document, an unknown route, an error of our
own) is turned into one here, so that programs never get anything but JSON in the right shape.
"""

from __future__ import annotations

import http
import re
import secrets
import string
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from relay.refusal import ApiError, unavailable
from relay.store.database import StoreBroken, StoreBusy

Service = Literal["auth", "transfer", "groups", "search", "timers", "flows", "compute", "tunnels", "towpath"]

# Path spaces of the services on the one origin, most specific first.
_SPACES: tuple[tuple[str, Service], ...] = (
    ("/v2/oauth2", "auth"),
    ("/v2/api", "auth"),
    ("/v2/web", "auth"),
    ("/.well-known", "auth"),
    ("/jwk.json", "auth"),
    ("/v2/groups", "groups"),
    ("/v2/preferences", "groups"),
    ("/v2/subscription_info", "groups"),
    ("/v2/timer", "timers"),
    ("/jobs", "timers"),
    ("/flows", "flows"),
    ("/runs", "flows"),
    ("/registered_apis", "flows"),
    ("/web_inputs", "flows"),
    ("/batch/runs", "flows"),
    ("/updates", "towpath"),
    ("/install.sh", "towpath"),
    ("/v1", "search"),
    ("/beta/index", "search"),
    ("/v2/endpoints", "compute"),
    ("/v2/functions", "compute"),
    ("/v2/tasks", "compute"),
    ("/v2/submit", "compute"),
    ("/v2/version", "compute"),
    ("/v2/batch_status", "compute"),
    ("/v2/taskgroup", "compute"),
    ("/v3", "compute"),
    ("/v2/tunnels", "tunnels"),
    ("/v2/stream_access_points", "tunnels"),
    ("/towpath", "towpath"),
    # Everything else (`/v0.10`, unknown paths) speaks as Transfer does.
)
_BAD_REQUEST: Mapping[Service, str] = {"auth": "INVALID_REQUEST", "search": "BadRequest.ValidationError"}
_REQUEST_ID_LETTERS = string.ascii_letters + string.digits
_NEVER_SHOWN = re.compile(r"[\x00-\x1f\x7f]")


def service_of(path: str) -> Service:
    """The Globus service that a request path belongs to."""
    for space, service in _SPACES:
        if path == space or path.startswith(space + "/"):
            return service
    return "transfer"


def new_request_id() -> str:
    """Nine letters and digits, as Globus writes them."""
    return "".join(secrets.choice(_REQUEST_ID_LETTERS) for _ in range(9))


def request_id_of(request: Request) -> str:
    """The id of this request, as logs and answers show it."""
    state = request.scope.setdefault("state", {})
    return cast("str", state.setdefault("request_id", new_request_id()))


def render(error: ApiError, path: str, request_id: str) -> JSONResponse:
    """The answer for an error, in the shape of the service that ``path`` belongs to."""
    service = service_of(path)
    document = _SHAPES[service](error, _NEVER_SHOWN.sub("?", path), request_id)
    return JSONResponse({**document, **error.extra}, status_code=error.status, headers=error.headers)


def _transfer_shape(error: ApiError, path: str, request_id: str) -> dict[str, Any]:
    return {"code": error.code, "message": error.message, "request_id": request_id, "resource": path}


def _auth_shape(error: ApiError, path: str, request_id: str) -> dict[str, Any]:
    detail = {
        "status": str(error.status),
        # Clients of Globus show this as the id of the request.
        "id": request_id,
        "code": _upper_word(error.code),
        # The Globus CLI tells people to log in again when it reads exactly this word here.
        "detail": error.code if error.code == "invalid_grant" else error.message,
        "title": http.HTTPStatus(error.status).phrase,
        "meta": {"resource": path},
    }
    return {"error": _upper_word(error.code).lower(), "error_description": error.message, "errors": [detail]}


def _groups_shape(error: ApiError, _path: str, _request_id: str) -> dict[str, Any]:
    return {"code": _upper_word(error.code), "detail": error.message}


def _search_shape(error: ApiError, _path: str, request_id: str) -> dict[str, Any]:
    return {
        "@datatype": "GError",
        "@version": "2017-09-01",
        "code": error.code,
        "message": error.message,
        "request_id": request_id,
        "status": error.status,
        "error_data": None,
    }


def _timers_shape(error: ApiError, _path: str, _request_id: str) -> dict[str, Any]:
    return {"error": {"code": _upper_word(error.code), "detail": error.message, "status": error.status}}


def _flows_shape(error: ApiError, _path: str, request_id: str) -> dict[str, Any]:
    return {"error": {"code": _upper_word(error.code), "detail": error.message}, "debug_id": request_id}


def _compute_shape(error: ApiError, _path: str, _request_id: str) -> dict[str, Any]:
    return {
        "status": "Failed",
        "code": error.status,
        "error_args": [],
        "http_status_code": error.status,
        "reason": error.message,
        # globus-sdk looks for its sentence here, and else shows none.
        "message": error.message,
    }


_SHAPES: Mapping[Service, Callable[[ApiError, str, str], dict[str, Any]]] = {
    "auth": _auth_shape,
    "transfer": _transfer_shape,
    "groups": _groups_shape,
    "search": _search_shape,
    "timers": _timers_shape,
    "flows": _flows_shape,
    "compute": _compute_shape,
    "tunnels": _transfer_shape,
    "towpath": _transfer_shape,
}


def _upper_word(code: str) -> str:
    """`NotFound` and `ClientError.NotFound` as NOT_FOUND."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", code.rpartition(".")[2]).upper()


def _from_http(error: HTTPException, path: str, offered: frozenset[Service]) -> ApiError:
    service = service_of(path)
    if error.status_code == 404 and service not in ("transfer", *offered):
        # 501 and not 503: clients try the latter again and again.
        return ApiError(501, "NotImplemented", f"This relay does not offer the {service.capitalize()} service.")
    bad_request = _BAD_REQUEST.get(service, "ClientError.BadRequest")
    code = {400: bad_request, 404: "NotFound", 405: "MethodNotAllowed", 413: "RequestTooLarge"}.get(error.status_code)
    message = {
        404: "There is nothing under this path.",
        405: "This path does not take this method.",
    }.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, code or "Error", message, headers=error.headers)


def _from_validation(error: RequestValidationError, service: Service) -> ApiError:
    problems = []
    for problem in error.errors()[:5]:
        place = ".".join(str(part) for part in problem["loc"] if part not in ("body", "query", "path"))
        problems.append(f"{place}: {problem['msg']}" if place else problem["msg"])
    message = "The request is malformed: " + "; ".join(problems) + "."
    if service in ("groups", "timers"):
        # What went in is not repeated: it may hold secrets.
        detail = [{"loc": problem["loc"], "msg": problem["msg"], "type": problem["type"]} for problem in error.errors()]
        return ApiError(422, "UnprocessableEntity", message, extra={"detail": detail})
    return ApiError(400, _BAD_REQUEST.get(service, "ClientError.BadRequest"), message)


def install(app: FastAPI, offered: frozenset[Service], for_people: Callable[[Request], Response]) -> None:
    """Make the application answer every error in its service's shape. ``offered`` are the services it has routes of;
    ``for_people`` is the page for browsers that ask for what is not there."""

    async def on_api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return render(error, request.scope["path"], request_id_of(request))

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        # No client of an API asks for HTML by name; every browser does where somebody has typed an address.
        if error.status_code == 404 and "text/html" in request.headers.get("accept", ""):
            return for_people(request)
        path = request.scope["path"]
        return render(_from_http(error, path, offered), path, request_id_of(request))

    async def on_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        path = request.scope["path"]
        return render(_from_validation(error, service_of(path)), path, request_id_of(request))

    async def on_store(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, StoreBusy | StoreBroken)
        return render(unavailable(error.sentence), request.scope["path"], request_id_of(request))

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(StoreBusy, on_store)
    app.add_exception_handler(StoreBroken, on_store)
