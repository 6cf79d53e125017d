"""Signing in at the relay's pages: passwords, guessing, sessions, one-time links, the account pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
from sqlalchemy import select

from relay.auth import one_time_links, passwords
from relay.auth.administrators import is_administrator, make_administrator
from relay.auth.identities import select_by_usernames
from relay.pages.browser import FRESH, SESSION_COOKIE
from relay.pages.user_agents import in_words
from relay.store import sign_in_tables as tables
from relay.store.auth_tables import identities
from tests.relay.sign_in_world import PASSWORD, Application, Person, add_person, forms_of, person_at

if TYPE_CHECKING:
    from tests.relay.relay_world import RelayWorld


async def test_the_right_password_signs_in_and_the_cookie_is_new(world: RelayWorld) -> None:
    ada = await add_person(world)
    person = Person(world)
    page = await person.sign_in()
    assert page.status_code == 200
    assert ada.username in page.text
    first = person.cookies[SESSION_COOKIE]
    # Signing in again in the same session replaces the cookie: a fixed or stolen one is worth nothing then.
    await person.sign_in()
    assert person.cookies[SESSION_COOKIE] != first
    old = Person(world, {SESSION_COOKIE: first})
    assert "Password" in (await old.get("/account")).text


async def test_the_address_alone_leads_people_in_and_says_how_to_begin(world: RelayWorld) -> None:
    await add_person(world)
    person = Person(world)
    front = await person.get("/")
    assert "Sign in" in front.text
    await person.sign_in()
    page = (await person.get("/")).text
    assert f"towpath login --relay {world.settings.public_url}<" in page
    assert f'towpath setup --relay {world.settings.public_url} <span class="whole">--root' in page


async def test_a_mistyped_address_is_told_to_people_as_a_page_and_to_programs_in_json(world: RelayWorld) -> None:
    browsers = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
    for path in ("/acount", "/account/", "/v0.10/nothing"):
        page = await Person(world).get(path, accept=browsers)
        assert (page.status_code, "There is nothing here" in page.text) == (404, True)
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        for accept in ("*/*", "application/json"):
            assert (await Person(world).get(path, accept=accept)).json()["code"] == "NotFound"


async def test_a_wrong_name_and_a_wrong_password_look_the_same(world: RelayWorld) -> None:
    await add_person(world)
    answers = []
    for name, password in (
        ("ada", "wrong wrong"),
        ("nobody", PASSWORD),
        ("ada@elsewhere.example", PASSWORD),
        ("ada", ""),
    ):
        person = Person(world)
        answer = await person.sign_in(name, password)
        assert answer.status_code == 401
        assert SESSION_COOKIE not in person.cookies
        answers.append(answer.text.count("The username or the password is wrong."))
    assert answers == [1] * 4


async def test_client_identities_and_closed_accounts_have_no_password(world: RelayWorld) -> None:
    ada = await add_person(world)
    person = Person(world)
    await person.sign_in()
    closing = identities.update().where(identities.c.id == ada.id).values(status="closed")
    await world.store.write(lambda connection: connection.execute(closing).rowcount)
    assert "Sign in" in (await person.get("/account")).text
    assert (await Person(world).sign_in()).status_code == 401
    client_id, secret = await world.client()
    assert (await Person(world).sign_in(f"{client_id}@clients.auth.globus.org", secret)).status_code == 401


async def test_guessing_is_stopped_and_others_go_on(world: RelayWorld) -> None:
    await add_person(world, "ada")
    await add_person(world, "bob")
    services, address = world.relay.services, "127.0.0.1"
    for _ in range(world.settings.sign_in.failures):
        services.guesses.failed([f"{address} ada@{world.settings.user_domain}"], world.clock.now)
    answer = await Person(world).sign_in("ada")
    assert answer.status_code == 429
    assert 0 < int(answer.headers["retry-after"]) <= world.settings.sign_in.failures_window
    assert (await Person(world).sign_in("bob")).status_code == 200
    world.clock.now += world.settings.sign_in.failures_window
    assert (await Person(world).sign_in("ada")).status_code == 200


async def test_guessing_from_many_addresses_locks_the_account_for_a_while(world: RelayWorld) -> None:
    ada = await add_person(world, "ada")
    for _ in range(world.settings.sign_in.failures * 10):
        world.relay.services.crowd_guesses.failed([f"account {ada.username}"], world.clock.now)
    assert (await Person(world).sign_in("ada")).status_code == 429


async def test_wrong_passwords_count_as_guesses(world: RelayWorld) -> None:
    await add_person(world, "ada")
    before = world.relay.services.guesses.statistics().failures
    await Person(world).sign_in("ada", "wrong wrong")
    assert world.relay.services.guesses.statistics().failures == before + 1


@pytest.mark.parametrize("password", ["short", "aaaaaaaaaaaa", "password123", "ada1lovelace", "x" * 201, ""])
def test_weak_passwords_are_refused(password: str) -> None:
    with pytest.raises(passwords.WeakPassword):
        passwords.check_strength(password, "ada1love@example.org")


def test_digests_are_argon2id_and_salted() -> None:
    first, second = passwords.digest_of(PASSWORD), passwords.digest_of(PASSWORD)
    assert first.startswith("$argon2id$")
    assert first != second
    assert PASSWORD not in first


async def test_signing_out_ends_the_session_for_good(world: RelayWorld) -> None:
    person = Person(world)
    await person.arrive(await add_person(world))
    cookie = person.cookies[SESSION_COOKIE]
    form = next(form for form in forms_of((await person.get("/account")).text) if form.action == "/sign-out")
    assert (await person.request("POST", "/sign-out", {"form_token": "x"})).status_code == 403
    await person.post(form)
    assert SESSION_COOKIE not in person.cookies
    thief = Person(world, {SESSION_COOKIE: cookie})
    assert "Your account" not in (await thief.get("/account")).text


async def test_a_browser_session_ends(world: RelayWorld) -> None:
    person = Person(world)
    await person.arrive(await add_person(world))
    world.clock.now += 86400.0
    assert "Your account" not in (await person.get("/account")).text


async def test_sessions_are_seen_and_ended(world: RelayWorld) -> None:
    ada = await add_person(world)
    here, there = Person(world), Person(world)
    await here.arrive(ada)
    await there.arrive(ada)
    page = await here.get("/account/sessions")
    assert "192.0.2.1" in page.text
    form = next(form for form in forms_of(page.text) if form.fields.get("session", "others") != "others")
    await here.post(form)
    assert "Your account" in (await here.get("/account")).text
    assert "Your account" not in (await there.get("/account")).text


async def test_nobody_ends_the_sessions_of_others(world: RelayWorld) -> None:
    ada, mallory = Person(world), Person(world)
    await ada.arrive(await add_person(world, "ada"))
    await mallory.arrive(await add_person(world, "mallory"))
    ids = select(tables.browser_sessions.c.id)
    every = await world.store.read(lambda connection: connection.execute(ids).scalars().all())
    form = next(form for form in forms_of((await mallory.get("/account/sessions")).text) if "session" in form.fields)
    for session_id in every:
        await mallory.post(form, session=session_id)
    assert "Your account" in (await ada.get("/account")).text


async def test_changing_the_password_needs_the_old_one_and_ends_other_sessions(world: RelayWorld) -> None:
    ada = await add_person(world)
    here, there = Person(world), Person(world)
    await here.arrive(ada)
    await there.arrive(ada)
    form = next(form for form in forms_of((await here.get("/account")).text) if form.action == "/account/password")
    wanted = {"password": "another long one", "again": "another long one"}
    assert (await here.post(form, current="wrong wrong", **wanted)).status_code == 403
    assert (await here.post(form, current=PASSWORD, password="short", again="short")).status_code == 400
    assert (await here.post(form, current=PASSWORD, password="another long one", again="x")).status_code == 400
    assert "is changed" in (await here.post(form, current=PASSWORD, **wanted)).text
    assert "Your account" not in (await there.get("/account")).text
    assert (await Person(world).sign_in()).status_code == 401
    assert (await Person(world).sign_in(password="another long one")).status_code == 200


async def test_an_old_session_must_prove_itself_before_it_changes_how_one_signs_in(world: RelayWorld) -> None:
    person = Person(world)
    await person.arrive(await add_person(world))
    form = next(form for form in forms_of((await person.get("/account")).text) if form.action == "/account/password")
    world.clock.now += FRESH + 1
    answer = await person.post(form, current=PASSWORD, password="another long one", again="another long one")
    assert "Sign in again to change this" in answer.text
    assert (await Person(world).sign_in()).status_code == 200


# --- one-time links --------------------------------------------------------------------------------------


async def link(world: RelayWorld, purpose: Any, identity_id: str | None = None) -> str:
    return await world.store.write(lambda c: one_time_links.make(c, purpose, identity_id, world.clock.now))


async def test_the_first_administrator_comes_by_a_link(world: RelayWorld) -> None:
    key = await link(world, "administrator")
    person = Person(world)
    (form,) = forms_of((await person.get(f"/welcome?key={key}")).text)
    chosen = {"username": "Root", "name": "The Operator", "password": PASSWORD, "again": PASSWORD}
    page = await person.post(form, **chosen)
    assert "You administer this relay." in page.text
    name = f"root@{world.settings.user_domain}"
    made = (await world.store.read(lambda c: select_by_usernames(c, [name])))[name]
    assert await world.store.read(lambda c: is_administrator(c, made.id))
    assert (await Person(world).get(f"/welcome?key={key}")).status_code == 404


async def test_a_first_administrators_link_is_worth_nothing_beside_another(world: RelayWorld) -> None:
    key, ada, person = await link(world, "administrator"), await add_person(world), Person(world)
    (form,) = forms_of((await person.get(f"/welcome?key={key}")).text)
    await world.store.write(lambda c: make_administrator(c, ada.id, world.clock.now))
    answer = await person.post(form, username="root", password=PASSWORD, again=PASSWORD)
    assert (answer.status_code, "does not work" in answer.text) == (404, True)
    assert not await world.store.read(lambda c: select_by_usernames(c, [f"root@{world.settings.user_domain}"]))


async def test_wrong_links_keep_nobody_at_another_address_out(world: RelayWorld) -> None:
    key, services = await link(world, "administrator"), world.relay.services
    services.guesses.__init__(2, 60.0)  # type: ignore[misc]
    services.crowd_guesses.__init__(3, 60.0)  # type: ignore[misc]
    for number in range(4):
        async with person_at(world, f"203.0.113.{number}") as stranger:
            answers = [await stranger.get("/welcome?key=wrong") for _ in range(3)]
            assert [answer.status_code for answer in answers] == [404, 404, 429]
    async with person_at(world, "203.0.113.9") as person:
        assert (await person.get(f"/welcome?key={key}")).status_code == 200


async def test_of_a_hundred_uses_of_a_link_at_once_one_wins(world: RelayWorld) -> None:
    """The uses themselves, at the place that decides: each in a transaction of its own."""
    key = await link(world, "administrator")
    won: list[bool] = []

    async def use() -> None:
        found = await world.store.write(lambda c: one_time_links.use(c, key, world.clock.now))
        won.append(found is not None)

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(use)
    assert sorted(won) == [False] * 99 + [True]


async def test_the_administrators_link_does_not_take_over_an_account(world: RelayWorld) -> None:
    await add_person(world, "ada")
    key = await link(world, "administrator")
    person = Person(world)
    (form,) = forms_of((await person.get(f"/welcome?key={key}")).text)
    for name in ("ada", "ada@elsewhere.example", "a b", ""):
        answer = await person.post(form, username=name, password="another long one", again="another long one")
        assert answer.status_code in (400, 409), name
    # None of that used the link up.
    assert (await person.get(f"/welcome?key={key}")).status_code == 200


async def test_a_link_sets_a_password_once(world: RelayWorld) -> None:
    ada = await add_person(world)
    await link(world, "password", ada.id)
    # A newer link replaces the one before.
    key = await link(world, "password", ada.id)
    person = Person(world)
    (form,) = forms_of((await person.get(f"/welcome?key={key}")).text)
    await person.post(form, password="another long one", again="another long one")
    assert (await Person(world).sign_in(password="another long one")).status_code == 200
    assert (await person.get(f"/welcome?key={key}")).status_code == 404
    late = await link(world, "password", ada.id)
    world.clock.now += one_time_links.LIFE
    assert (await person.get(f"/welcome?key={late}")).status_code == 404


async def test_nothing_that_lets_somebody_in_is_in_the_database(world: RelayWorld) -> None:
    ada = await add_person(world)
    key = await link(world, "password", ada.id)
    person, application = Person(world), Application()
    await person.sign_in()
    code = await application.code(person)
    document = (await application.redeem(world, code)).json()
    device = (
        await world.http.post(
            "/v2/oauth2/device_authorization", data={"client_id": application.client_id, "scope": "openid"}
        )
    ).json()
    secrets = {
        "cookie": person.cookies[SESSION_COOKIE],
        "password": PASSWORD,
        "link": key,
        "code": code,
        "access": document["access_token"],
        "refresh": document["refresh_token"],
        "device": device["device_code"],
        "user code": device["user_code"],
        "bare user code": device["user_code"].replace("-", ""),
    }
    content = b"".join(path.read_bytes() for path in world.settings.directory_path.rglob("relay.sqlite*"))
    # It is the database that was looked at.
    assert ada.id.encode() in content
    for what, secret in secrets.items():
        assert secret.encode() not in content, what


async def test_a_browser_that_nobody_uses_is_signed_out(world: RelayWorld) -> None:
    await add_person(world, "ada")
    person = Person(world)
    await person.sign_in("ada")
    life, idle = world.settings.sign_in.session_life, world.settings.sign_in.session_idle
    begun = world.clock.now
    # In use it goes on, but not beyond its life.
    while world.clock.now + idle * 0.9 < begun + life:
        world.clock.now += idle * 0.9
        assert "Your account" in (await person.get("/account")).text
    world.clock.now = begun + life - 10
    assert "Your account" in (await person.get("/account")).text
    world.clock.now = begun + life
    assert "Your account" not in (await person.get("/account")).text
    await person.sign_in("ada")
    world.clock.now += idle
    assert "Your account" not in (await person.get("/account")).text


@pytest.mark.parametrize("credential", ["", "7", "[]", "{", '{"rawId": 7}', "[" * 5000, '{"rawId":' * 1500])
async def test_nonsense_for_a_passkey_is_refused_in_words(world: RelayWorld, credential: str) -> None:
    person = Person(world)
    page = await person.get("/sign-in")
    form = next(form for form in forms_of(page.text) if form.action == "/sign-in/passkey")
    offer = (await person.request("POST", "/sign-in/passkey/offer", form.fields)).json()
    answer = await person.post(form, credential=credential, mark=offer["mark"])
    assert (answer.status_code, "not known here" in answer.text) == (401, True)
    ada = Person(world)
    await ada.arrive(await add_person(world, "ada"))
    page = await ada.get("/account")
    form = next(form for form in forms_of(page.text) if form.action == "/account/passkeys")
    offer = (await ada.request("POST", "/account/passkeys/offer", form.fields)).json()
    answer = await ada.post(form, credential=credential, mark=offer["mark"])
    assert (answer.status_code, "cannot be read" in answer.text) == (409, True)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0", "Firefox on Linux"),
        (
            "Mozilla/5.0 (Windows NT 10.0) AppleWebKit/537.36 (KHTML) Chrome/140 Safari/537.36 Edg/140",
            "Edge on Windows",
        ),
        ("Mozilla/5.0 (Linux; Android 15) AppleWebKit/537.36 Chrome/140 Mobile Safari/537.36", "Chrome on Android"),
        ("Mozilla/5.0 (iPhone; CPU iPhone OS 18_0) AppleWebKit/605 Version/18 Safari/604", "Safari on iPhone"),
        ("Mozilla/5.0 Firefox/1", "Firefox"),
        ("Mozilla/9 (something else)", "Mozilla/9 (something else)"),
        ("towpath on beamline", "towpath on beamline"),
        ("", "an unknown program"),
    ],
)
def test_browsers_are_told_apart_in_words(said: str, words: str) -> None:
    assert in_words(said) == words
