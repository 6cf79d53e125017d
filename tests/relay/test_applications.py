"""The developers' API: the documents are Globus's own, secrets are shown once, and projects of others do not exist."""

from __future__ import annotations

import json
import re
from typing import Any

import globus_sdk.testing
import httpx
import pytest
from sqlalchemy import Connection, select

from relay.applications import operator, projects
from relay.auth.clients import SecretChecker
from relay.auth.scopes import AUTH_SERVER, MANAGE_PROJECTS
from relay.auth.session_rules import rules_of
from relay.auth.step_up import Unsatisfiable
from relay.store.metadata import metadata
from relay.transfer.collections import mark_deleted
from relay.transfer.enrolment import create_mapped_collection


class Developer:
    """Somebody who manages projects."""

    def __init__(self, identity_id: str, token: str, http: httpx.AsyncClient) -> None:
        self.id = identity_id
        self.headers = {"Authorization": f"Bearer {token}"}
        self._http = http

    async def ask(self, method: str, path: str, document: Any = None) -> httpx.Response:
        return await self._http.request(method, "/v2/api" + path, headers=self.headers, json=document)

    async def done(self, method: str, path: str, document: Any = None, *, status: int = 200) -> dict[str, Any]:
        answer = await self.ask(method, path, document)
        assert answer.status_code == status, answer.text
        return dict(answer.json())

    async def refused(self, method: str, path: str, status: int, document: Any = None) -> str:
        answer = await self.ask(method, path, document)
        assert answer.status_code == status, answer.text
        return str(answer.json()["errors"][0]["detail"])

    async def project(self, **more: Any) -> str:
        body = {"project": {"display_name": "Portal", "contact_email": "dev@example.org", **more}}
        return str((await self.done("POST", "/projects", body, status=201))["project"]["id"])

    async def client(self, project: str, **more: Any) -> dict[str, Any]:
        body = {"client": {"name": "Hub", "project": project, "client_type": "confidential_client", **more}}
        return dict((await self.done("POST", "/clients", body, status=201))["client"])


async def developer(world: Any, name: str) -> Developer:
    identity = await world.user(f"{name}@example.org")
    client_id, _ = await world.client(f"{name}'s tool")
    issued = await world.tokens(identity.id, client_id, {AUTH_SERVER: [MANAGE_PROJECTS]})
    return Developer(identity.id, issued[AUTH_SERVER].access_token, world.http)


def words_of(sentence: str) -> set[str]:
    return set(re.findall(r"\w+", sentence))


def fields_of(document: dict[str, Any]) -> set[str]:
    """The names of its fields, also of those within."""
    return set(re.findall(r'"(\w+)":', json.dumps(document)))


def same_shape(ours: Any, theirs: Any, where: str = "") -> None:
    """Our document has at least their keys, each of the same type or null."""
    if isinstance(theirs, dict):
        assert isinstance(ours, dict), where
        assert set(theirs) <= set(ours), f"{where}: {set(theirs) - set(ours)} missing"
        for key in theirs:
            same_shape(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list):
        assert ours is None or isinstance(ours, list), where
        if ours and theirs:
            same_shape(ours[0], theirs[0], where + "[]")
    elif ours is not None and theirs is not None:
        assert type(ours) is type(theirs), where


def example(method: str) -> Any:
    """The SDK's own example of an answer."""
    for case in globus_sdk.testing.get_response_set(f"auth.{method}"):
        return case.json
    raise AssertionError("the SDK has no example")


async def test_our_documents_have_the_shape_of_the_sdks_examples(world: Any) -> None:
    dev = await developer(world, "dev")
    made = await dev.done(
        "POST", "/projects", {"project": {"display_name": "P", "contact_email": "p@example.org"}}, status=201
    )
    same_shape(made, example("create_project"))
    project = made["project"]["id"]
    client = await dev.client(project)
    same_shape({"client": client}, example("create_client"))
    same_shape(await dev.done("GET", f"/clients/{client['id']}"), example("get_client"))
    credential = await dev.done(
        "POST", f"/clients/{client['id']}/credentials", {"credential": {"name": "one"}}, status=201
    )
    same_shape(credential, example("create_client_credential"))
    same_shape(await dev.done("GET", f"/clients/{client['id']}/credentials"), example("get_client_credentials"))
    policy = {
        "project_id": project,
        "display_name": "Own people",
        "description": "Only they",
        "high_assurance": True,
        "authentication_assurance_timeout": 60,
        "domain_constraints_include": ["example.org"],
    }
    same_shape(await dev.done("POST", "/policies", {"policy": policy}, status=201), example("create_policy"))
    same_shape(await dev.done("GET", "/policies"), example("get_policies"))
    same_shape(await dev.done("GET", "/projects"), example("get_projects"))


