"""Nobody reaches what is not theirs: every route is walked with no token, the wrong token and a stranger's token.

The routes come from the routers themselves. A route with a parameter or a name that this file does not know fails the
test, so that a new route cannot be forgotten; and the last tests take the checks away and see the walk notice it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from sqlalchemy import Connection, select

from protocol.control import Entry
from relay.access.decisions import Held
from relay.api.transfer_routers import ROUTERS
from relay.auth.scopes import AUTH_SERVER, TRANSFER_SERVER
from relay.store import transfer_tables as tables
from relay.transfer import task_rows
from tests.relay.fake_agents import FakeAgent
from tests.relay.transfer_world import Person, TransferWorld, delete_document, open_world, transfer_document, until

ROUTES = sorted(
    (method, route.path)
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute)
    for method in route.methods
)
# Routes without a path parameter: what a stranger may get is an answer about themselves, or an answer to their own
# document; the value is the answer's status.
WITHOUT_PARAMETER = {
    ("GET", "/v0.10/endpoint_search"): 200,
    ("POST", "/v0.10/endpoint"): 400,
    ("POST", "/v0.10/shared_endpoint"): 501,
    ("GET", "/v0.10/submission_id"): 200,
    ("POST", "/v0.10/transfer"): 404,
    ("POST", "/v0.10/delete"): 404,
    ("GET", "/v0.10/task_list"): 200,
    ("GET", "/v0.10/bookmark_list"): 200,
    ("POST", "/v0.10/bookmark"): 404,
    ("GET", "/v0.10/endpoint_manager/task_list"): 200,
    ("GET", "/v0.10/endpoint_manager/pause_rule_list"): 200,
}
REFUSALS = {"EndpointNotFound", "TaskNotFound", "BookmarkNotFound", "NotSupported"}


@dataclass
class Estate:
    """What belongs to Alice, and a stranger who knows every id of it."""

    relay: TransferWorld
    alice: Person
    mallory: Person
    agent: FakeAgent
    values: dict[str, str]
    secrets: list[str] = field(default_factory=list)

    def path(self, template: str) -> str:
        return template.replace("{rest:path}", "{rest}").format(**self.values)

    def body(self, path: str) -> dict[str, Any]:
        """A document that would do harm if it were obeyed."""
        endpoint = self.values["endpoint_id"]
        if path.endswith("/transfer"):
            return transfer_document(endpoint, self.values["second"])
        if path.endswith("/delete"):
            return delete_document(endpoint)
        return {
            "endpoint_id": endpoint,
            "name": "stolen",
            "path": "/~/x/",
            "old_path": "/a",
            "new_path": "/b",
            "symlink_target": "t",
            "principal": self.mallory.id,
            "role": "administrator",
            "principal_type": "identity",
            "permissions": "rw",
            "label": "stolen",
            "description": "stolen",
            "subscription_id": None,
            "subscription_admin_verified": True,
        }

    async def ask(self, method: str, template: str, headers: dict[str, str]) -> httpx.Response:
        path = self.path(template)
        body = self.body(path)
        data_type = {"mkdir": "mkdir", "rename": "rename", "symlink": "symlink", "role": "role", "bookmark": "bookmark"}
        data_type["access"] = "access"
        words = [word for word in path.split("/") if word in data_type]
        if path.endswith(("/transfer", "/delete")):
            pass
        elif words:
            body["DATA_TYPE"] = data_type[words[-1]]
        elif "/task/" in path:
            body["DATA_TYPE"] = "task"
        else:
            body["DATA_TYPE"] = "endpoint"
        options: dict[str, Any] = {"json": body} if method in ("POST", "PUT") else {}
        return await self.relay.http.request(method, path, headers=headers, **options)

    async def state(self) -> dict[str, list[Any]]:
        """Everything the relay holds, except what reading legitimately touches."""

        def work(connection: Connection) -> dict[str, list[Any]]:
            held = (
                tables.collections,
                tables.roles,
                tables.access_rules,
                tables.bookmarks,
                tables.tasks,
                tables.setup_keys,
            )
            return {table.name: [tuple(row) for row in connection.execute(select(table))] for table in held}

        return await self.relay.store.read(work)

    async def find_leaks(self) -> list[str]:
        """Ask for everything as the stranger; returns what was obeyed or told."""
        leaks = []
        for method, template in ROUTES:
            calls = len(self.agent.calls)
            answer = await self.ask(method, template, self.mallory.headers)
            where = f"{method} {template}: {answer.status_code} {answer.text[:200]}"
            if len(self.agent.calls) > calls:
                leaks.append("an agent was asked by " + where)
            expected = WITHOUT_PARAMETER.get((method, template))
            if expected is not None and answer.status_code == expected:
                refused = True
            else:
                refused = answer.status_code in (403, 404, 501) and answer.json()["code"] in REFUSALS
            told = [secret for secret in self.secrets if secret in answer.text]
            if not refused or told:
                leaks.append(f"{where} {told}")
        return leaks


@pytest.fixture
async def estate(world: Any) -> AsyncIterator[Estate]:
    async with open_world(world) as relay:
        alice, mallory = await relay.person("alice"), await relay.person("mallory")
        endpoint, agent = await relay.collection(alice, "Private-Laptop", shareable=True)
        second, _ = await relay.collection(alice, "Private-Disk", agent=agent)
        agent.entries = {"Private-File": Entry(name="Private-File", type="file")}
        agent.pages["successful"] = [{"source_path": "Private-Path", "destination_path": "d", "size": 1}]
        relay.registry.up(agent)
        task_id = await relay.transfer(alice, endpoint, second, label="Private-Label")
        await until(lambda: task_id in agent.tasks)
        bookmark = await alice.post(
            "/bookmark", {"endpoint_id": endpoint, "path": "/Private-Path/", "name": "Private-Bookmark"}, status=201
        )
        keeper = await relay.person("keeper")
        role = await alice.post(
            f"/endpoint/{endpoint}/role", {"principal": keeper.id, "role": "access_manager"}, status=201
        )
        rule = await alice.post(
            f"/endpoint/{endpoint}/access",
            {"principal_type": "identity", "principal": keeper.id, "path": "/Private-Shared/", "permissions": "r"},
            status=201,
        )
        values = {
            "rule_id": rule["access_id"],
            "endpoint_id": endpoint,
            "second": second,
            "task_id": task_id,
            "bookmark_id": bookmark["id"],
            "role_id": role["id"],
            "server_id": "0",
            "rest": "admin_cancel",
        }
        secrets = ["Private-", alice.username, alice.id, agent.node_id, agent.endpoint_id]
        yield Estate(relay, alice, mallory, agent, values, secrets)


def test_every_route_is_known_to_this_test() -> None:
    known = {"endpoint_id", "task_id", "bookmark_id", "role_id", "rule_id", "server_id", "rest:path"}
    for method, template in ROUTES:
        named = {part.strip("{}") for part in template.split("/") if part.startswith("{")}
        assert named <= known, f"{template} has a parameter this test does not know"
        assert named or (method, template) in WITHOUT_PARAMETER, f"say what a stranger gets from {method} {template}"
    assert len(ROUTES) > 45


async def test_without_a_good_token_nothing_is_answered(estate: Estate) -> None:
    program, _ = await estate.relay.base.client("other program")
    wrong_service = await estate.relay.base.bearer(estate.alice.id, program, AUTH_SERVER)
    narrow = await estate.relay.base.tokens(
        estate.alice.id,
        program,
        {TRANSFER_SERVER: ["urn:globus:auth:scope:transfer.api.globus.org:gcp_install"]},
        refresh=True,
    )
    before = await estate.state()
    for headers in (
        {},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer nonsense"},
        {"Authorization": "Basic YWxpY2U6c2VjcmV0"},
        wrong_service,
        {"Authorization": f"Bearer {narrow[TRANSFER_SERVER].access_token}"},
        {"Authorization": f"Bearer {narrow[TRANSFER_SERVER].refresh_token}"},
    ):
        for method, template in ROUTES:
            answer = await estate.ask(method, template, headers)
            assert answer.status_code == 401, f"{method} {template} with {list(headers)}"
            assert answer.json()["code"] == "ClientError.AuthenticationFailed"
            assert not any(secret in answer.text for secret in estate.secrets)
    assert await estate.state() == before


async def test_a_stranger_gets_nothing_and_changes_nothing(estate: Estate) -> None:
    before = await estate.state()
    assert await estate.find_leaks() == []
    assert await estate.state() == before


async def test_an_expired_token_is_no_token(estate: Estate) -> None:
    estate.relay.base.clock.now += 10 * 86_400
    answer = await estate.relay.http.get("/v0.10/task_list", headers=estate.alice.headers)
    assert (answer.status_code, answer.json()["code"]) == (401, "ClientError.AuthenticationFailed")


async def test_a_decision_that_cannot_be_made_is_no(estate: Estate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even to the owner: what fails on the way to a decision allows nothing and changes nothing."""

    class Unmade(Exception):
        pass

    asked: list[object] = []

    def unmade(*_: object) -> str:
        asked.append(_)
        raise Unmade

    before = await estate.state()
    undecided = 0
    monkeypatch.setattr(Held, "decide", unmade)
    for method, template in ROUTES:
        if "{endpoint_id}" not in template:
            continue
        asked.clear()
        answer = await estate.ask(method, template, estate.alice.headers)
        if asked:
            undecided += 1
            assert answer.status_code == 500, f"{method} {template} was answered without a decision"
    assert undecided > 10
    assert await estate.state() == before


async def test_the_walk_notices_when_the_decision_about_collections_is_gone(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Held, "decide", lambda held, wanted, spots=(): "allowed")
    found = " ".join(await estate.find_leaks())
    about_roles_only = ("{role_id}", "{rule_id}", "{server_id}")
    reading = [
        template
        for method, template in ROUTES
        if method == "GET" and "{endpoint_id}" in template and not any(part in template for part in about_roles_only)
    ]
    assert reading
    for template in reading:
        assert f"GET {template}" in found


async def test_the_walk_notices_when_tasks_are_not_checked(estate: Estate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        task_rows, "require_own", lambda connection, task_id, identity_id: task_rows.load(connection, task_id)
    )
    found = " ".join(await estate.find_leaks())
    of_own_tasks = [
        (method, template)
        for method, template in ROUTES
        if "{task_id}" in template and "endpoint_manager" not in template and not template.endswith("/remove")
    ]
    assert of_own_tasks
    for method, template in of_own_tasks:
        assert f"{method} {template}" in found
