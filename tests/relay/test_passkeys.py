"""A passkey's answer counts once, and wrong ones keep nobody else out; by an authenticator made of software."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import cbor2
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import insert
from webauthn.helpers import bytes_to_base64url

from relay.auth.passkeys import CHALLENGE_LIFE, AnsweredChallenges, PasskeyRefused
from relay.pages.browser import SESSION_COOKIE
from relay.store.sign_in_tables import passkeys
from tests.relay.relay_world import START, RelayWorld
from tests.relay.sign_in_world import Person, add_person, forms_of, person_at

# Present and verified (WebAuthn level 2, 6.1); the count of uses stays 0, as with passkeys that are kept in the cloud.
_PRESENT = b"\x05" + bytes(4)


@dataclass
class Authenticator:
    """One passkey."""

    site: str
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    id: str = bytes_to_base64url(b"passkey of a test")

    @property
    def public(self) -> bytes:
        numbers = self.key.public_key().public_numbers()
        return cbor2.dumps({1: 2, 3: -7, -1: 1, -2: numbers.x.to_bytes(32, "big"), -3: numbers.y.to_bytes(32, "big")})

    def answer(self, options: dict[str, Any]) -> str:
        said = {"type": "webauthn.get", "challenge": options["challenge"], "origin": f"https://{self.site}"}
        client = json.dumps(said).encode()
        data = hashlib.sha256(self.site.partition(":")[0].encode()).digest() + _PRESENT
        signature = self.key.sign(data + hashlib.sha256(client).digest(), ec.ECDSA(hashes.SHA256()))
        response = {"clientDataJSON": client, "authenticatorData": data, "signature": signature}
        return json.dumps(
            {
                "id": self.id,
                "rawId": self.id,
                "type": "public-key",
                "response": {name: bytes_to_base64url(value) for name, value in response.items()},
            }
        )


async def with_passkey(world: RelayWorld) -> Authenticator:
    ada = await add_person(world, "ada")
    made = Authenticator(world.settings.public_url.removeprefix("https://"))
    values = {"id": made.id, "identity_id": ada.id, "public_key": made.public, "sign_count": 0, "name": "Laptop"}
    await world.store.write(lambda c: c.execute(insert(passkeys).values(**values, created=START)).rowcount)
    return made


async def offered(person: Person) -> tuple[Any, dict[str, Any]]:
    page = await person.get("/sign-in")
    form = next(form for form in forms_of(page.text) if form.action == "/sign-in/passkey")
    return form, (await person.request("POST", "/sign-in/passkey/offer", form.fields)).json()


async def test_an_answer_counts_once(world: RelayWorld) -> None:
    passkey, person = await with_passkey(world), Person(world)
    form, offer = await offered(person)
    _, other = await offered(person)
    fields = {"credential": passkey.answer(offer["options"]), "mark": offer["mark"]}
    assert "Your account" in (await person.post(form, **fields)).text
    del person.cookies[SESSION_COOKIE]
    again = await person.post(form, **fields)
    assert (again.status_code, "used already" in again.text, SESSION_COOKIE in person.cookies) == (401, True, False)
    # What was offered to another window in the same second is another challenge.
    answer = await person.post(form, credential=passkey.answer(other["options"]), mark=other["mark"])
    assert "Your account" in answer.text


async def test_wrong_passkeys_keep_nobody_at_another_address_out(world: RelayWorld) -> None:
    passkey, services = await with_passkey(world), world.relay.services
    services.guesses.__init__(2, 60.0)  # type: ignore[misc]
    services.crowd_guesses.__init__(3, 60.0)  # type: ignore[misc]
    for number in range(4):
        async with person_at(world, f"203.0.113.{number}") as stranger:
            form, offer = await offered(stranger)
            answers = [await stranger.post(form, credential="{}", mark=offer["mark"]) for _ in range(3)]
            assert [answer.status_code for answer in answers] == [401, 401, 429]
    async with person_at(world, "203.0.113.9") as ada:
        form, offer = await offered(ada)
        answer = await ada.post(form, credential=passkey.answer(offer["options"]), mark=offer["mark"])
        assert "Your account" in answer.text


@pytest.mark.parametrize("mark", ["", ".", "é.5.x", "a.5.é", "a.\u0665.x", "\u0665.x.y"])
async def test_marks_that_nobody_gave_are_refused_in_words(world: RelayWorld, mark: str) -> None:
    person = Person(world)
    form, _ = await offered(person)
    answer = await person.post(form, credential="{}", mark=mark)
    assert (answer.status_code, "took too long" in answer.text) == (403, True)


def test_what_was_answered_is_known_for_as_long_as_it_counts() -> None:
    answered = AnsweredChallenges(START)
    assert not answered.counts(START - 1, START), "it may have been answered before the relay was started"
    assert answered.counts(START, START + CHALLENGE_LIFE)
    assert not answered.counts(START, START + CHALLENGE_LIFE + 1)
    answered.take(b"a", START)
    answered.take(b"b", START + 1)
    with pytest.raises(PasskeyRefused):
        answered.take(b"a", START + CHALLENGE_LIFE)
    answered.take(b"a", START + CHALLENGE_LIFE + 1)