async def test_a_secret_is_shown_once_stored_as_a_digest_and_works(world: Any) -> None:
    dev = await developer(world, "dev")
    client = await dev.client(await dev.project())
    where = f"/clients/{client['id']}/credentials"
    made = (await dev.done("POST", where, {"credential": {"name": "first"}}, status=201))["credential"]
    assert [row["secret"] for row in (await dev.done("GET", where))["credentials"]] == [None]
    checker = SecretChecker(world.store)
    assert (await checker.check(client["id"], made["secret"])) is not None

    def everything(connection: Connection) -> str:
        return json.dumps([[str(row) for row in connection.execute(select(t))] for t in metadata.sorted_tables])

    assert made["secret"] not in await world.store.read(everything)
    await dev.done("DELETE", f"{where}/{made['id']}")
    assert (await checker.check(client["id"], made["secret"])) is None
    public = await dev.client((await dev.project()), client_type="public_installed_client")
    await dev.refused("POST", f"/clients/{public['id']}/credentials", 400, {"credential": {"name": "x"}})


async def test_what_belongs_to_others_does_not_exist(world: Any) -> None:
    dev, eve = await developer(world, "dev"), await developer(world, "eve")
    project = await dev.project()
    client = await dev.client(project)
    secret = await dev.done("POST", f"/clients/{client['id']}/credentials", {"credential": {"name": "s"}}, status=201)
    body = {"project_id": project, "display_name": "p", "description": "d"}
    policy = (await dev.done("POST", "/policies", {"policy": body}, status=201))["policy"]["id"]
    assert (await eve.done("GET", "/projects"))["projects"] == []
    assert (await eve.done("GET", "/clients"))["clients"] == []
    assert (await eve.done("GET", "/policies"))["policies"] == []
    credentials = f"/clients/{client['id']}/credentials"
    for method, path, document in (
        ("GET", f"/projects/{project}", None),
        ("PUT", f"/projects/{project}", {"project": {"admin_ids": [eve.id]}}),
        ("DELETE", f"/projects/{project}", None),
        ("POST", "/clients", {"client": {"name": "x", "project": project, "public_client": False}}),
        ("GET", f"/clients/{client['id']}", None),
        ("PUT", f"/clients/{client['id']}", {"client": {"redirect_uris": ["https://evil.example.org/"]}}),
        ("DELETE", f"/clients/{client['id']}", None),
        ("GET", credentials, None),
        ("POST", credentials, {"credential": {"name": "mine"}}),
        ("DELETE", f"{credentials}/{secret['credential']['id']}", None),
        ("POST", "/policies", {"policy": body}),
        ("GET", f"/policies/{policy}", None),
        ("PUT", f"/policies/{policy}", {"policy": {"description": "x"}}),
        ("DELETE", f"/policies/{policy}", None),
    ):
        sentence = await eve.refused(method, path, 404, document)
        assert "Portal" not in sentence
    assert (await dev.done("GET", f"/clients/{client['id']}"))["client"] == client
    # A client of one's own cannot be moved into another's project.
    mine = await eve.client(await eve.project())
    await eve.refused("PUT", f"/clients/{mine['id']}", 404, {"client": {"project": project}})


async def test_without_the_scope_or_a_token_nothing_is_answered(world: Any) -> None:
    dev = await developer(world, "dev")
    client_id, secret = await world.client()
    plain = await world.bearer(dev.id, client_id, AUTH_SERVER)
    for method, path in (("GET", "/projects"), ("GET", "/clients"), ("POST", "/projects"), ("GET", "/policies")):
        assert (await world.http.request(method, "/v2/api" + path, json={"project": {}})).status_code == 401
        answer = await world.http.request(method, "/v2/api" + path, json={"project": {}}, headers=plain)
        assert (answer.status_code, answer.json()["errors"][0]["code"]) == (403, "FORBIDDEN")
    answer = await world.http.post("/v2/api/clients", json={"client": {"name": "x"}}, auth=(client_id, secret))
    assert answer.status_code == 403


