"""Scopes that developers define, clients that clients register, and applications for the people of one provider."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
from sqlalchemy import Connection, select, update

from relay.applications import custom_scopes
from relay.auth.clients import SecretChecker
from relay.auth.known_scopes import id_of, names_with_ids
from relay.auth.providers import sign_in_provider_ids
from relay.auth.scopes import AUTH_SERVER, MANAGE_PROJECTS, TRANSFER_ALL, VIEW_CLIENTS_AND_SCOPES
from relay.store.auth_tables import identities
from relay.store.sign_in_tables import consents
from tests.relay.sign_in_world import Application, Form, Person, add_person, forms_of
from tests.relay.test_applications import Developer, developer, fields_of, words_of

DEPENDENT = "urn:globus:auth:grant_type:dependent_token"


async def service(dev: Developer, **more: Any) -> tuple[str, str]:
    """A client with a secret: both."""
    client = await dev.client(await dev.project(), client_type="resource_server", **more)
    body = {"credential": {"name": "first"}}
    made = await dev.done("POST", f"/clients/{client['id']}/credentials", body, status=201)
    return client["id"], made["credential"]["secret"]


async def scope_of(dev: Developer, client_id: str, **more: Any) -> dict[str, Any]:
    body = {"name": "Move", "description": "Move what you found", "scope_suffix": "move", **more}
    return dict((await dev.done("POST", f"/clients/{client_id}/scopes", {"scope": body}, status=201))["scope"])


def needing(scope: str, *, optional: bool = False, lasting: bool = False) -> dict[str, Any]:
    return {"dependent_scopes": [{"scope": scope, "optional": optional, "requires_refresh_token": lasting}]}


async def shown_consent(world: Any, person: Person, application: Application, way: str) -> tuple[Form, str]:
    """The form in which a person is asked, in the browser or for a device, and the device's code."""
    if way == "browser":
        (form,) = forms_of((await person.get(application.url())).text)
        return form, ""
    begin = {"client_id": application.client_id, "scope": application.scope}
    made = (await world.http.post("/v2/oauth2/device_authorization", data=begin)).json()
    (form,) = forms_of((await person.get("/device")).text)
    (form,) = forms_of((await person.post(form, user_code=made["user_code"])).text)
    return form, made["device_code"]


async def test_a_scope_is_asked_for_consented_to_and_gives_its_service_dependent_tokens(world: Any) -> None:
    dev = await developer(world, "dev")
    client_id, secret = await service(dev)
    scope = await scope_of(dev, client_id, **needing(id_of(TRANSFER_ALL)))
    ada = Person(world)
    await ada.arrive(await add_person(world, "ada"))
    application = Application(scope=scope["scope_string"])
    page = await ada.get(application.url())
    assert "Move what you found" in page.text
    assert TRANSFER_ALL in page.text
    document = (await application.redeem(world, await application.code(ada))).json()
    assert document["resource_server"] == client_id
    form = {"grant_type": DEPENDENT, "token": document["access_token"]}
    (given,) = (await world.http.post("/v2/oauth2/token", data=form, auth=(client_id, secret))).json()
    assert given["scope"] == TRANSFER_ALL
    theirs = {"Authorization": f"Bearer {given['access_token']}"}
    assert (await world.http.get("/v0.10/task_list", headers=theirs)).status_code == 200
    # What the scope stands for is gone: so is every token that carries it, or that its service has got by it.
    await dev.done("DELETE", f"/scopes/{scope['id']}")
    assert (await world.http.get("/v0.10/task_list", headers=theirs)).status_code == 401
    check = {"token": document["access_token"]}
    answer = await world.http.post("/v2/oauth2/token/introspect", data=check, auth=(client_id, secret))
    assert answer.json() == {"active": False}
    assert application.answer(await ada.get(application.url()))["error"] == "invalid_scope"


async def test_a_scope_that_needs_more_than_before_is_asked_for_again(world: Any) -> None:
    dev = await developer(world, "dev")
    client_id, secret = await service(dev, redirect_uris=["https://hub.example.org/cb"])
    scope = await scope_of(dev, client_id)
    ada = Person(world)
    await ada.arrive(await add_person(world, "ada"))
    hub = Application(client_id=client_id, redirect_uri="https://hub.example.org/cb", scope=scope["scope_string"])
    await hub.code(ada)
    assert "code" in hub.answer(await ada.get(hub.url()))
    await dev.done("PUT", f"/scopes/{scope['id']}", {"scope": needing("openid")})
    assert "wants to act for you" in (await ada.get(hub.url())).text
    del secret


