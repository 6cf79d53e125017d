"""The canary itself: a test that logged a secret would be failed for it."""

from __future__ import annotations

import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.canary.sitecustomize import CANARIES, FOLDER, MARK
from tests.conftest import holds_secret, logs_of
from tests.relay.sign_in_world import Person, add_person


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


def test_every_random_secret_of_the_run_bears_the_mark() -> None:
    made = secrets.token_urlsafe(32)
    assert made.startswith(MARK)
    assert CANARIES.search(f"somewhere in {made} a line")
    shown = subprocess.run(
        [sys.executable, "-c", "import secrets\nprint(secrets.token_urlsafe(32)[:6])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.strip() == MARK


def test_a_secret_on_a_command_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    subprocess.run([sys.executable, "-c", "pass", secrets.token_urlsafe(32)], check=True)
    # A child's children are seen as well.
    code = "import secrets, subprocess, sys\nsubprocess.run(['true', secrets.token_urlsafe(32)], check=True)"
    subprocess.run([sys.executable, "-c", code], check=True)
    told = [file.read_text() for file in tmp_path.glob("arguments-*")]
    assert len(told) == 2
    assert all(MARK in line for line in told)


def test_a_log_with_a_secret_is_found(tmp_path: Path) -> None:
    (tmp_path / "relay").mkdir()
    log = tmp_path / "relay" / "log"
    log.write_text(f"signing in with {secrets.token_urlsafe(32)}\n")
    (tmp_path / "agent.log").write_text("nothing to see\n")
    (tmp_path / "data.bin").write_text(secrets.token_urlsafe(32))
    assert [path for path in logs_of(tmp_path) if holds_secret(path)] == [log]
    log.unlink()


async def test_a_fault_in_the_middle_of_a_request_tells_no_secret(
    world: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tracebacks name the place, never what was in the request or on its way to the database."""
    client_id, secret = await world.client()
    ada = await add_person(world, "ada")

    def broken(connection: Any, *_: Any, **__: Any) -> None:
        connection.exec_driver_sql("INSERT INTO nowhere VALUES (?, ?)", (secret, secrets.token_urlsafe(32)))

    monkeypatch.setattr("relay.auth.grants.open_session", broken)
    form = {"grant_type": "client_credentials", "scope": "openid"}
    answer = await world.http.post("/v2/oauth2/token", data=form, auth=(client_id, secret))
    assert answer.status_code == 500
    monkeypatch.setattr("relay.pages.sign_in.open_browser_session", broken)
    person = Person(world)
    page = await person.sign_in("ada")
    assert page.status_code == 500
    del ada
    for text in (caplog.text, answer.text, page.text):
        assert CANARIES.search(text) is None
        assert secret not in text
    assert caplog.text.count("Traceback") >= 2
