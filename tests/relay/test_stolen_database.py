"""Whoever has a copy of the database can use nothing in it: every value of every table is tried at every door."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from sqlalchemy import Connection, insert, select

from relay.auth import administrators, linked, one_time_links, passwords, service_tokens
from relay.auth.clients import SecretChecker
from relay.auth.guesses import GuessLimit
from relay.auth.upstream_accounts import begin_visit
from relay.pages.browser import SESSION_COOKIE
from relay.store import sign_in_tables
from relay.store.metadata import metadata
from tests.canary.sitecustomize import MARK
from tests.relay.sign_in_world import PASSWORD, Application, Person, add_person, forms_of
from tests.relay.transfer_world import TransferWorld, open_world, transfer_document

# Of a visit to a provider that is under way: worth nothing without the provider's code and the relay's secret there.
_UNDER_WAY = {("upstream_visits", "nonce"), ("upstream_visits", "verifier")}
# Longer values are documents; they are cut at what cannot be part of a secret.
_WORD = re.compile(r"[A-Za-z0-9._~+/=$-]{8,}")
BACK = "https://hub.example.org/cb"


@pytest.fixture
async def relay(world: Any) -> AsyncIterator[TransferWorld]:
    async with open_world(world, run=False) as made:
        # Here the doors are tried, not how long they stay shut after the tenth try.
        world.relay.services.guesses.__init__(10**9, 1.0)
        world.relay.services.crowd_guesses.__init__(10**9, 1.0)
        yield made


async def fill(relay: TransferWorld) -> list[str]:
    """Something in every table; returns all secrets that were given out."""
    world = relay.base
    ada, bob = await add_person(world, "ada"), await add_person(world, "bob")
    person, application = Person(world), Application(scope="openid")
    await person.sign_in("ada")
    code = await application.code(person)
    tokens = (await application.redeem(world, await application.code(person))).json()
    asked = {"client_id": application.client_id, "scope": "openid"}
    device = (await world.http.post("/v2/oauth2/device_authorization", data=asked)).json()
    page = await person.get("/developers")
    form = next(form for form in forms_of(page.text) if form.action == "/developers")
    page = await person.post(form, name="Hub", kind="web", redirect_uris=BACK, contact_email="ada@example.org")
    client_id, client_secret = re.findall(r'<code class="large">([^<]*)</code>', page.text)
    given: list[str] = [client_secret, code, device["device_code"], device["user_code"], person.cookies[SESSION_COOKIE]]
    given += [tokens["access_token"], tokens["refresh_token"], PASSWORD]

    def work(connection: Connection) -> list[str]:
        now = world.clock.now
        administrators.make_administrator(connection, ada.id, now)
        linked.link(connection, ada.id, bob.id, now)
        state, _ = begin_visit(connection, "orcid", "0" * 64, "/account", None, now)
        for table, values in _rows(client_id, ada.id, now):
            connection.execute(insert(table).values(**values))
        return [
            state,
            one_time_links.make(connection, "password", ada.id, now),
            one_time_links.make(connection, "administrator", None, now),
            service_tokens.make(connection, ada.id, "beamline", life=86400.0, now=now),
        ]

    given += await world.store.write(work)
    limit: GuessLimit = world.relay.services.guesses
    limit.failed(["192.0.2.1 ada"], world.clock.now)
    await world.relay.guess_memory.flush(world.clock.now)
    alice = await relay.person("alice")
    first, _ = await relay.collection(alice, "Disk")
    second, _ = await relay.collection(alice, "Other")
    role = {"DATA_TYPE": "role", "principal": ada.id, "role": "activity_monitor"}
    await alice.post(f"/endpoint/{first}/role", role, status=201)
    await alice.post("/transfer", transfer_document(first, second), status=202)
    await alice.post("/bookmark", {"DATA_TYPE": "bookmark", "name": "b", "endpoint_id": first, "path": "/"}, status=201)
    return [*given, alice.headers["Authorization"].removeprefix("Bearer ")]


def _rows(client_id: str, identity_id: str, now: float) -> Iterable[tuple[Any, dict[str, Any]]]:
    """Rows that no short way through the relay makes."""
    yield (
        sign_in_tables.passkeys,
        {
            "id": "cGFzc2tleQ",
            "identity_id": identity_id,
            "public_key": b"\x01" * 60,
            "sign_count": 1,
            "name": "k",
            "created": now,
        },
    )
    yield (
        sign_in_tables.upstream_accounts,
        {"issuer": "https://orcid.org", "subject": "0000-0001", "identity_id": identity_id, "created": now},
    )
    scope = {
        "id": "99999999-2222-4333-8444-555555555555",
        "client_id": client_id,
        "suffix": "move",
        "name": "Move",
        "description": "Move what you found",
        "advertised": False,
        "allows_refresh": True,
        "required_domains": "[]",
        "created": now,
    }
    yield sign_in_tables.scopes, scope
    needs = {"scope_id": scope["id"], "needs": "openid", "optional": False, "requires_refresh_token": False}
    yield sign_in_tables.scope_dependencies, needs


def contents(connection: Connection) -> dict[tuple[str, str], set[str]]:
    """All values by table and column, as text."""
    found: dict[tuple[str, str], set[str]] = {}
    for table in metadata.sorted_tables:
        for row in connection.execute(select(table)):
            for column, value in row._mapping.items():
                text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
                if value is not None and not isinstance(value, bool | float | int):
                    found.setdefault((table.name, str(column)), set()).add(text)
    return found


# Tables that stay empty here, because no secret can get there.
_EMPTY = {"policies", "access_rules", "task_events"}


async def test_no_value_of_the_database_opens_anything(relay: TransferWorld) -> None:
    world = relay.base
    given = await fill(relay)
    values = await world.store.read(contents)
    filled = {table for table, _ in values}
    assert {table.name for table in metadata.sorted_tables} - filled <= _EMPTY
    # Nothing that was given out, and no random secret at all, stands there in the clear.
    told = [(place, secret) for place, texts in values.items() for secret in given for text in texts if secret in text]
    assert told == []
    assert {place for place, texts in values.items() if any(MARK in text for text in texts)} == _UNDER_WAY
    words = sorted({word for texts in values.values() for text in texts for word in _WORD.findall(text)})
    assert len(words) > 100
    opened = [word for word in words if await _opens(world, word)]
    assert opened == []
    # The test can fail: the same doors open to the secrets themselves.
    assert [secret for secret in given if await _opens(world, secret)] != []


async def _opens(world: Any, word: str) -> bool:
    """Whether a word is taken for a token, a cookie, a code, a key or a link."""
    http, bearer = world.http, {"Authorization": f"Bearer {word}"}
    if (await http.get("/v0.10/task_list", headers=bearer)).status_code != 401:
        return True
    if (await http.get("/v2/oauth2/userinfo", headers=bearer)).status_code != 401:
        return True
    grants = (
        {"grant_type": "refresh_token", "refresh_token": word},
        {"grant_type": "authorization_code", "code": word, "redirect_uri": Application.redirect_uri},
        {"grant_type": "urn:ietf:params:oauth:grant-type:device_code", "device_code": word},
    )
    for form in grants:
        answer = await http.post("/v2/oauth2/token", data={**form, "client_id": Application.client_id})
        if answer.status_code == 200 or answer.json().get("error") in ("authorization_pending", "slow_down"):
            return True
    if (await http.get(f"/welcome?key={word}")).status_code == 200:
        return True
    page = await Person(world, {SESSION_COOKIE: word}).get("/account")
    return "Your account" in page.text


async def test_no_digest_is_a_secret_or_a_password(relay: TransferWorld) -> None:
    world = relay.base
    await fill(relay)
    values = await world.store.read(contents)
    digests = values["client_secrets", "digest"] | values["passwords", "digest"] | values["setup_keys", "digest"]
    words = sorted({word for digest in digests for word in (digest, digest.rpartition("$")[2])})
    checker = SecretChecker(world.store)
    (hub,) = values["registrations", "client_id"]
    identity = sorted(values["passwords", "identity_id"])[0]
    checks = passwords.PasswordChecker(world.store)
    for word in words:
        assert await checker.check(hub, word) is None
        assert not await checks.check(identity, word)
    assert await checks.check(identity, PASSWORD)