@pytest.mark.parametrize("person_stays", [True, False])
@pytest.mark.parametrize("lasting", [True, False])
async def test_a_service_gets_refresh_tokens_where_the_person_was_told_of_it(
    world: Any, lasting: bool, person_stays: bool
) -> None:
    dev = await developer(world, "dev")
    auth = await service(dev)
    scope = await scope_of(dev, auth[0], **needing(TRANSFER_ALL, lasting=lasting))
    ada = Person(world)
    await ada.arrive(await add_person(world, "ada"))
    application, access = Application(scope=scope["scope_string"]), "online" if person_stays else "offline"
    assert ("also while you are away</li>" in (await ada.get(application.url(access_type=access))).text) == lasting
    document = (await application.redeem(world, await application.code(ada, access_type=access))).json()
    assert ("refresh_token" in document) == (not person_stays)
    form = {"grant_type": DEPENDENT, "token": document["access_token"]}
    (plain,) = (await world.http.post("/v2/oauth2/token", data=form, auth=auth)).json()
    assert "refresh_token" not in plain
    (kept,) = (await world.http.post("/v2/oauth2/token", data=form | {"access_type": "offline"}, auth=auth)).json()
    # Whoever allows an application only while they are there has not allowed its services more, unless they were told.
    assert ("refresh_token" in kept) == (lasting or not person_stays)
    if "refresh_token" in kept:
        again = {"grant_type": "refresh_token", "refresh_token": kept["refresh_token"]}
        assert (await world.http.post("/v2/oauth2/token", data=again, auth=auth)).json()["scope"] == TRANSFER_ALL


@pytest.mark.parametrize("way", ["browser", "device"])
async def test_what_is_optional_can_be_refused_alone(world: Any, way: str) -> None:
    dev = await developer(world, "dev")
    auth = await service(dev)
    scope = await scope_of(dev, auth[0], **needing(TRANSFER_ALL, optional=True))
    ada = Person(world)
    await ada.arrive(await add_person(world, "ada"))
    application = Application(scope=scope["scope_string"])

    async def given(*refused: str) -> list[str]:
        form, device_code = await shown_consent(world, ada, application, way)
        assert "below-0" in form.fields, "the box is ticked at first"
        kept = {name: value for name, value in form.fields.items() if name not in refused}
        page = await ada.post(Form(form.action, kept), decision="allow")
        if way == "browser":
            document = (await application.redeem(world, application.answer(page)["code"])).json()
        else:
            poll = {"grant_type": "urn:ietf:params:oauth:grant-type:device_code", "device_code": device_code}
            poll["client_id"] = application.client_id
            document = (await world.http.post("/v2/oauth2/token", data=poll)).json()
        form_ = {"grant_type": DEPENDENT, "token": document["access_token"]}
        answer = await world.http.post("/v2/oauth2/token", data=form_, auth=auth)
        held.extend(token["access_token"] for token in answer.json())
        return [token["scope"] for token in answer.json()]

    held: list[str] = []
    assert await given("below-0") == []
    assert await given() == [TRANSFER_ALL]
    theirs = {"Authorization": f"Bearer {held[0]}"}
    assert (await world.http.get("/v0.10/task_list", headers=theirs)).status_code == 200
    # Refused the next time, it does not count any more, nor what the service has got by it.
    assert await given("below-0") == []
    assert (await world.http.get("/v0.10/task_list", headers=theirs)).status_code == 401


@pytest.mark.parametrize("way", ["browser", "device"])
async def test_nothing_is_allowed_that_was_not_on_the_page(world: Any, way: str) -> None:
    """A scope's developer knows when somebody looks at the page, and may have it need more a moment later."""
    dev = await developer(world, "dev")
    auth = await service(dev)
    scope = await scope_of(dev, auth[0])
    ada = Person(world)
    await ada.arrive(await add_person(world, "ada"))
    application = Application(scope=scope["scope_string"])
    form, _ = await shown_consent(world, ada, application, way)
    await dev.done("PUT", f"/scopes/{scope['id']}", {"scope": needing(TRANSFER_ALL)})
    page = await ada.post(form, decision="allow")
    assert "has changed" in page.text
    assert TRANSFER_ALL in page.text
    table = consents.c
    assert await world.store.read(lambda c: c.execute(select(table.id)).all()) == []
    # Seen, it can be allowed.
    (form,) = forms_of(page.text)
    page = await ada.post(form, decision="allow")
    assert "has changed" not in page.text
    names = await world.store.read(lambda c: c.execute(select(table.scope)).scalars().all())
    assert set(names) == {scope["scope_string"], TRANSFER_ALL}


