"""Errors over HTTP: who may not come in, and the shape each service's clients can read."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import globus_sdk
import httpx
import pytest
import requests
from fastapi import APIRouter, Depends

from relay.api.bearer import Caller, transfer_caller
from relay.api.errors import service_of
from relay.app import create_app
from relay.auth.scopes import AUTH_SERVER, TRANSFER_ALL, TRANSFER_SERVER
from relay.refusal import ApiError

if TYPE_CHECKING:
    from tests.relay.relay_world import RelayWorld

probe = APIRouter()


@probe.get("/v0.10/probe")
async def who(caller: Caller = Depends(transfer_caller)) -> dict[str, Any]:
    return {"identity": caller.identity_id, "scopes": sorted(caller.scopes)}


@probe.get("/v0.10/crash")
async def crash() -> None:
    raise RuntimeError("secret detail")


@probe.get("/v0.10/refuse")
async def refuse() -> None:
    raise ApiError(403, "PermissionDenied", "No.", extra={"required_scopes": ["x"]}, headers={"X-Why": "because"})


@probe.post("/v0.10/count")
async def count(document: dict[str, int], number: int) -> dict[str, int]:
    return {"number": number, **document}


class _Body(httpx.AsyncByteStream):
    """A body of ``size`` bytes that is sent as far as it is read."""

    def __init__(self, size: int) -> None:
        self._left = size

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not self._left:
            raise StopAsyncIteration
        piece = bytes(min(self._left, 1 << 20))
        self._left -= len(piece)
        return piece


@pytest.fixture
async def http(world: RelayWorld) -> AsyncIterator[httpx.AsyncClient]:
    """The relay's application with routes of this test's own beside the real ones."""
    app = create_app(world.relay.services, [probe])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="https://relay") as client:
        yield client


async def test_a_caller_is_the_tokens_identity(world: RelayWorld, http: httpx.AsyncClient) -> None:
    client_id, _ = await world.client()
    person = await world.user("ada@example.org")
    answer = await http.get("/v0.10/probe", headers=await world.bearer(person.id, client_id))
    assert answer.json() == {"identity": person.id, "scopes": [TRANSFER_ALL]}
    assert answer.headers["x-transfer-api-version"] == "0.10"


@pytest.mark.parametrize(
    "flaw",
    ["none", "empty", "basic", "unknown", "expired", "revoked", "refresh", "wrong server", "wrong scope", "long"],
)
async def test_without_a_live_token_for_transfer_nobody_comes_in(
    world: RelayWorld, http: httpx.AsyncClient, flaw: str
) -> None:
    client_id, secret = await world.client()
    scopes = {AUTH_SERVER: ["openid"], TRANSFER_SERVER: [TRANSFER_ALL]}
    issued = await world.tokens(client_id, client_id, scopes, refresh=True)
    token: str | None = issued[TRANSFER_SERVER].access_token
    scheme = "Bearer"
    match flaw:
        case "none":
            token = None
        case "empty":
            token = ""
        case "basic":
            scheme = "Basic"
        case "unknown":
            token = "A" * 43
        case "expired":
            world.clock.now += issued[TRANSFER_SERVER].expires_in
        case "revoked":
            await world.http.post("/v2/oauth2/token/revoke", data={"token": token}, auth=(client_id, secret))
        case "refresh":
            token = issued[TRANSFER_SERVER].refresh_token
        case "wrong server":
            token = issued[AUTH_SERVER].access_token
        case "wrong scope":
            other = await world.tokens(client_id, client_id, {TRANSFER_SERVER: ["gcp_install"]})
            token = other[TRANSFER_SERVER].access_token
        case "long":
            token = "A" * 20_000
    headers = {} if token is None else {"Authorization": f"{scheme} {token}"}
    answer = await http.get("/v0.10/probe", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (401, "ClientError.AuthenticationFailed")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert set(answer.json()) == {"code", "message", "request_id", "resource"}


@pytest.mark.parametrize("flaw", ["none", "expired", "revoked", "wrong server"])
@pytest.mark.parametrize(
    "path",
    ["/v2/oauth2/userinfo", "/v2/api/identities?ids=x", "/v2/api/identity_providers", "/v2/api/identities/x/consents"],
)
async def test_without_a_live_token_for_auth_nobody_comes_in(world: RelayWorld, path: str, flaw: str) -> None:
    client_id, secret = await world.client()
    server = TRANSFER_SERVER if flaw == "wrong server" else AUTH_SERVER
    headers = await world.bearer(client_id, client_id, server)
    match flaw:
        case "none":
            headers = {}
        case "expired":
            world.clock.now += 172800
        case "revoked":
            token = headers["Authorization"].removeprefix("Bearer ")
            await world.http.post("/v2/oauth2/token/revoke", data={"token": token}, auth=(client_id, secret))
    answer = await world.http.get(path, headers=headers)
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (401, "UNAUTHORIZED")
    assert answer.json()["error"] == "unauthorized"


@pytest.mark.parametrize(
    ("path", "status", "shape"),
    [
        ("/v0.10/nothing", 404, {"code", "message", "request_id", "resource"}),
        ("/nothing", 404, {"code", "message", "request_id", "resource"}),
        ("/towpath/v1/nothing", 404, {"code", "message", "request_id", "resource"}),
        ("/v2/api/nothing", 404, {"error", "error_description", "errors"}),
        ("/v2/groups/my_groups", 501, {"code", "detail"}),
        ("/v1/index_list", 501, {"@datatype", "@version", "code", "message", "request_id", "status", "error_data"}),
        ("/jobs/", 501, {"error"}),
        ("/flows", 501, {"error", "debug_id"}),
        ("/batch/runs", 501, {"error", "debug_id"}),
        ("/v2/tunnels", 501, {"code", "message", "request_id", "resource"}),
        ("/v2/stream_access_points", 501, {"code", "message", "request_id", "resource"}),
        ("/v3/endpoints", 501, {"status", "code", "error_args", "http_status_code", "reason", "message"}),
    ],
)
async def test_unknown_routes_answer_in_their_services_shape(
    world: RelayWorld, path: str, status: int, shape: set[str]
) -> None:
    answer = await world.http.get(path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == shape


@pytest.mark.parametrize(
    ("path", "error", "name"),
    [
        ("/v0.10/endpoint_manager/monitored_endpoints", globus_sdk.TransferAPIError, None),
        ("/v2/tunnels", globus_sdk.TransferAPIError, "Tunnels"),
        ("/v2/groups/my_groups", globus_sdk.GroupsAPIError, "Groups"),
        ("/v2/timer", globus_sdk.TimersAPIError, "Timers"),
        ("/v1/index_list", globus_sdk.SearchAPIError, "Search"),
        ("/flows", globus_sdk.FlowsAPIError, "Flows"),
        ("/v2/version", globus_sdk.ComputeAPIError, "Compute"),
        ("/v3/endpoints", globus_sdk.ComputeAPIError, "Compute"),
    ],
)
async def test_the_sdk_shows_what_is_not_offered(
    world: RelayWorld, path: str, error: type[globus_sdk.GlobusAPIError], name: str | None
) -> None:
    client_id, _ = await world.client()
    headers = await world.bearer(client_id, client_id)
    answer = await world.http.get(path, headers=headers)
    received = requests.Response()
    received.status_code, received._content = 501, answer.content
    received.headers.update(answer.headers)
    received.request = requests.Request("GET", f"https://relay.example{path}").prepare()
    part = f"the {name} service" if name else "this part of the endpoint manager yet"
    assert answer.status_code == 501
    assert f"This relay does not offer {part}." in str(error(received))


def test_paths_belong_to_services() -> None:
    expected = {
        "/v2/tunnels": "tunnels",
        "/v1": "search",
        "/v1x": "transfer",
        "/v2/timer": "timers",
        "/v2/api/identities": "auth",
        "/.well-known/openid-configuration": "auth",
        "/v2/endpoints/x": "compute",
    }
    assert {path: service_of(path) for path in expected} == expected


async def test_slashes_in_front_count_as_one(world: RelayWorld) -> None:
    answer = await world.http.get("https://127.0.0.1:8443//.well-known/openid-configuration")
    assert answer.status_code == 200
    assert (await world.http.get("https://127.0.0.1:8443///jwk.json")).status_code == 200


async def test_a_wrong_method_is_named(world: RelayWorld) -> None:
    answer = await world.http.delete("/jwk.json")
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (405, "METHOD_NOT_ALLOWED")


async def test_malformed_requests_name_the_field_and_repeat_no_value(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v0.10/count?number=secret1", json={"size": "secret2"})
    assert (answer.status_code, answer.json()["code"]) == (400, "ClientError.BadRequest")
    assert "number" in answer.json()["message"]
    assert "size" in answer.json()["message"]
    assert "secret" not in answer.text
    for body in (b"{", b"[]", b"\xff"):
        answer = await http.post("/v0.10/count?number=1", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["code"]) == (400, "ClientError.BadRequest")


async def test_extra_fields_and_headers_reach_the_client(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v0.10/refuse")
    assert answer.json()["required_scopes"] == ["x"]
    assert (answer.status_code, answer.headers["x-why"]) == (403, "because")


async def test_our_own_mistakes_are_logged_and_not_shown(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        answer = await http.get("/v0.10/crash")
    assert (answer.status_code, answer.json()["code"]) == (500, "InternalError")
    assert "secret detail" not in answer.text
    assert "secret detail" in caplog.text
    assert answer.json()["request_id"] in caplog.text
    assert answer.headers["x-request-id"] == answer.json()["request_id"]


@pytest.mark.parametrize(
    ("path", "announced", "size", "code"),
    [
        ("/v0.10/count?number=1", True, 1, "RequestTooLarge"),
        ("/v0.10/count?number=1", False, 1, "RequestTooLarge"),
        ("/v2/oauth2/token/revoke", True, 1, "REQUEST_TOO_LARGE"),
        # Forms have a bound of their own, far below.
        ("/v2/oauth2/token/revoke", False, -1_000_000, "INVALID_REQUEST"),
    ],
)
async def test_large_bodies_are_refused(
    world: RelayWorld, http: httpx.AsyncClient, path: str, announced: bool, size: int, code: str
) -> None:
    size += world.settings.limits.request_body
    headers = {"Content-Length": str(size)} if announced else {"Transfer-Encoding": "chunked"}
    request = httpx.Request("POST", http.base_url.join(path), headers=headers, stream=_Body(size))
    answer = await http.send(request)
    document = answer.json()
    assert (answer.status_code, document.get("code") or document["errors"][0]["code"]) == (413, code)


async def test_scripts_of_web_pages_may_ask(world: RelayWorld) -> None:
    headers = {
        "Origin": "https://app.example.org",
        "Access-Control-Request-Method": "PUT",
        "Access-Control-Request-Headers": "Authorization, X-Globus-Client-Info",
    }
    answer = await world.http.options("/v0.10/endpoint/x", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "PUT" in answer.headers["access-control-allow-methods"]
    # Cookies never count here, so no page can act in a visitor's name.
    assert "access-control-allow-credentials" not in answer.headers
