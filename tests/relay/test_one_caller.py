"""What one caller who has not shown who they are may take: guesses, rows, memory."""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from typing import Any

import httpx
import pytest
import trio

from protocol.places import neighbourhood
from relay.api.developer import MAX_BODY
from relay.auth import clients
from relay.auth.guesses import GuessLimit
from relay.auth.passwords import PasswordChecker
from relay.auth.public_clients import TOWPATH_CLI
from tests.relay.relay_world import RelayWorld
from tests.relay.sign_in_world import PASSWORD, Person, add_person, forms_of, person_at


@pytest.mark.parametrize(
    ("address", "counted_as"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2::1", "2001:db8:1::/56"),
        ("2001:db8:1:ff:ffff::9", "2001:db8:1::/56"),
        ("2001:db8:1:100::1", "2001:db8:1:100::/56"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::/56"),
        ("unknown", "unknown"),
    ],
)
def test_as_whom_an_address_is_counted(address: str, counted_as: str) -> None:
    assert neighbourhood(address) == counted_as


async def test_who_has_a_whole_network_of_addresses_guesses_no_more_often(world: RelayWorld) -> None:
    client_id, secret = await world.client()
    form = {"grant_type": "client_credentials", "scope": "openid"}

    async def tries(address: str, shown: str) -> int:
        transport = httpx.ASGITransport(app=world.relay.app, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url=world.settings.public_url) as http:
            return (await http.post("/v2/oauth2/token", data=form, auth=(client_id, shown))).status_code

    for n in range(world.settings.sign_in.failures):
        assert await tries(f"2001:db8:7:{n}::{n + 1}", "wrong") == 401
    assert await tries("2001:db8:7:42::42", "wrong") == 429
    assert await tries("2001:db8:8::1", secret) == 200


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at a password takes a turn of the loop, not a tenth of a second."""

    async def check(_checker: PasswordChecker, identity_id: str | None, password: str) -> bool:
        await trio.sleep(0.001)
        return identity_id is not None and password == PASSWORD

    monkeypatch.setattr(PasswordChecker, "check", check)


@pytest.mark.usefixtures("quick")
async def test_of_guesses_that_come_at_once_no_more_are_looked_at_than_one_after_the_other(world: RelayWorld) -> None:
    await add_person(world, "ada")
    allowed, answers = world.settings.sign_in.failures, list[int]()

    async def guess(n: int) -> None:
        async with person_at(world, "127.0.0.1") as person:
            answers.append((await person.sign_in("ada", f"a guess, number {n}")).status_code)

    async with trio.open_nursery() as nursery:
        for n in range(3 * allowed):
            nursery.start_soon(guess, n)
    assert sorted(answers) == [401] * allowed + [429] * 2 * allowed
    assert world.relay.services.guesses.statistics().failures == allowed


@pytest.mark.usefixtures("quick")
async def test_who_knows_the_password_is_let_in_as_often_as_they_like(world: RelayWorld) -> None:
    await add_person(world, "ada")
    for _ in range(world.settings.sign_in.failures + 2):
        assert (await Person(world).sign_in("ada")).status_code == 200
    assert world.relay.services.guesses.statistics().failures == 0


def test_what_was_right_is_not_counted() -> None:
    limit = GuessLimit(2, 60.0)
    limit.failed(["a", "b"], 1.0)
    limit.failed(["a"], 1.0)
    limit.forgive(["a"], 1.0)
    assert limit.retry_after(["a"], 2.0) == 0
    limit.failed(["a"], 2.0)
    assert limit.retry_after(["a"], 2.0) == 59.0
    assert limit.statistics().failures == 2


@pytest.mark.parametrize("path", ["/v2/api/clients", "/v2/oauth2/token", "/towpath/v1/enrol"])
async def test_what_nobody_has_asked_for_is_not_taken_into_memory(world: RelayWorld, path: str) -> None:
    """The largest submission of a task is far larger than anything that strangers have to say."""
    chunk, taken = b" " * 65536, 0
    answers: list[Any] = []

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += len(chunk)
        return {"type": "http.request", "body": chunk, "more_body": taken < 64 * len(chunk)}

    async def send(message: MutableMapping[str, Any]) -> None:
        answers.append(message.get("status"))

    kind = b"application/x-www-form-urlencoded" if path.endswith("token") else b"application/json"
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"host", b"relay"), (b"content-type", kind)],
        "client": ("192.0.2.1", 1),
    }
    await world.relay.app(scope, receive, send)
    assert answers[0] == 413
    assert taken <= MAX_BODY + 2 * len(chunk)


async def test_wrong_secrets_of_one_caller_hold_up_nobody_else(
    world: RelayWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs memory and a processor for a while, and they come hundreds at once."""
    client_id, secret = await world.client()
    looked_at, many, answers = list[str](), 60, list[int]()

    def look(shown: str, _digests: object) -> bool:
        looked_at.append(shown)
        time.sleep(0.005)
        return shown == secret

    monkeypatch.setattr(clients, "_matches_any", look)
    form = {"grant_type": "client_credentials", "scope": "openid"}

    async def ask(address: str, shown: str) -> int:
        transport = httpx.ASGITransport(app=world.relay.app, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url=world.settings.public_url) as http:
            return (await http.post("/v2/oauth2/token", data=form, auth=(client_id, shown))).status_code

    async def attack() -> None:
        answers.append(await ask("192.0.2.66", "wrong"))

    async with trio.open_nursery() as nursery:
        for _ in range(many):
            nursery.start_soon(attack)
        while not looked_at:
            await trio.sleep(0.001)
        assert await ask("192.0.2.7", secret) == 200
        assert len(answers) < 10
    # Nor are those that waited behind as many wrong ones looked at.
    assert looked_at.count("wrong") <= world.settings.sign_in.failures + 1
    assert set(answers) == {401, 429}
    assert not world.relay.services.secrets.turns._callers


async def test_device_codes_are_no_more_often_guessed_at_once(world: RelayWorld) -> None:
    person = Person(world)
    await person.arrive(await add_person(world, "ada"))
    page = (await person.get("/device")).text
    token = next(form for form in forms_of(page) if form.action == "/device").fields["form_token"]
    allowed, answers = world.settings.sign_in.failures, list[int]()

    async def guess(code: str) -> None:
        sent = {"form_token": token, "user_code": code}
        answers.append((await person.request("POST", "/device", sent)).status_code)

    async with trio.open_nursery() as nursery:
        for n in range(2 * allowed):
            nursery.start_soon(guess, "BCDF-" + "GHJKLMNPQRSTVWXZ"[n % 16] * 4)
    assert sorted(answers) == [404] * allowed + [429] * allowed
    world.clock.now += world.settings.sign_in.failures_window
    # A code that is right costs nothing, however often it is looked at.
    begun = await world.http.post("/v2/oauth2/device_authorization", data={"client_id": TOWPATH_CLI, "scope": "openid"})
    answers.clear()
    for _ in range(allowed + 2):
        await guess(begun.json()["user_code"])
    assert answers == [200] * (allowed + 2)
