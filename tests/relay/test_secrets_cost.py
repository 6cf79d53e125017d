"""What finding a password or a secret out of its digest costs on a real relay; other tests make it cheap."""

from __future__ import annotations

import pytest

from relay.auth import clients, passwords
from tests.relay.cheap_secrets import DEAR

PASSWORD = "quiet boats go by"


@pytest.fixture(autouse=True)
def dear(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in DEAR:
        monkeypatch.setattr(module, name, value)


def test_an_unknown_name_costs_as_much_as_a_known_one() -> None:
    """Passwords, by RFC 9106, 4, the second recommended choice."""
    digest = passwords.digest_of(PASSWORD)
    parameters = ["", "argon2id", "v=19", "m=65536,t=3,p=4"]
    assert digest.split("$")[:4] == passwords._NOBODY.split("$")[:4] == parameters
    assert passwords._matches(digest, PASSWORD)
    assert not passwords._matches(digest, PASSWORD + "x")
    assert not passwords._matches(passwords._NOBODY, PASSWORD)


def test_an_unknown_client_costs_as_much_as_a_known_one() -> None:
    secret, digest = clients.new_digest()
    assert digest.split("$")[:4] == clients._NOBODY.split("$")[:4] == ["scrypt", "14", "8", "1"]
    assert clients._matches(secret, digest)
    assert not clients._matches(secret + "x", digest)
    assert not clients._matches(secret, clients._NOBODY)
