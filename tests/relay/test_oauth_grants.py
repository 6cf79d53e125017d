"""Device codes, copies of native applications, rotation, consents, dependent tokens, step-up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import insert, update

from relay.auth import clients, device, linked, public_clients
from relay.auth.grants import ROTATION_GRACE
from relay.auth.public_clients import TOWPATH_CLI
from relay.auth.scopes import TRANSFER_ALL, VIEW_CONSENTS, VIEW_IDENTITY_SET
from relay.auth.tokens import find
from relay.store import auth_tables
from relay.store import sign_in_tables as tables
from tests.relay.sign_in_world import PASSWORD, Application, Person, add_person, forms_of

if TYPE_CHECKING:
    import httpx

    from tests.relay.relay_world import RelayWorld

DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
DEPENDENT_GRANT = "urn:globus:auth:grant_type:dependent_token"
CLI_TEMPLATE = "95fdeba8-fac2-42bd-a357-e068d82ff78e"


async def active(world: RelayWorld, token: str) -> bool:
    return await world.store.read(lambda connection: find(connection, token, world.clock.now)) is not None


# --- device codes ----------------------------------------------------------------------------------------


async def begin(world: RelayWorld, scope: str = f"openid {TRANSFER_ALL}", **more: str) -> dict[str, Any]:
    form = {"client_id": TOWPATH_CLI, "scope": scope, **more}
    answer = await world.http.post(
        "/v2/oauth2/device_authorization", data=form, headers={"User-Agent": "towpath on host"}
    )
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


async def poll(world: RelayWorld, code: str, client_id: str = TOWPATH_CLI) -> httpx.Response:
    form = {"grant_type": DEVICE_GRANT, "device_code": code, "client_id": client_id}
    return await world.http.post("/v2/oauth2/token", data=form)


async def test_a_device_is_allowed_by_a_person_who_sees_where_it_is(world: RelayWorld, ada: Person) -> None:
    made = await begin(world, access_type="offline")
    assert made["verification_uri"] == f"{world.settings.public_url}/device"
    assert (await poll(world, made["device_code"])).json()["error"] == "authorization_pending"
    # The link brings the code along, and still nothing happens without the person's own step.
    page = await ada.get(made["verification_uri_complete"].removeprefix(world.settings.public_url))
    (form,) = forms_of(page.text)
    assert form.fields["user_code"] == made["user_code"]
    typed = made["user_code"].lower().replace("-", " ")
    page = await ada.post(form, user_code=typed)
    assert "127.0.0.1" in page.text
    assert "towpath on host" in page.text
    assert "transfer data in your name" in page.text
    world.clock.now += made["interval"]
    assert (await poll(world, made["device_code"])).json()["error"] == "authorization_pending"
    page = await ada.post(forms_of(page.text)[0], decision="allow")
    assert "goes on by itself" in page.text
    world.clock.now += made["interval"]
    document = (await poll(world, made["device_code"])).json()
    assert document["refresh_token"]
    assert document["id_token"]
    assert (await poll(world, made["device_code"])).json()["error"] == "invalid_grant"


async def test_a_device_is_refused(world: RelayWorld, ada: Person) -> None:
    made = await begin(world)
    (form,) = forms_of((await ada.get("/device")).text)
    page = await ada.post(form, user_code=made["user_code"])
    await ada.post(forms_of(page.text)[0], decision="refuse")
    assert (await poll(world, made["device_code"])).json()["error"] == "access_denied"
    late = await ada.post(forms_of(page.text)[0], decision="allow")
    assert late.status_code == 404


async def test_device_codes_expire_and_hasty_programs_are_slowed_down(world: RelayWorld, ada: Person) -> None:
    made = await begin(world)
    assert (await poll(world, made["device_code"])).json()["error"] == "authorization_pending"
    world.clock.now += 1
    assert (await poll(world, made["device_code"])).json()["error"] == "slow_down"
    world.clock.now += device.INTERVAL + 1
    assert (await poll(world, made["device_code"])).json()["error"] == "slow_down"
    world.clock.now += world.settings.sign_in.device_code_life
    assert (await poll(world, made["device_code"])).json()["error"] == "expired_token"
    (form,) = forms_of((await ada.get("/device")).text)
    assert (await ada.post(form, user_code=made["user_code"])).status_code == 404


async def test_a_device_code_belongs_to_its_client(world: RelayWorld, ada: Person) -> None:
    made = await begin(world)
    assert (await poll(world, made["device_code"], CLI_TEMPLATE)).json()["error"] == "invalid_grant"
    assert (await poll(world, "x" * 43)).json()["error"] == "invalid_grant"


async def test_guessing_user_codes_is_stopped(world: RelayWorld, ada: Person) -> None:
    made = await begin(world)
    (form,) = forms_of((await ada.get("/device")).text)
    statuses = []
    for index in range(world.settings.sign_in.failures + 1):
        statuses.append((await ada.post(form, user_code=f"BBBB-BBB{'BCDFGHJKLMNPQ'[index]}")).status_code)
    assert statuses == [404] * world.settings.sign_in.failures + [429]
    assert (await ada.post(form, user_code=made["user_code"])).status_code == 429


async def test_beginning_many_sign_ins_is_limited(world: RelayWorld) -> None:
    for _ in range(world.settings.sign_in.failures * 10):
        world.relay.services.crowd_guesses.failed(["127.0.0.1 devices"], world.clock.now)
    form = {"client_id": TOWPATH_CLI, "scope": "openid"}
    answer = await world.http.post("/v2/oauth2/device_authorization", data=form)
    assert answer.status_code == 429


@pytest.mark.parametrize(("scope", "error"), [("", "invalid_scope"), ("nonsense", "invalid_scope")])
async def test_device_requests_are_checked_at_once(world: RelayWorld, scope: str, error: str) -> None:
    form = {"client_id": TOWPATH_CLI, "scope": scope}
    answer = await world.http.post("/v2/oauth2/device_authorization", data=form)
    assert (answer.status_code, answer.json()["error"]) == (400, error)


# --- copies of native applications -----------------------------------------------------------------------


async def copy(world: RelayWorld, template: str = CLI_TEMPLATE, name: str = "Globus CLI") -> tuple[str, str]:
    body = {"client": {"template_id": template, "name": name}}
    answer = await world.http.post("/v2/api/clients", json=body)
    assert answer.status_code == 201, answer.text
    credential = answer.json()["included"]["client_credential"]
    assert credential["client"] == answer.json()["client"]["id"]
    return credential["client"], credential["secret"]


async def test_a_copy_signs_people_in_without_pkce_and_keeps_its_refresh_token(world: RelayWorld, ada: Person) -> None:
    client_id, secret = await copy(world)
    application = Application(client_id=client_id, redirect_uri=f"{world.settings.public_url}/v2/web/auth-code")
    page = await ada.get(application.url(code_challenge=None, code_challenge_method=None))
    assert "Allow Globus CLI?" in page.text
    (form,) = forms_of(page.text)
    allowed = await ada.request("POST", form.action, {**form.fields, "decision": "allow"})
    code = application.answer(allowed)["code"]
    redeeming = {"grant_type": "authorization_code", "code": code, "redirect_uri": application.redirect_uri}
    document = (await world.http.post("/v2/oauth2/token", data=redeeming, auth=(client_id, secret))).json()
    refreshing = {"grant_type": "refresh_token", "refresh_token": document["refresh_token"]}
    for _ in range(3):
        again = await world.http.post("/v2/oauth2/token", data=refreshing, auth=(client_id, secret))
        assert again.json()["refresh_token"] == document["refresh_token"]
    gone = await world.http.delete(f"/v2/api/clients/{client_id}", auth=(client_id, secret))
    assert gone.json()["client"]["id"] == client_id
    assert not await active(world, document["access_token"])
    assert (await world.http.post("/v2/oauth2/token", data=refreshing, auth=(client_id, secret))).status_code == 401


async def test_a_copy_is_nobody_by_itself(world: RelayWorld) -> None:
    """Otherwise anybody could make themselves an identity of this relay without asking."""
    form = {"grant_type": "client_credentials", "scope": f"openid {TRANSFER_ALL}"}
    answer = await world.http.post("/v2/oauth2/token", data=form, auth=await copy(world))
    assert (answer.status_code, answer.json()["error"]) == (400, "unauthorized_client")


async def test_only_known_applications_are_copied(world: RelayWorld) -> None:
    unknown = "11111111-2222-4333-8444-555555555555"
    for client in ({"template_id": "x"}, {"template_id": 1}, {"template_id": unknown}):
        assert (await world.http.post("/v2/api/clients", json={"client": client})).status_code == 403
    for client in ({}, {"name": "x"}):
        assert (await world.http.post("/v2/api/clients", json={"client": client})).status_code == 401


async def test_a_copy_cannot_take_another_name_before_people(world: RelayWorld, ada: Person) -> None:
    client_id, _ = await copy(world, name="Your Bank")
    page = await ada.get(Application(client_id=client_id).url())
    assert "Allow Globus CLI, called “Your Bank” on its machine?" in page.text


async def test_copies_that_nobody_uses_are_forgotten(world: RelayWorld, ada: Person) -> None:
    unused, _ = await copy(world)
    used, secret = await copy(world)
    application = Application(client_id=used)
    await application.redeem(world, await application.code(ada), client_secret=secret)
    world.clock.now += public_clients.UNUSED_LIFE + 1
    gone = await world.store.write(lambda c: public_clients.remove_unused_copies(c, world.clock.now))
    assert gone == 1
    assert await world.store.read(lambda c: clients.find_client(c, unused)) is None
    assert await world.store.read(lambda c: clients.find_client(c, used)) is not None


async def test_making_copies_is_limited(world: RelayWorld) -> None:
    for _ in range(world.settings.sign_in.failures * 10):
        world.relay.services.crowd_guesses.failed(["127.0.0.1 copies"], world.clock.now)
    answer = await world.http.post("/v2/api/clients", json={"client": {"template_id": CLI_TEMPLATE}})
    assert answer.status_code == 429


# --- rotation --------------------------------------------------------------------------------------------


async def rotating(world: RelayWorld, ada: Person) -> tuple[Application, dict[str, Any]]:
    application = Application()
    document = (await application.redeem(world, await application.code(ada))).json()
    rotate = update(auth_tables.clients).where(auth_tables.clients.c.id == application.client_id).values(rotates=True)
    await world.store.write(lambda connection: connection.execute(rotate).rowcount)
    return application, document


async def refresh(world: RelayWorld, application: Application, token: str) -> httpx.Response:
    form = {"grant_type": "refresh_token", "refresh_token": token, "client_id": application.client_id}
    return await world.http.post("/v2/oauth2/token", data=form)


async def test_where_rotation_is_on_a_token_is_replaced_and_a_late_reuse_ends_everything(
    world: RelayWorld, ada: Person
) -> None:
    application, document = await rotating(world, ada)
    second = (await refresh(world, application, document["refresh_token"])).json()
    assert second["refresh_token"] != document["refresh_token"]
    world.clock.now += ROTATION_GRACE - 1
    # The answer may have been lost on the way: soon after, the old one still counts.
    third = (await refresh(world, application, document["refresh_token"])).json()
    assert await active(world, third["access_token"])
    world.clock.now += 2
    stolen = await refresh(world, application, document["refresh_token"])
    assert (stolen.status_code, stolen.json()["error"]) == (401, "invalid_grant")
    for token in (second["refresh_token"], third["refresh_token"], third["access_token"]):
        assert not await active(world, token)


# --- consents --------------------------------------------------------------------------------------------


async def test_consents_are_listed_as_the_cli_reads_them_and_withdrawn(world: RelayWorld, ada: Person) -> None:
    application = Application(scope=f"openid {TRANSFER_ALL}[openid *email]")
    document = (await application.redeem(world, await application.code(ada))).json()
    bearer = {"Authorization": f"Bearer {document['access_token']}"}
    subject = (await world.http.get("/v2/oauth2/userinfo", headers=bearer)).json()["sub"]
    answer = (await world.http.get(f"/v2/api/identities/{subject}/consents?all=False", headers=bearer)).json()
    by_name = {(item["scope_name"], len(item["dependency_path"])): item for item in answer["consents"]}
    root = by_name[(TRANSFER_ALL, 1)]
    assert by_name[("email", 2)]["dependency_path"] == [root["id"], by_name[("email", 2)]["id"]]
    assert by_name[("email", 2)]["atomically_revocable"] is True
    assert by_name[("openid", 2)]["atomically_revocable"] is False
    assert root["allows_refresh"] is True
    assert (await world.http.get(f"/v2/api/identities/{subject}/consents?all=True", headers=bearer)).status_code == 403
    page = await ada.get("/account/applications")
    assert "Globus SDK tutorial application" in page.text
    form = next(form for form in forms_of(page.text) if "client" in form.fields)
    page = await ada.post(form)
    assert "You have not allowed any application" in page.text
    assert not await active(world, document["access_token"])
    assert not await active(world, document["refresh_token"])


async def test_all_consents_need_the_scope_for_it(world: RelayWorld, ada: Person) -> None:
    application = Application(scope=f"openid {VIEW_CONSENTS}")
    document = (await application.redeem(world, await application.code(ada))).json()
    bearer = {"Authorization": f"Bearer {document['access_token']}"}
    subject = (await world.http.get("/v2/oauth2/userinfo", headers=bearer)).json()["sub"]
    answer = await world.http.get(f"/v2/api/identities/{subject}/consents?all=true", headers=bearer)
    assert {item["scope_name"] for item in answer.json()["consents"]} == {"openid", VIEW_CONSENTS}


# --- services in between ---------------------------------------------------------------------------------


async def custom_scope(world: RelayWorld, needs: str, *, domains: str = "[]") -> tuple[str, str, str]:
    """A service of this relay with a scope of its own: its id, secret and scope."""
    service_id, secret = await world.client("Portal service")

    def work(connection: Any) -> None:
        values = {
            "id": "99999999-2222-4333-8444-555555555555",
            "client_id": service_id,
            "suffix": "search_and_move",
            "name": "Move",
            "description": "Move what you found",
            "advertised": False,
            "allows_refresh": True,
            "required_domains": domains,
            "created": 1.0,
        }
        connection.execute(insert(tables.scopes).values(values))
        connection.execute(
            insert(tables.scope_dependencies).values(
                scope_id=values["id"], needs=needs, optional=False, requires_refresh_token=False
            )
        )

    await world.store.write(work)
    return service_id, secret, f"https://auth.globus.org/scopes/{service_id}/search_and_move"


async def test_a_service_goes_on_in_the_persons_name_as_far_as_was_consented(world: RelayWorld, ada: Person) -> None:
    service_id, secret, scope = await custom_scope(world, TRANSFER_ALL)
    application = Application(scope=scope)
    page = await ada.get(application.url())
    assert "Move what you found" in page.text
    assert TRANSFER_ALL in page.text
    document = (await application.redeem(world, await application.code(ada))).json()
    assert document["resource_server"] == service_id
    form = {"grant_type": DEPENDENT_GRANT, "token": document["access_token"]}
    (given,) = (await world.http.post("/v2/oauth2/token", data=form, auth=(service_id, secret))).json()
    assert (given["resource_server"], given["scope"]) == ("transfer.api.globus.org", TRANSFER_ALL)
    wider = {**form, "scope": "openid"}
    answer = await world.http.post("/v2/oauth2/token", data=wider, auth=(service_id, secret))
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_scope")
    # Another service that got hold of the token gets nothing for it.
    other = await world.client("Other service")
    answer = await world.http.post("/v2/oauth2/token", data=form, auth=other)
    assert (answer.status_code, answer.json()["error"]) == (401, "invalid_grant")
    page = await ada.get("/account/applications")
    await ada.post(next(form for form in forms_of(page.text) if "client" in form.fields))
    assert not await active(world, given["access_token"])


async def test_a_scope_for_one_domain_is_refused_to_others(world: RelayWorld, ada: Person) -> None:
    _, _, scope = await custom_scope(world, "openid", domains='["elsewhere.example"]')
    application = Application(scope=scope)
    assert application.answer(await ada.get(application.url()))["error"] == "access_denied"
    # Nor does another way lead there: a code typed for a device, or a program in its own name.
    made = await begin(world, scope)
    (form,) = forms_of((await ada.get("/device")).text)
    page = await ada.post(form, user_code=made["user_code"])
    assert (page.status_code, "elsewhere.example" in page.text) == (403, True)
    program = await world.client("Program")
    grant = {"grant_type": "client_credentials", "scope": scope}
    answer = await world.http.post("/v2/oauth2/token", data=grant, auth=program)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_scope")


async def test_a_scope_for_one_domain_ends_with_the_identity_of_that_domain(world: RelayWorld) -> None:
    bob, other = await add_person(world, "bob"), await add_person(world, "bob@elsewhere.example")
    await world.store.write(lambda connection: linked.link(connection, bob.id, other.id, world.clock.now))
    person = Person(world)
    await person.arrive(bob)
    _, _, scope = await custom_scope(world, "openid", domains='["elsewhere.example"]')
    application = Application(scope=scope)
    document = (await application.redeem(world, await application.code(person))).json()
    assert (await refresh(world, application, document["refresh_token"])).status_code == 200
    await world.store.write(lambda connection: linked.unlink(connection, bob.id, other.id))
    answer = await refresh(world, application, document["refresh_token"])
    assert (answer.status_code, "elsewhere.example" in answer.json()["error_description"]) == (401, True)


# --- step-up ---------------------------------------------------------------------------------------------


async def test_required_identities_domains_and_age_ask_for_a_new_sign_in(world: RelayWorld) -> None:
    ada = await add_person(world, "ada")
    person, application = Person(world), Application(scope=f"openid profile {VIEW_IDENTITY_SET}")
    await person.arrive(ada)
    domain = world.settings.user_domain
    for demand in ({"session_required_identities": ada.id}, {"session_required_single_domain": domain}):
        assert "wants to act for you" in (await person.get(application.url(**demand))).text
    world.clock.now += 3601
    for demand in ({"max_age": "3600"}, {"session_required_mfa": "true"}):
        page = await person.get(application.url(**demand))
        assert "Sign in" in page.text
        assert "wants to act for you" not in page.text
    page = await person.get(application.url(max_age="3600", session_message="Data <b>of</b> patients"))
    assert "Data &lt;b&gt;of&lt;/b&gt; patients" in page.text
    page = await person.post(forms_of(page.text)[0], username="ada", password=PASSWORD)
    assert "wants to act for you" in page.text


async def test_the_session_behind_a_token_can_be_looked_at(world: RelayWorld, ada: Person) -> None:
    client_id, secret = await copy(world)
    application = Application(client_id=client_id)
    document = (await application.redeem(world, await application.code(ada), client_secret=secret)).json()
    form = {"token": document["access_token"], "include": "session_info"}
    info = (await world.http.post("/v2/oauth2/token/introspect", data=form, auth=(client_id, secret))).json()
    (shown,) = info["session_info"]["authentications"].values()
    assert shown["amr"] == ["pwd"]
    assert shown["auth_time"] == int(world.clock.now)
