"""What the command keeps of a sign-in: a private profile, until it is signed out or found damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agent.cli_scene import Run, relay, towpath
from tests.agent.fake_relay import ALPHA, CLIENT, SECRET, FakeRelay

__all__ = ["relay", "towpath"]


def test_login_stores_a_private_profile_that_logout_removes(
    towpath: Run, relay: FakeRelay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("TOWPATH_RELAY_URL", "TOWPATH_CLIENT_ID", "TOWPATH_CLIENT_SECRET"):
        monkeypatch.delenv(name)
    arguments = ["login", "--relay", relay.url, "--client-id", CLIENT, "--secret-file", "-"]
    assert towpath(*arguments, stdin=SECRET + "\n") == (0, f"Signed in to {relay.url} as demo@example.org.\n", "")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)
    assert "demo@example.org" in towpath("whoami")[1]
    towpath("ls", ALPHA)
    token_requests = len(relay.sent("POST", "/v2/oauth2/token"))
    towpath("ls", ALPHA)
    assert len(relay.sent("POST", "/v2/oauth2/token")) == token_requests, "tokens are kept between commands"
    assert towpath("logout")[0] == 0
    assert relay.sent("POST", "/v2/oauth2/token/revoke")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    code, _, err = towpath("ls", "alpha")
    assert code == 1
    assert "towpath login" in err


def test_login_with_a_wrong_secret_stores_nothing(towpath: Run, relay: FakeRelay, tmp_path: Path) -> None:
    code, _, err = towpath("login", "--relay", relay.url, "--client-id", CLIENT, "--secret-file", "-", stdin="wrong")
    assert code == 1
    assert "does not accept this client id and secret" in err
    assert not list((tmp_path / "config").rglob("*.json"))


def test_a_damaged_token_file_is_thrown_away(towpath: Run, tmp_path: Path) -> None:
    assert towpath("ls", ALPHA)[0] == 0
    (file,) = (tmp_path / "cache").rglob("*.sqlite")
    file.write_bytes(b"this is no database, not even of the right length" * 100)
    assert towpath("ls", ALPHA)[0] == 0
    assert towpath("ls", ALPHA)[0] == 0