@pytest.mark.parametrize(
    "wrong",
    [
        {"redirect_uris": ["http://example.org/back"]},
        {"redirect_uris": ["https://example.org/back#x"]},
        {"redirect_uris": ["https://*.example.org/"]},
        {"redirect_uris": ["https://user@example.org/"]},
        {"redirect_uris": ["javascript:alert(1)"]},
        {"redirect_uris": "https://example.org/"},
        {"client_type": "super_client"},
        {"required_idp": "00000000-0000-0000-0000-000000000000"},
        {"name": " "},
        {"name": "a\u202eb"},
        {"links": {"privacy_policy": "javascript:x"}},
        {"public_client": True},
    ],
)
async def test_what_cannot_be_registered(world: Any, wrong: dict[str, Any]) -> None:
    dev = await developer(world, "dev")
    right = {"name": "x", "project": await dev.project(), "client_type": "confidential_client"}
    said = await dev.refused("POST", "/clients", 400, {"client": right | wrong})
    assert words_of(said) & fields_of(wrong), said
    await dev.done("POST", "/clients", {"client": right}, status=201)


async def test_projects_keep_an_administrator_and_what_they_hold(world: Any) -> None:
    dev, eve = await developer(world, "dev"), await developer(world, "eve")
    project = await dev.project()
    await dev.refused("PUT", f"/projects/{project}", 400, {"project": {"admin_ids": []}})
    await dev.done("PUT", f"/projects/{project}", {"project": {"admin_ids": [dev.id, eve.id]}})
    client = await eve.client(project, redirect_uris=["http://localhost:9000/back", "https://hub.example.org/cb"])
    await dev.refused("DELETE", f"/projects/{project}", 409)
    await dev.done("DELETE", f"/clients/{client['id']}")
    await dev.done("DELETE", f"/projects/{project}")
    assert (await eve.done("GET", "/projects"))["projects"] == []


async def test_projects_count_for_who_made_them(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projects, "MAX_PROJECTS", 3)
    eve, ada = await developer(world, "eve"), await developer(world, "ada")
    given = [await eve.project(admin_ids=[ada.id]) for _ in range(2)]
    moved = await eve.project()
    await eve.done("PUT", f"/projects/{moved}", {"project": {"admin_ids": [ada.id]}})
    for _ in range(3):
        await ada.project()
    body = {"project": {"display_name": "Portal", "contact_email": "dev@example.org"}}
    assert "3 projects" in await ada.refused("POST", "/projects", 409, body)
    # What was given away counts until it is gone.
    assert "3 projects" in await eve.refused("POST", "/projects", 409, body)
    await ada.done("DELETE", f"/projects/{given[0]}")
    await eve.project()
    await ada.refused("POST", "/projects", 409, body)


async def test_policies_are_what_sign_in_demands(world: Any) -> None:
    dev = await developer(world, "dev")
    body = {
        "project_id": await dev.project(),
        "display_name": "p",
        "description": "d",
        "high_assurance": True,
        "authentication_assurance_timeout": 600,
        "required_mfa": True,
        "domain_constraints_include": ["Example.org"],
    }
    policy = (await dev.done("POST", "/policies", {"policy": body}, status=201))["policy"]
    (rule,) = await world.store.read(lambda connection: rules_of(connection, [policy["id"]]))
    assert (rule.max_age, rule.include, rule.exclude, rule.multi_factor) == (600.0, ("example.org",), (), True)
    await dev.refused("PUT", f"/policies/{policy['id']}", 400, {"policy": {"authentication_assurance_timeout": None}})
    await dev.done("DELETE", f"/policies/{policy['id']}")
    with pytest.raises(Unsatisfiable):
        await world.store.read(lambda connection: rules_of(connection, [policy["id"]]))


