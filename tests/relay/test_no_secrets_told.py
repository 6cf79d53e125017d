"""The canary itself: a test that logged a secret would be failed for it."""

from __future__ import annotations

import pytest

from tests.relay.canaries import CANARIES


@pytest.mark.parametrize(
    "text",
    [
        "signing in with quiet boats go by",
        "Authorization: Bearer " + "x" * 43,
        "GET /v2/web/auth-code?code=abcdefghijk",
        "GET /welcome?key=" + "x" * 43,
        "grant_type=refresh_token&refresh_token=abcdefgh",
        "digest $argon2id$v=19$m=65536",
        "-----BEGIN PRIVATE KEY-----",
        "setup key twp-" + "x" * 80,
    ],
)
def test_the_canary_sees_secrets(text: str) -> None:
    assert CANARIES.search(text)


@pytest.mark.parametrize(
    "text", ["POST /v2/oauth2/token 200 3 ms", "code: NotFound", "key of id_tokens", "Bearer token"]
)
def test_the_canary_lets_the_rest_pass(text: str) -> None:
    assert not CANARIES.search(text)
