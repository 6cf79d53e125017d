"""What the command keeps of a sign-in: a private profile, until it is signed out or found damaged."""

from __future__ import annotations

import webbrowser
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


def test_the_machines_own_relay_and_its_authority_need_not_be_named(
    towpath: Run, relay: FakeRelay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("TOWPATH_RELAY_URL", "TOWPATH_CLIENT_ID", "TOWPATH_CLIENT_SECRET"):
        monkeypatch.delenv(name)
    arguments = ["login", "--client-id", CLIENT, "--secret-file", "-"]
    code, _, err = towpath(*arguments, stdin=SECRET)
    assert (code, "--relay URL" in err) == (2, True)
    monkeypatch.setattr("agent.cli.account.machines_relay", lambda: (relay.url, str(tmp_path / "gone.pem")))
    code, _, err = towpath(*arguments, stdin=SECRET)
    assert (code, f"There is no CA certificate at {tmp_path}/gone.pem" in err) == (1, True)
    monkeypatch.setattr("agent.cli.account.machines_relay", lambda: (relay.url, None))
    assert towpath(*arguments, stdin=SECRET)[0] == 0
    # Another relay's certificate is looked at as anybody's.
    monkeypatch.setattr(
        "agent.cli.account.machines_relay", lambda: ("https://other.example", str(tmp_path / "gone.pem"))
    )
    assert towpath(*arguments, "--relay", relay.url, stdin=SECRET)[0] == 0


def test_the_machines_own_relay_is_read_from_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agent.cli.account import machines_relay

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert machines_relay() == ("", None)
    (tmp_path / "towpath").mkdir()
    file = tmp_path / "towpath" / "agent.yaml"
    file.write_text("version: 1\nrelay: {url: 'https://relay.example', ca_file: ca.pem}\n")
    assert machines_relay() == ("https://relay.example", str(file.parent / "ca.pem"))
    file.write_text("nonsense")
    assert machines_relay() == ("", None)


def test_a_home_that_cannot_be_written_to_is_told_in_a_sentence(
    towpath: Run, relay: FakeRelay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is kept between commands is left out then; what was asked to be kept is not there, and that is said."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    assert towpath("ls", ALPHA)[0] == 0
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file" / "config"))
    code, out, err = towpath("login", "--relay", relay.url, "--client-id", CLIENT, "--secret-file", "-", stdin=SECRET)
    assert (code, out) == (1, "")
    assert err == f"towpath: {tmp_path}/file/config/towpath/profiles: Not a directory.\n"


def test_without_a_browser_here_the_address_is_for_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container or a notebook's terminal it waited a quarter of an hour for a browser that could not answer."""
    from agent.cli.account import browser_is_elsewhere

    for name in ("SSH_TTY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("webbrowser.get", lambda: object())
    assert not browser_is_elsewhere()
    monkeypatch.setenv("SSH_CONNECTION", "1")
    assert browser_is_elsewhere()
    monkeypatch.delenv("SSH_CONNECTION")

    def none() -> None:
        raise webbrowser.Error("could not locate runnable browser")

    monkeypatch.setattr("webbrowser.get", none)
    assert browser_is_elsewhere()