async def test_what_is_not_optional_cannot_be_left_out_of_the_form(world: Any) -> None:
    dev = await developer(world, "dev")
    auth = await service(dev)
    scope = await scope_of(dev, auth[0], **needing(TRANSFER_ALL))
    ada = Person(world)
    await ada.arrive(await add_person(world, "ada"))
    (form,) = forms_of((await ada.get(Application(scope=scope["scope_string"]).url())).text)
    assert not [name for name in form.fields if name.startswith("below")]


async def test_a_scope_that_begins_to_need_a_refresh_token_is_asked_for_again(world: Any) -> None:
    dev = await developer(world, "dev")
    client_id, _ = await service(dev, redirect_uris=["https://hub.example.org/cb"])
    scope = await scope_of(dev, client_id, **needing(TRANSFER_ALL))
    ada = Person(world)
    await ada.arrive(await add_person(world, "ada"))
    hub = Application(client_id=client_id, redirect_uri="https://hub.example.org/cb", scope=scope["scope_string"])
    place = hub.url(access_type="online")
    await hub.code(ada, access_type="online")
    assert "code" in hub.answer(await ada.get(place))
    await dev.done("PUT", f"/scopes/{scope['id']}", {"scope": needing(TRANSFER_ALL, lasting=True)})
    assert "also while you are away</li>" in (await ada.get(place)).text
    await hub.code(ada, access_type="online")
    assert "code" in hub.answer(await ada.get(place))


async def test_no_refresh_token_is_given_or_required_for_a_scope_without(world: Any) -> None:
    dev = await developer(world, "dev")
    below = await service(dev)
    brief = await scope_of(dev, below[0], allows_refresh_token=False, scope_suffix="brief")
    above = (await service(dev))[0]
    body = {"name": "n", "description": "d", "scope_suffix": "x", **needing(brief["id"], lasting=True)}
    assert "refresh token" in await dev.refused("POST", f"/clients/{above}/scopes", 400, {"scope": body})
    ada = Person(world)
    await ada.arrive(await add_person(world, "ada"))
    application = Application(scope=f"openid {brief['scope_string']}")
    document = (await application.redeem(world, await application.code(ada))).json()
    (other,) = document["other_tokens"]
    # Each service by itself: the other one of the request keeps what it may have.
    assert ("refresh_token" in document, "refresh_token" in other) == (True, False)
    assert other["resource_server"] == below[0]


async def test_the_cache_id_of_dependent_tokens_changes_with_what_they_would_be(world: Any) -> None:
    dev = await developer(world, "dev")
    client_id, secret = await service(dev)
    scope = await scope_of(dev, client_id, **needing(TRANSFER_ALL))
    ada = Person(world)
    await ada.arrive(await add_person(world, "ada"))
    application = Application(scope=scope["scope_string"])

    async def cache_id(token: str) -> str:
        answer = await world.http.post("/v2/oauth2/token/introspect", data={"token": token}, auth=(client_id, secret))
        return str(answer.json()["dependent_tokens_cache_id"])

    first = (await application.redeem(world, await application.code(ada))).json()
    before = await cache_id(first["access_token"])
    assert await cache_id(first["access_token"]) == before
    form = {"grant_type": "refresh_token", "refresh_token": first["refresh_token"], "client_id": application.client_id}
    renewed = (await world.http.post("/v2/oauth2/token", data=form)).json()
    assert await cache_id(renewed["access_token"]) == before
    await dev.done("PUT", f"/scopes/{scope['id']}", {"scope": needing("openid")})
    second = (await application.redeem(world, await application.code(ada))).json()
    assert await cache_id(second["access_token"]) != before
    assert await cache_id(first["access_token"]) != before


