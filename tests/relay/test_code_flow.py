"""The authorization code flow from the first link to the tokens, and what an attacker tries at each step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import jwt
import pytest
import trio

from relay.auth import clients
from relay.auth.scopes import AUTH_SERVER, TRANSFER_ALL, TRANSFER_SERVER
from relay.auth.tokens import find
from relay.pages.browser import destination_untrusted
from tests.relay.sign_in_world import PASSWORD, Application, Person, add_person, forms_of

if TYPE_CHECKING:
    import httpx

    from tests.relay.relay_world import RelayWorld


async def registered(world: RelayWorld, *redirect_uris: str) -> tuple[str, str]:
    """A web application of this relay with a secret."""
    secret, digest = clients.new_digest()
    client, _ = await world.store.write(
        lambda connection: clients.add_client(
            connection, name="Hub", now=world.clock.now, digest=digest, redirect_uris=redirect_uris
        )
    )
    return client.id, secret


# --- the way it should go --------------------------------------------------------------------------------


async def test_from_link_to_tokens(world: RelayWorld) -> None:
    person = await add_person(world, "ada")
    browser, application = Person(world), Application(scope=f"openid profile email {TRANSFER_ALL}")
    page = await browser.get(application.url(nonce="n-1"))
    assert page.status_code == 200
    assert "Globus SDK tutorial application" in page.text
    page = await browser.post(forms_of(page.text)[0], username="ada", password=PASSWORD)
    assert "wants to act for you" in page.text
    assert "transfer data in your name" in page.text
    answer = application.answer(await browser.post(forms_of(page.text)[0], decision="allow"))
    assert answer["state"] == application.state
    assert answer["iss"] == world.settings.public_url
    response = await application.redeem(world, answer["code"])
    assert response.status_code == 200, response.text
    document = response.json()
    assert document["resource_server"] == AUTH_SERVER
    assert [other["resource_server"] for other in document["other_tokens"]] == [TRANSFER_SERVER]
    assert all(token["refresh_token"] for token in (document, *document["other_tokens"]))
    key = (await world.http.get("/jwk.json")).json()["keys"][0]
    claims = jwt.decode(
        document["id_token"],
        jwt.PyJWK(key).key,
        algorithms=["RS512"],
        audience=application.client_id,
        issuer=world.settings.public_url,
        options={"verify_exp": False, "verify_iat": False},
    )
    assert claims["sub"] == person.id
    assert claims["nonce"] == "n-1"
    assert claims["preferred_username"] == person.username
    assert claims["auth_time"] == int(world.clock.now)
    bearer = {"Authorization": f"Bearer {document['access_token']}"}
    assert (await world.http.get("/v2/oauth2/userinfo", headers=bearer)).json()["sub"] == person.id


async def test_without_offline_there_are_no_refresh_tokens(world: RelayWorld, ada: Person) -> None:
    application = Application()
    document = (await application.redeem(world, await application.code(ada, access_type=None))).json()
    assert "refresh_token" not in document


async def test_a_public_client_refreshes_without_a_secret(world: RelayWorld, ada: Person) -> None:
    application = Application()
    document = (await application.redeem(world, await application.code(ada))).json()
    form = {
        "grant_type": "refresh_token",
        "refresh_token": document["refresh_token"],
        "client_id": application.client_id,
    }
    again = await world.http.post("/v2/oauth2/token", data=form)
    assert again.status_code == 200
    assert again.json()["refresh_token"] == document["refresh_token"]
    other = {**form, "client_id": "95fdeba8-fac2-42bd-a357-e068d82ff78e"}
    assert (await world.http.post("/v2/oauth2/token", data=other)).status_code == 401


async def test_refusing_is_told_to_the_application(world: RelayWorld, ada: Person) -> None:
    application = Application()
    page = await ada.get(application.url())
    answer = application.answer(await ada.post(forms_of(page.text)[0], decision="refuse"))
    assert answer["error"] == "access_denied"
    assert answer["state"] == application.state
    assert "code" not in answer


async def test_what_was_allowed_is_not_asked_again_of_a_registered_application(world: RelayWorld, ada: Person) -> None:
    client_id, secret = await registered(world, "https://hub.example.org/callback")
    application = Application(client_id=client_id, redirect_uri="https://hub.example.org/callback")
    first = await ada.get(application.url())
    assert "wants to act for you" in first.text
    await ada.post(forms_of(first.text)[0], decision="allow")
    second = await ada.get(application.url())
    code = application.answer(second)["code"]
    response = await application.redeem(world, code, client_secret=secret)
    assert response.status_code == 200
    wider = await ada.get(application.url(scope=f"openid {TRANSFER_ALL}"))
    assert "wants to act for you" in wider.text
    native = Application()
    await native.code(ada)
    assert "wants to act for you" in (await ada.get(native.url())).text


async def test_prompt_login_asks_again_and_once(world: RelayWorld, ada: Person) -> None:
    application = Application()
    page = await ada.get(application.url(prompt="login"))
    assert "Sign in again." in page.text
    world.clock.now += 5
    page = await ada.post(forms_of(page.text)[0], username="ada", password=PASSWORD)
    assert "wants to act for you" in page.text
    assert "code" in application.answer(await ada.post(forms_of(page.text)[0], decision="allow"))


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.75, 0.999])
async def test_prompt_login_takes_who_signs_in_at_once(world: RelayWorld, ada: Person, fraction: float) -> None:
    """The time of the request travels in whole seconds; it must never be later than the sign-in that follows."""
    world.clock.now = math.floor(world.clock.now) + 10 + fraction
    page = await ada.get(Application().url(prompt="login"))
    assert "Sign in again." in page.text
    world.clock.now += 0.001
    page = await ada.post(forms_of(page.text)[0], username="ada", password=PASSWORD)
    assert "wants to act for you" in page.text


async def test_prompt_none_never_shows_a_page(world: RelayWorld, ada: Person) -> None:
    application = Application()
    answer = application.answer(await Person(world).get(application.url(prompt="none")))
    assert answer["error"] == "login_required"
    answer = application.answer(await ada.get(application.url(prompt="none")))
    assert answer["error"] == "consent_required"


# --- redirect addresses ----------------------------------------------------------------------------------


WRONG_ADDRESSES = (
    "",
    "https://evil.example/",
    "http://evil.example/",
    "http://localhost.evil.example/",
    "http://localhost@evil.example/",
    "http://evil.example#@localhost/",
    "http://localhost:0/",
    "http://localhost:99999/",
    "http://localhost\\@evil.example/",
    "http://localhost:43210/#fragment",
    "https://localhost:43210/",
    "//localhost/",
    "javascript:alert(1)",
    "data:text/html,x",
    "http://[::1/",
    "http://localhost:80 80/",
)


async def test_nothing_is_ever_sent_to_an_address_that_is_not_the_applications(world: RelayWorld, ada: Person) -> None:
    for redirect_uri in WRONG_ADDRESSES:
        answer = await ada.request("GET", Application(redirect_uri=redirect_uri).url())
        assert answer.status_code == 400, redirect_uri
        assert "location" not in answer.headers
        assert "text/html" in answer.headers["content-type"]


REGISTERED = (
    ("https://hub.example.org/callback", True),
    ("https://hub.example.org/callback/", False),
    ("https://hub.example.org/callback?x=1", False),
    ("https://hub.example.org/callback/../evil", False),
    ("https://hub.example.org/CALLBACK", False),
    ("https://hub.example.org:443/callback", False),
    ("https://hub.example.org.evil.example/callback", False),
    ("http://127.0.0.1:8000/hub/oauth_callback", True),
    ("http://127.0.0.1:9999/hub/oauth_callback", True),
    ("http://127.0.0.1:9999/other", False),
    ("http://localhost:8000/hub/oauth_callback", False),
)


async def test_registered_addresses_count_exactly(world: RelayWorld, ada: Person) -> None:
    client_id, _ = await registered(
        world, "https://hub.example.org/callback", "http://127.0.0.1:8000/hub/oauth_callback"
    )
    for asked, right in REGISTERED:
        answer = await ada.request("GET", Application(client_id=client_id, redirect_uri=asked).url())
        assert answer.status_code == (200 if right else 400), asked


async def test_a_missing_slash_in_the_address_of_the_relay_is_explained(world: RelayWorld) -> None:
    wrong = f"{world.settings.public_url}v2/web/auth-code"
    answer = await Person(world).get(Application(redirect_uri=wrong).url())
    assert answer.status_code == 400
    assert "GLOBUS_SDK_SERVICE_URL_AUTH" in answer.text


async def test_unknown_clients_may_be_kept_out(world: RelayWorld, ada: Person) -> None:
    unknown = Application(client_id="11111111-2222-4333-8444-555555555555")
    page = await ada.get(unknown.url())
    assert "Nobody has registered this application here" in page.text
    assert (await ada.get(Application(client_id="nonsense").url())).status_code == 400


# --- requests that are wrong in other ways ---------------------------------------------------------------


MISTAKES: tuple[tuple[dict[str, str | None], str], ...] = (
    ({"response_type": "token"}, "unsupported_response_type"),
    ({"response_type": None}, "unsupported_response_type"),
    ({"code_challenge": None}, "invalid_request"),
    ({"code_challenge": "short"}, "invalid_request"),
    ({"code_challenge_method": "plain"}, "invalid_request"),
    ({"code_challenge_method": None}, "invalid_request"),
    ({"scope": ""}, "invalid_scope"),
    ({"scope": "a["}, "invalid_scope"),
    ({"scope": "nonsense"}, "invalid_scope"),
    ({"access_type": "forever"}, "invalid_request"),
    ({"prompt": "none login"}, "invalid_request"),
    ({"request_uri": "https://evil.example/"}, "invalid_request"),
    ({"response_mode": "fragment"}, "invalid_request"),
    ({"max_age": "-1"}, "invalid_request"),
    ({"session_required_policies": "11111111-2222-4333-8444-555555555555"}, "access_denied"),
    ({"session_required_single_domain": "elsewhere.example"}, "access_denied"),
    ({"session_required_identities": "bob@localhost"}, "access_denied"),
)


async def test_mistakes_are_told_to_the_application(world: RelayWorld, ada: Person) -> None:
    application = Application()
    for changes, error in MISTAKES:
        answer = application.answer(await ada.request("GET", application.url(**changes)))
        assert answer["error"] == error, changes
        assert answer["state"] == application.state
        assert answer["iss"] == world.settings.public_url


async def test_repeated_parameters_are_refused(world: RelayWorld, ada: Person) -> None:
    url = Application().url() + "&" + urlencode({"redirect_uri": "https://evil.example/"})
    answer = await ada.request("GET", url)
    assert answer.status_code == 400
    assert "location" not in answer.headers


# --- codes -----------------------------------------------------------------------------------------------


async def active(world: RelayWorld, token: str) -> bool:
    return await world.store.read(lambda connection: find(connection, token, world.clock.now)) is not None


async def test_a_code_used_twice_gives_nothing_and_ends_what_it_gave(world: RelayWorld, ada: Person) -> None:
    application = Application()
    code = await application.code(ada)
    document = (await application.redeem(world, code)).json()
    assert await active(world, document["access_token"])
    again = await application.redeem(world, code)
    assert (again.status_code, again.json()["error"]) == (401, "invalid_grant")
    assert not await active(world, document["access_token"])
    assert not await active(world, document["refresh_token"])


async def test_of_a_hundred_uses_at_once_one_wins(world: RelayWorld, ada: Person) -> None:
    application = Application()
    code = await application.code(ada)
    statuses: list[int] = []

    async def use() -> None:
        statuses.append((await application.redeem(world, code)).status_code)

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(use)
    assert sorted(statuses) == [200] + [401] * 99


BINDINGS: tuple[dict[str, str | None], ...] = (
    {"code_verifier": None},
    {"code_verifier": "x" * 43},
    {"code_verifier": ""},
    {"redirect_uri": "http://localhost:43211/"},
    {"redirect_uri": None},
    {"client_id": "95fdeba8-fac2-42bd-a357-e068d82ff78e"},
    {"code": "x" * 43},
    {"code": ""},
)


async def test_a_code_is_bound_to_everything_it_was_asked_with(world: RelayWorld, ada: Person) -> None:
    for changes in BINDINGS:
        application = Application()
        code = await application.code(ada)
        wrong = await application.redeem(world, **{"code": code, **changes})
        assert (wrong.status_code, wrong.json()["error"]) == (401, "invalid_grant"), changes
        if not {"client_id", "code"} & set(changes):
            # Whoever showed it with the wrong verifier had stolen it.
            assert (await application.redeem(world, code)).status_code == 401


async def test_a_code_expires(world: RelayWorld, ada: Person) -> None:
    application = Application()
    code = await application.code(ada)
    world.clock.now += world.settings.sign_in.code_life
    assert (await application.redeem(world, code)).status_code == 401


async def test_a_verifier_nobody_asked_for_is_refused(world: RelayWorld, ada: Person) -> None:
    """An attacker strips the challenge from the request, hoping that the verifier is then not looked at."""
    client_id, secret = await registered(world, "https://hub.example.org/callback")
    application = Application(client_id=client_id, redirect_uri="https://hub.example.org/callback")
    code = await application.code(ada, code_challenge=None, code_challenge_method=None)
    assert (await application.redeem(world, code, client_secret=secret)).status_code == 401


async def test_a_confidential_client_must_show_its_secret(world: RelayWorld, ada: Person) -> None:
    client_id, _ = await registered(world, "https://hub.example.org/callback")
    application = Application(client_id=client_id, redirect_uri="https://hub.example.org/callback")
    code = await application.code(ada)
    for secret in (None, "wrong"):
        answer = await application.redeem(world, code, client_secret=secret)
        assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")


async def test_a_code_given_to_one_application_is_worthless_to_another(world: RelayWorld, ada: Person) -> None:
    mine, other = Application(), Application(client_id="b1629e83-00e8-4036-a3bd-8a21dc2f9dce")
    code = await mine.code(ada)
    assert (await other.redeem(world, code)).status_code == 401
    assert (await mine.redeem(world, code)).status_code == 200


# --- forms from elsewhere --------------------------------------------------------------------------------


FOREIGN: tuple[dict[str, str], ...] = (
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
)


async def test_a_form_sent_from_elsewhere_is_refused(world: RelayWorld, ada: Person) -> None:
    page = await ada.get(Application().url())
    form = forms_of(page.text)[0]
    for headers in FOREIGN:
        answer = await ada.request("POST", form.action, {**form.fields, "decision": "allow"}, **headers)
        assert answer.status_code == 403, headers


async def test_consent_cannot_be_given_with_a_guessed_or_foreign_form_token(world: RelayWorld, ada: Person) -> None:
    await add_person(world, "mallory")
    mallory = Person(world)
    await mallory.sign_in("mallory")
    page = await ada.get(Application().url())
    form = forms_of(page.text)[0]
    foreign = forms_of((await mallory.get(Application().url())).text)[0].fields["form_token"]
    for token in ("", "x", foreign, form.fields["form_token"][:-1]):
        answer = await ada.post(form, decision="allow", form_token=token)
        assert answer.status_code == 403


async def test_nobody_is_signed_in_by_a_page_elsewhere(world: RelayWorld) -> None:
    """Login CSRF: an attacker has the victim's browser sign in as the attacker."""
    await add_person(world, "mallory")
    mallory, victim = Person(world), Person(world)
    form = forms_of((await mallory.get("/sign-in")).text)[0]
    filled = {**form.fields, "username": "mallory", "password": PASSWORD}
    for _ in range(2):
        answer = await victim.request("POST", "/sign-in", filled)
        assert answer.status_code == 403
        # Even when the victim has a visit of their own.
        await victim.get("/sign-in")
    assert "__Host-towpath-session" not in victim.cookies


