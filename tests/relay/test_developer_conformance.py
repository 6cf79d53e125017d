"""Every example of the SDK's for the developers' API: sent by the SDK's own code, answered in the shape it expects."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import globus_sdk
import pytest
from globus_sdk.transport import RequestsTransport

from relay.auth.known_scopes import id_of
from relay.auth.providers import sign_in_provider_ids
from relay.auth.scopes import TRANSFER_ALL
from tests.relay.test_applications import Developer, developer
from tests.relay.test_transfer_conformance import compare

CHANGING = (
    "create_client",
    "create_child_client",
    "create_scope",
    "create_policy",
    "update_client",
    "update_scope",
    "update_policy",
)


def cases(method: str) -> list[str]:
    responses = import_module(f"globus_sdk.testing.data.auth.{method}").RESPONSES
    return list(responses.cases())


def example(method: str, case: str) -> Any:
    return import_module(f"globus_sdk.testing.data.auth.{method}").RESPONSES.lookup(case)


class Sent(Exception):
    """What the SDK would have sent."""


class SdkClient(globus_sdk.ConfidentialAppAuthClient):
    """The SDK's own client, as far as the request: its methods end with `Sent`."""

    def request(self, method: str, path: str, **more: Any) -> Any:
        request = RequestsTransport().encoders["json"].encode(method, path, None, more.get("data"), {})
        raise Sent(method, path, request.json)


class SdkService(globus_sdk.AuthClient):
    """The same for calls with a token."""

    request = SdkClient.request


@dataclass
class Place:
    """What a case needs: somebody with a project, a client with a secret, a scope and a policy."""

    dev: Developer
    project: str
    client: dict[str, Any]
    credential: tuple[str, str]
    scope: str
    policy: str
    world: Any
    suffixes: list[str] = field(default_factory=list)

    def fit(self, method: str, args: dict[str, Any]) -> dict[str, Any]:
        """The case's arguments with ids of this relay in the place of Globus's."""
        provider = next(iter(sign_in_provider_ids(self.world.settings)))
        here = {
            "project": self.project,
            "project_id": self.project,
            "client_id": self.client["id"],
            "scope_id": self.scope,
            "policy_id": self.policy,
            "required_idp": provider,
            "preselect_idp": provider,
        }
        fitted = {key: here.get(key, value) for key, value in args.items()}
        if method == "create_client":
            fitted["project"] = self.project
        if method == "create_scope":
            # All examples have the same suffix.
            fitted["scope_suffix"] = f"s{len(self.suffixes)}"
            self.suffixes.append(fitted["scope_suffix"])
        if fitted.get("dependent_scopes"):
            other = {"scope": id_of(TRANSFER_ALL)}, {"scope": id_of("openid")}
            fitted["dependent_scopes"] = [
                {**spec, **instead} for spec, instead in zip(fitted["dependent_scopes"], other, strict=True)
            ]
        return fitted


async def place(world: Any) -> Place:
    dev = await developer(world, "dev")
    project = await dev.project()
    client = await dev.client(project, client_type="hybrid_confidential_client_resource_server")
    secret = await dev.done("POST", f"/clients/{client['id']}/credentials", {"credential": {"name": "s"}}, status=201)
    scope = {"name": "n", "description": "d", "scope_suffix": "first"}
    made = await dev.done("POST", f"/clients/{client['id']}/scopes", {"scope": scope}, status=201)
    policy = {"project_id": project, "display_name": "p", "description": "d"}
    kept = await dev.done("POST", "/policies", {"policy": policy}, status=201)
    credential = (client["id"], secret["credential"]["secret"])
    return Place(dev, project, client, credential, made["scope"]["id"], kept["policy"]["id"], world)


@pytest.mark.parametrize("method", CHANGING)
async def test_what_the_sdk_sends_is_answered_as_it_expects(world: Any, method: str) -> None:
    here = await place(world)
    for case in cases(method):
        await _try(here, method, case)


async def _try(here: Place, method: str, case: str) -> None:
    theirs = example(method, case)
    args = here.fit(method, dict(theirs.metadata["args"]))
    sdk = SdkClient("x", "y") if method == "create_child_client" else SdkService()
    with pytest.raises(Sent) as sent:
        getattr(sdk, method)(**args)
    verb, path, body = sent.value.args
    assert path.startswith("/v2/api")
    if method == "create_child_client":
        answer = await here.world.http.request(verb, path, json=body, auth=here.credential)
    else:
        answer = await here.dev.ask(verb, path.removeprefix("/v2/api"), body)
    assert answer.status_code == (201 if verb == "POST" else 200), answer.text
    ours = answer.json()
    compare(theirs.json, ours)
    (document,) = ours.values()
    for key, value in json.loads(json.dumps(next(iter(body.values())))).items():
        if key == "scope_suffix":
            assert document["scope_string"].endswith(f"/{value}"), case
        elif key == "dependent_scopes":
            assert sorted(document[key], key=str) == sorted(value, key=str), case
        else:
            assert document[key] == value, (case, key)


@pytest.mark.parametrize("method", ["get_scope", "get_scopes", "delete_scope", "get_client", "delete_client"])
async def test_what_is_shown_has_the_shape_of_the_examples(world: Any, method: str) -> None:
    here = await place(world)
    verb = "DELETE" if method.startswith("delete") else "GET"
    path = {
        "get_scope": f"/scopes/{here.scope}",
        "get_scopes": "/scopes",
        "delete_scope": f"/scopes/{here.scope}",
        "get_client": f"/clients/{here.client['id']}",
        "delete_client": f"/clients/{here.client['id']}",
    }[method]
    compare(example(method, "default").json, await here.dev.done(verb, path))


async def test_projects(world: Any) -> None:
    here = await place(world)
    for method in ("create_project", "update_project", "get_project"):
        compare(example(method, "default").json, await here.dev.done("GET", f"/projects/{here.project}"))