async def test_a_client_that_registered_others_can_be_deleted_and_those_stay(world: Any) -> None:
    ada = await developer(world, "ada")
    service = (await ada.client(await ada.project(), client_type="client_identity"))["id"]
    issued = await world.tokens(service, service, {AUTH_SERVER: [MANAGE_PROJECTS]})
    itself = Developer(service, issued[AUTH_SERVER].access_token, world.http)
    shared = await itself.project(admin_ids=[service, ada.id])
    child = (await itself.client(shared, name="Child"))["id"]
    await ada.done("DELETE", f"/clients/{service}")
    assert (await itself.ask("GET", "/projects")).status_code == 401
    assert (await ada.done("GET", f"/clients/{child}"))["client"]["name"] == "Child"
    await ada.done("DELETE", f"/clients/{child}")


async def test_a_project_of_a_deleted_client_goes_to_whoever_deleted_it(world: Any) -> None:
    """Nobody could reach what it holds otherwise."""
    ada, eve = await developer(world, "ada"), await developer(world, "eve")
    service = (await ada.client(await ada.project(), client_type="client_identity"))["id"]
    issued = await world.tokens(service, service, {AUTH_SERVER: [MANAGE_PROJECTS]})
    itself = Developer(service, issued[AUTH_SERVER].access_token, world.http)
    alone, shared = await itself.project(), await itself.project(admin_ids=[service, eve.id])
    portal = (await itself.client(alone, name="Portal"))["id"]
    await itself.refused("DELETE", f"/clients/{service}", 404)
    await ada.done("DELETE", f"/clients/{service}")
    assert (await ada.done("GET", f"/projects/{alone}"))["project"]["admin_ids"] == [ada.id]
    assert (await eve.done("GET", f"/projects/{shared}"))["project"]["admin_ids"] == [eve.id]
    await ada.refused("GET", f"/projects/{shared}", 404)
    await ada.done("DELETE", f"/clients/{portal}")
    await ada.done("DELETE", f"/projects/{alone}")


async def test_a_client_is_not_deleted_before_the_collections_that_it_owns(world: Any) -> None:
    """They would be nobody's, and the agents behind them served whoever had a role for ever."""
    ada = await developer(world, "ada")
    service = (await ada.client(await ada.project(), client_type="client_identity"))["id"]
    made, _ = await create_mapped_collection(
        world.store, world.settings, service, {"display_name": "Beamline"}, now=1e9
    )
    assert "“Beamline”" in (await ada.refused("DELETE", f"/clients/{service}", 409))
    await world.store.write(lambda connection: mark_deleted(connection, made, 1e9))
    await ada.done("DELETE", f"/clients/{service}")


async def test_a_client_that_administers_a_project_alone_does_not_delete_itself(world: Any) -> None:
    ada = await developer(world, "ada")
    home = await ada.project()
    service = (await ada.client(home, client_type="client_identity"))["id"]
    issued = await world.tokens(service, service, {AUTH_SERVER: [MANAGE_PROJECTS]})
    itself = Developer(service, issued[AUTH_SERVER].access_token, world.http)
    await ada.done("PUT", f"/projects/{home}", {"project": {"admin_ids": [service]}})
    await itself.refused("DELETE", f"/clients/{service}", 409)
    await itself.done("PUT", f"/projects/{home}", {"project": {"admin_ids": [service, ada.id]}})
    await itself.done("DELETE", f"/clients/{service}")
    assert (await ada.done("GET", f"/projects/{home}"))["project"]["admin_ids"] == [ada.id]


async def test_the_operator_registers_an_application_with_one_command(world: Any) -> None:
    dev = await developer(world, "dev")
    add = operator.adding_application
    hub = await add(world.settings, "Hub", dev.id, "web", ["https://hub.example.org/cb"], None)(world.store)
    tool = await add(world.settings, "Tool", dev.id, "native", [], "Hub")(world.store)
    assert tool["client_secret"] is None
    assert tool["project_id"] == hub["project_id"]
    assert (await SecretChecker(world.store).check(hub["client_id"], hub["client_secret"])) is not None
    rows = (await dev.done("GET", "/clients"))["clients"]
    assert [(row["name"], row["public_client"]) for row in rows] == [("Hub", False), ("Tool", True)]
    with pytest.raises(operator.NotRegistered):
        await add(world.settings, "Bad", dev.id, "web", ["http://example.org/"], None)(world.store)