PLACES = (
    "https://evil.example/",
    "//evil.example/",
    "/\\evil.example/",
    "/\t/evil.example/",
    "javascript:alert(1)",
    "/v2/web/logout",
    "/account/../v2/web/logout",
    "/account\r\nSet-Cookie: x=y",
    "/accounts",
    "",
)


async def test_the_sign_in_page_leads_nowhere_else(world: RelayWorld) -> None:
    for place in PLACES:
        assert destination_untrusted(place) == "/account", place
    await add_person(world, "ada")
    person = Person(world)
    page = await person.get("/sign-in?" + urlencode({"next": "//evil.example/"}))
    form = forms_of(page.text)[0]
    filled = {**form.fields, "next": "https://evil.example/", "username": "ada", "password": PASSWORD}
    answer = await person.request("POST", form.action, filled)
    assert answer.status_code == 303
    assert answer.headers["location"] == "/account"


async def test_pages_cannot_be_framed_and_run_nothing(world: RelayWorld, ada: Person) -> None:
    for url in (Application().url(), "/sign-in", "/v2/web/auth-code?code=abc"):
        answer: httpx.Response = await ada.get(url)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["cache-control"] == "no-store"
        assert "<script>" not in answer.text


async def test_what_an_application_says_of_itself_is_only_text(world: RelayWorld, ada: Person) -> None:
    nasty = "<script>alert(1)</script>\"'><img src=x>"
    page = await ada.get(Application().url(session_message=nasty, prefill_named_grant=nasty, prompt="login"))
    assert "<script>alert" not in page.text
    assert "<img" not in page.text
    assert "&lt;script&gt;" in page.text
    shown = await ada.get("/v2/web/auth-code?" + urlencode({"code": nasty}))
    assert "<script>alert" not in shown.text
