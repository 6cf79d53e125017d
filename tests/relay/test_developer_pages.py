"""The developers' pages: an application is registered in a minute, secrets show once, and others see nothing."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection, select

from relay.applications import projects, registration
from relay.auth.browser_sessions import MULTI_FACTOR
from relay.auth.clients import SecretChecker
from relay.auth.scopes import TRANSFER_ALL
from relay.pages.browser import FRESH
from relay.store.metadata import metadata
from tests.relay.sign_in_world import Application, Form, Person, add_person, forms_of

BACK = "https://hub.example.org/hub/oauth_callback"


@dataclass
class Desk:
    """A developer at a browser."""

    person: Person
    id: str

    async def do(self, place: str, deed: str, **fields: str) -> httpx.Response:
        """Send one of a page's forms, filled in as the page was."""
        page = await self.person.get(place)
        assert page.status_code == 200, page.text
        form = next(form for form in forms_of(page.text) if form.fields.get("do") == deed)
        return await self.person.post(Form(form.action or place, form.fields), **fields)

    async def register(self, **fields: str) -> tuple[str, str | None]:
        """The id and the secret that the page shows."""
        page = await self.do(
            "/developers", "register", **{"name": "Hub", "kind": "web", "redirect_uris": BACK, **fields}
        )
        assert page.status_code == 200, page.text
        shown = re.findall(r'<code class="large">([^<]*)</code>', page.text)
        return shown[0], shown[1] if len(shown) > 1 else None


async def desk(world: Any, name: str) -> Desk:
    identity = await add_person(world, name)
    person = Person(world)
    await person.arrive(identity)
    return Desk(person, identity.id)


@pytest.fixture
async def dev(world: Any) -> Desk:
    return await desk(world, "dev")


async def test_a_hub_is_registered_with_one_form_and_signs_people_in(world: Any, dev: Desk) -> None:
    client_id, secret = await dev.register()
    assert secret is not None
    assert (await SecretChecker(world.store).check(client_id, secret)) is not None
    ada = Person(world)
    await ada.arrive(await add_person(world, "ada"))
    hub = Application(client_id=client_id, redirect_uri=BACK, scope="openid")
    answer = await hub.redeem(world, await hub.code(ada), client_secret=secret)
    assert answer.json()["id_token"]
    # Nowhere else is the secret to be seen, and the database does not have it.
    for place in ("/developers", f"/developers/applications/{client_id}"):
        page = await dev.person.get(place)
        assert "Hub" in page.text
        assert secret not in page.text
    # What is not named, clients look for at Globus.
    for service in ("AUTH", "TRANSFER", "GROUPS", "SEARCH", "TIMER", "FLOWS", "COMPUTE"):
        assert f"GLOBUS_SDK_SERVICE_URL_{service}=" in page.text

    def everything(connection: Connection) -> str:
        return " ".join(str(row) for table in metadata.sorted_tables for row in connection.execute(select(table)))

    assert secret not in await world.store.read(everything)


async def test_native_programs_have_no_secret_and_share_a_project(world: Any, dev: Desk) -> None:
    first, _ = await dev.register()

    def of(connection: Connection) -> Any:
        return registration.find(connection, first)

    project = (await world.store.read(of)).project_id
    tool, secret = await dev.register(name="Tool", kind="native", redirect_uris="", project=project)
    assert secret is None
    page = await dev.person.get(f"/developers/projects/{project}")
    assert "Tool" in page.text
    assert "Secrets" not in (await dev.person.get(f"/developers/applications/{tool}")).text


async def test_settings_secrets_scopes_and_the_end_of_an_application(world: Any, dev: Desk) -> None:
    client_id, secret = await dev.register()
    place = f"/developers/applications/{client_id}"
    page = await dev.do(place, "secret", name="second")
    second = re.findall(r'<code class="large">([^<]*)</code>', page.text)[0]
    await dev.do(place, "end")  # the first in the list
    checker = SecretChecker(world.store)
    assert secret is not None
    assert (await checker.check(client_id, secret)) is None
    assert (await checker.check(client_id, second)) is not None
    uris, terms = f"{BACK}\r\nhttp://localhost/x\r\n", "https://hub.example.org/terms?a=1&b=2"
    change = {"name": "New <b>name</b>", "redirect_uris": uris, "public": "yes", "terms_and_conditions": terms}
    await dev.do(place, "change", **change)
    hub = Application(client_id=client_id, redirect_uri=BACK, scope="openid")
    assert f'href="{html.escape(terms)}"' in (await dev.person.get(hub.url())).text
    page = await dev.person.get(place)
    assert "New &lt;b&gt;name&lt;/b&gt;" in page.text
    assert "http://localhost/x" in page.text
    more = {"name": "Move", "description": "Move what you found", "scope_suffix": "move", "needs": f"* +{TRANSFER_ALL}"}
    page = await dev.do(place, "scope", **more)
    scope = re.findall(r'href="(/developers/scopes/[^"]*)"', page.text)[0]
    page = await dev.person.get(scope)
    assert f"*+{TRANSFER_ALL}" in html.unescape(page.text)
    await dev.do(scope, "change", name="Moved", needs="openid")
    page = await dev.person.get(scope)
    assert "Moved" in page.text
    assert TRANSFER_ALL not in page.text
    await dev.do(scope, "delete")
    assert "/developers/scopes/" not in (await dev.person.get(place)).text
    await dev.do(place, "delete")
    assert (await dev.person.get(place)).status_code == 404