async def test_all_needs_of_a_scope_are_looked_up_together(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dev = await developer(world, "dev")
    client_id, _ = await service(dev)
    other = await scope_of(dev, client_id)
    looked: list[set[str]] = []

    def look(connection: Connection, ids: Collection[str]) -> dict[str, str]:
        looked.append(set(ids))
        return names_with_ids(connection, ids)

    monkeypatch.setattr(custom_scopes, "names_with_ids", look)
    named = [id_of(TRANSFER_ALL), id_of(MANAGE_PROJECTS).upper(), other["id"], "openid", VIEW_CLIENTS_AND_SCOPES]
    needs = [{"scope": scope, "optional": scope == other["id"]} for scope in named]
    made = await scope_of(dev, client_id, scope_suffix="more", dependent_scopes=needs)
    strings = [TRANSFER_ALL, MANAGE_PROJECTS, other["scope_string"], "openid", VIEW_CLIENTS_AND_SCOPES]
    held = {one["scope"]: one["optional"] for one in made["dependent_scopes"]}
    assert held == {other["id"]: True, **{id_of(name): False for name in strings if name != other["scope_string"]}}
    # Whoever looks for ids goes through all collections.
    assert looked == [{id_of(TRANSFER_ALL), id_of(MANAGE_PROJECTS)}]


async def test_scopes_of_others_are_seen_as_far_as_their_developer_wants(world: Any) -> None:
    dev, eve = await developer(world, "dev"), await developer(world, "eve")
    hidden = await scope_of(dev, (await service(dev))[0])
    open_client = (await service(dev, visibility="public"))[0]
    shown = await scope_of(dev, open_client)
    told = await scope_of(dev, hidden["client"], scope_suffix="told", advertised=True)
    ids = ",".join(scope["id"] for scope in (hidden, shown, told))
    found = (await eve.done("GET", f"/scopes?ids={ids}"))["scopes"]
    assert {scope["id"] for scope in found} == {shown["id"], told["id"]}
    strings = ",".join([hidden["scope_string"], told["scope_string"], "openid", "nonsense"])
    found = (await eve.done("GET", f"/scopes?scope_strings={strings}"))["scopes"]
    assert {scope["scope_string"] for scope in found} == {told["scope_string"], "openid"}
    assert (await eve.done("GET", "/scopes"))["scopes"] == []
    assert len((await dev.done("GET", "/scopes"))["scopes"]) == 3
    await eve.refused("GET", f"/scopes/{hidden['id']}", 404)
    assert (await eve.done("GET", f"/clients/{open_client}"))["client"]["scopes"] == [shown["id"]]
    for method in ("PUT", "DELETE"):
        await eve.refused(method, f"/scopes/{told['id']}", 404, {"scope": {"name": "mine"}})
    mine = (await service(eve))[0]
    body = {"scope": {"name": "n", "description": "d", "scope_suffix": "x", **needing(hidden["id"])}}
    assert "no scope" in await eve.refused("POST", f"/clients/{mine}/scopes", 400, body)


async def test_a_new_suffix_is_a_new_scope(world: Any) -> None:
    dev = await developer(world, "dev")
    client_id, _ = await service(dev)
    first = await scope_of(dev, client_id)
    second = await scope_of(dev, client_id, scope_suffix="second", **needing(first["id"]))
    ada = Person(world)
    await ada.arrive(await add_person(world, "ada"))
    application = Application(scope=first["scope_string"])
    await application.redeem(world, await application.code(ada))
    changed = (await dev.done("PUT", f"/scopes/{first['id']}", {"scope": {"scope_suffix": "third"}}))["scope"]
    assert changed["scope_string"].endswith("/third")
    after = (await dev.done("GET", f"/scopes/{second['id']}"))["scope"]
    assert [need["scope"] for need in after["dependent_scopes"]] == [first["id"]]
    assert application.answer(await ada.get(application.url()))["error"] == "invalid_scope"


@pytest.mark.parametrize(
    "wrong",
    [
        {"scope_suffix": "https"},
        {"scope_suffix": "data_access"},
        {"scope_suffix": "With Space"},
        {"scope_suffix": None},
        {"name": ""},
        {"required_domains": ["*.example.org"]},
        {"dependent_scopes": "openid"},
        {"dependent_scopes": [{"scope": "00000000-0000-4000-8000-000000000000"}]},
        {"dependent_scopes": [{"scope": "openid", "optional": "yes"}]},
        {"advertised": 1},
    ],
)
async def test_what_is_no_scope(world: Any, wrong: dict[str, Any]) -> None:
    dev = await developer(world, "dev")
    client = await dev.client(await dev.project())
    path, right = f"/clients/{client['id']}/scopes", {"name": "n", "description": "d", "scope_suffix": "fine"}
    said = await dev.refused("POST", path, 400, {"scope": right | wrong})
    assert words_of(said) & fields_of(wrong), said
    await dev.done("POST", path, {"scope": right}, status=201)


async def test_a_token_that_may_look_may_not_change(world: Any) -> None:
    dev = await developer(world, "dev")
    scope = await scope_of(dev, (await service(dev))[0])
    client_id, _ = await world.client()
    issued = await world.tokens(dev.id, client_id, {AUTH_SERVER: [VIEW_CLIENTS_AND_SCOPES]})
    bearer = {"Authorization": f"Bearer {issued[AUTH_SERVER].access_token}"}
    path = f"/v2/api/scopes/{scope['id']}"
    assert (await world.http.get(path, headers=bearer)).status_code == 200
    assert (await world.http.delete(path, headers=bearer)).status_code == 403
    assert (await world.http.get(path)).status_code == 401


async def test_a_client_registers_others_and_manages_them(world: Any) -> None:
    dev = await developer(world, "dev")
    parent, secret = await service(dev)

    async def register(auth: tuple[str, str], **more: Any) -> Any:
        body = {"client": {"name": "Child", "client_type": "confidential_client", **more}}
        return await world.http.post("/v2/api/clients", json=body, auth=auth)

    child = (await register((parent, secret))).json()["client"]
    assert child["parent_client"] == parent
    assert child["project"] == (await dev.done("GET", f"/clients/{parent}"))["client"]["project"]
    # The parent gives it a secret with a token of its own; so do the people of the project.
    issued = await world.tokens(parent, parent, {AUTH_SERVER: [MANAGE_PROJECTS]})
    itself = Developer(parent, issued[AUTH_SERVER].access_token, world.http)
    where = f"/clients/{child['id']}/credentials"
    made = (await itself.done("POST", where, {"credential": {"name": "s"}}, status=201))["credential"]
    assert (await SecretChecker(world.store).check(child["id"], made["secret"])) is not None
    await itself.refused("GET", f"/clients/{parent}/credentials", 404)
    assert len((await dev.done("GET", where))["credentials"]) == 1
    assert (await register((child["id"], made["secret"]))).status_code == 403
    assert (await register((parent, "wrong"))).status_code == 401
    assert (await register((parent, secret), project=(await dev.project()))).status_code == 400
    # A client that the operator made stands in no project.
    assert (await register(await world.client())).status_code == 403
    await dev.done("DELETE", f"/clients/{parent}")
    assert (await dev.done("GET", f"/clients/{child['id']}"))["client"]["parent_client"] is None


async def test_an_application_for_people_of_one_provider(world: Any) -> None:
    dev = await developer(world, "dev")
    (own,) = sign_in_provider_ids(world.settings)
    client_id, secret = await service(dev, redirect_uris=["https://hub.example.org/cb"], required_idp=own)
    guest = await add_person(world, "guest")
    person = Person(world)
    await person.arrive(guest)
    hub = Application(client_id=client_id, redirect_uri="https://hub.example.org/cb", scope="openid")
    refused = hub.answer(await person.get(hub.url()))
    assert refused["error"] == "access_denied"
    assert world.settings.user_domain in refused["error_description"]
    # On another device as well.
    begun = (
        await world.http.post("/v2/oauth2/device_authorization", data={"scope": "openid"}, auth=(client_id, secret))
    ).json()
    page = await person.get("/device")
    page = await person.post(
        next(f for f in forms_of(page.text) if f.action == "/device"), user_code=begun["user_code"]
    )
    assert page.status_code == 403

    async def belongs_to(provider: str) -> None:
        mine = identities.c.id == guest.id
        await world.store.write(
            lambda c: c.execute(update(identities).where(mine).values(provider_id=provider)).rowcount
        )

    await belongs_to(own)
    assert "wants to act for you" in (await person.get(hub.url())).text
    given = (await hub.redeem(world, await hub.code(person), client_secret=secret)).json()
    form = {"grant_type": "refresh_token", "refresh_token": given["refresh_token"]}
    assert (await world.http.post("/v2/oauth2/token", data=form, auth=(client_id, secret))).status_code == 200
    # Who unlinks that identity has no further tokens.
    await belongs_to("elsewhere")
    assert (await world.http.post("/v2/oauth2/token", data=form, auth=(client_id, secret))).status_code == 401
    unknown = {"client": {"required_idp": "00000000-0000-4000-8000-000000000000"}}
    assert "nobody signs in here" in await dev.refused("PUT", f"/clients/{client_id}", 400, unknown)