async def test_a_project_its_people_and_its_policies(world: Any, dev: Desk) -> None:
    eve = await desk(world, "eve")
    client_id, _ = await dev.register()
    (found,) = await world.store.read(lambda c: registration.of_projects(c, [_project(c)]))
    place = f"/developers/projects/{found.project_id}"
    assert (await eve.person.get(place)).status_code == 404
    await dev.do(place, "add", username="eve")
    assert (await eve.person.get(place)).status_code == 200
    page = await dev.do(
        place, "policy", display_name="Staff", description="Only they", minutes="10", required_mfa="yes"
    )
    policy = re.findall(r'href="/developers/policies/([^"]*)"', page.text)[0]
    ada = Person(world)
    await ada.arrive(await add_person(world, "ada"))
    hub = Application(client_id=client_id, redirect_uri=BACK, scope="openid")
    assert "policy asks you" in (await ada.get(hub.url(session_required_policies=policy))).text
    await ada.arrive(await add_person(world, "ann"), MULTI_FACTOR)
    assert "wants to act for you" in (await ada.get(hub.url(session_required_policies=policy))).text
    assert (await dev.do(place, "delete")).status_code == 409
    await dev.do(f"/developers/policies/{policy}", "change", minutes="")
    await dev.do(f"/developers/policies/{policy}", "delete")
    await dev.do(place, "leave", identity=dev.id)
    assert (await dev.person.get(place)).status_code == 404
    assert (await eve.person.get(place)).status_code == 200


def _project(connection: Connection) -> str:
    from relay.store.application_tables import projects as table

    return str(connection.execute(select(table.c.id)).scalar_one())


async def test_what_is_wrong_is_said_in_words(world: Any, dev: Desk) -> None:
    fields = {"name": "Hub", "kind": "web", "redirect_uris": "http://hub.example.org/"}
    page = await dev.do("/developers", "register", **fields)
    assert page.status_code == 400
    assert "must be an https address" in page.text
    # The project that the same form would have made is not there either.
    assert await world.store.read(lambda c: c.execute(select(projects.projects.c.id)).all()) == []
    client_id, _ = await dev.register()
    page = await dev.do(
        f"/developers/applications/{client_id}", "scope", name="x", description="y", scope_suffix="https"
    )
    assert "scope_suffix" in page.text
    page = await dev.do("/developers", "register", do="nonsense")
    assert page.status_code == 400


async def test_pages_are_strict_and_forms_are_ours(world: Any, dev: Desk) -> None:
    client_id, _ = await dev.register()
    places = ["/developers", f"/developers/applications/{client_id}"]
    for place in places:
        page = await dev.person.get(place)
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src" not in policy
        assert "<script" not in page.text
        assert "style=" not in page.text
        for fields in ({"do": "delete"}, {"do": "delete", "form_token": "0" * 64}):
            assert (await dev.person.request("POST", place, fields)).status_code == 403
        answer = await dev.person.request("POST", place, {}, origin="https://evil.example.org")
        assert answer.status_code == 403
    stranger = Person(world)
    for place in places:
        page = await stranger.get(place)
        assert "Sign in" in page.text
        assert "Hub" not in page.text


async def test_old_proof_of_who_one_is_changes_nothing(world: Any, dev: Desk) -> None:
    client_id, _ = await dev.register()
    world.clock.now += FRESH + 1
    place = f"/developers/applications/{client_id}"
    page = await dev.do(place, "delete")
    assert "Sign in again" in page.text
    page = await dev.person.post(
        next(f for f in forms_of(page.text) if f.action == "/sign-in"), password="quiet boats go by"
    )
    assert "Hub" in page.text
    await dev.do(place, "delete")
    assert (await dev.person.get(place)).status_code == 404


async def test_others_applications_do_not_exist(world: Any, dev: Desk) -> None:
    client_id, _ = await dev.register()
    eve = await desk(world, "eve")
    await eve.register(name="Mine")
    form = forms_of((await eve.person.get("/developers")).text)[0]
    for deed in ("delete", "secret", "change", "scope"):
        page = await eve.person.post(
            Form(f"/developers/applications/{client_id}", {**form.fields, "do": deed}), name="x"
        )
        assert page.status_code == 404
        assert "Hub" not in page.text


async def test_pages_are_counted_like_other_requests(world: Any, dev: Desk) -> None:
    """Making secrets costs, and nobody may keep the relay busy with it."""
    client_id, _ = await dev.register()
    limit = world.settings.limits.user_requests
    for _ in range(limit):
        if not world.relay.services.requests.take(dev.id, world.clock.now).remaining:
            break
    page = await dev.person.get(f"/developers/applications/{client_id}")
    assert page.status_code == 429
    assert int(page.headers["retry-after"]) >= 1
    world.clock.now += world.settings.limits.user_requests_period
    assert (await dev.person.get(f"/developers/applications/{client_id}")).status_code == 200
