"""The unmodified Globus CLI signs a person in, with a real browser and with a code copied into the terminal."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.clients.browser import Chromium, chromium
from tests.clients.calls import Calls
from tests.clients.relay_process import PASSWORD, PATIENCE, RelayProcess, make_relay, serving

# One relay and one browser for the whole file.
pytestmark = [pytest.mark.clients]


@dataclass
class World:
    """A relay with Ada on it, the CLI, and her browser."""

    relay: RelayProcess
    browser: Chromium
    cli: str
    base: Path
    calls: Calls

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        home.mkdir(exist_ok=True)
        return {**self.relay.environment(home), **more}

    def globus(self, home: Path, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.cli, *arguments], capture_output=True, text=True, timeout=120, input=text,
            env=self.environment(home, GLOBUS_CLI_INTERACTIVE="1"),
        )  # fmt: skip

    def answer(self, home: Path, *arguments: str) -> str:
        done = self.globus(home, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        self.calls.append(arguments)
        return done.stdout

    def with_browser(self, home: Path, *arguments: str, name: str = "ada", allow: bool = True) -> str:
        """Run a command that opens the browser, sign in there, and return what the command said."""
        note = home / "opened"
        note.unlink(missing_ok=True)
        opener = self.base / "opener"
        opener.write_text(f'#!/bin/sh\nprintf %s "$1" > {note}.part && mv {note}.part {note}\n')
        opener.chmod(0o755)
        environment = self.environment(home, BROWSER=f"{opener} %s", GLOBUS_CLI_INTERACTIVE="1")
        with subprocess.Popen(
            [self.cli, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process:
            deadline = time.monotonic() + PATIENCE
            while not note.exists():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            self.browser.open(note.read_text())
            self.sign_in(name)
            self.decide(allow=allow)
            output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == (0 if allow else 1), output
        self.calls.append(arguments)
        return output

    def by_code(self, home: Path, *arguments: str) -> str:
        """Run a command that prints an address, sign in there, and copy the code that the page shows."""
        environment = self.environment(home, GLOBUS_CLI_INTERACTIVE="1")
        with subprocess.Popen(
            [self.cli, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env=environment,
        ) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            url = next(line.strip() for line in process.stdout if line.startswith("https://"))
            self.browser.open(url)
            self.sign_in()
            self.decide()
            process.stdin.write(self.browser.text_of("code.large") + "\n")
            process.stdin.flush()
            output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
        self.calls.append(arguments)
        return output

    def sign_in(self, name: str = "ada") -> None:
        self.browser.type("#username", name)
        self.browser.type("#password", PASSWORD)
        self.browser.click("form[action='/sign-in'] button")

    def decide(self, *, allow: bool = True) -> None:
        self.browser.click(f"button[value={'allow' if allow else 'refuse'}]")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, calls: Calls) -> Iterator[World]:
    cli = os.environ.get("GLOBUS_CLI")
    if not cli:
        pytest.skip("GLOBUS_CLI does not name the globus command; `make test` installs it and sets this")
    base = tmp_path_factory.mktemp("login")
    relay = make_relay(base / "relay")
    relay.add_person("ada", "--full-name", "Ada Lovelace", "--email", "ada@mail.example")
    relay.add_person("bob")
    # Chromium without scripts: the pages must do without.
    with serving(relay), chromium(base, scripts=False) as browser:
        yield World(relay, browser, cli, base, calls)


@pytest.fixture(scope="module")
def home(world: World) -> Path:
    """Where Ada's CLI keeps what it knows, signed in through the browser."""
    place = world.base / "ada"
    place.mkdir()
    output = world.with_browser(place, "login")
    assert "You have successfully logged in" in output, output
    return place


def test_login_with_a_browser_and_whoami(world: World, home: Path) -> None:
    assert world.answer(home, "whoami").strip() == "ada@localhost"
    document = json.loads(world.answer(home, "whoami", "-F", "json"))
    assert (document["name"], document["email"]) == ("Ada Lovelace", "ada@mail.example")
    assert "ada@localhost" in world.answer(home, "whoami", "--linked-identities")


def test_commands_act_for_the_person(world: World, home: Path) -> None:
    assert world.answer(home, "endpoint", "search", "--filter-scope", "my-endpoints").count("\n") >= 1
    (bob,) = json.loads(world.answer(home, "get-identities", "bob@localhost", "-F", "json"))["identities"]
    assert world.answer(home, "get-identities", bob["id"]).strip() == "bob@localhost"
    assert "ada@localhost" in world.answer(home, "session", "show")


def test_session_update_and_consent_go_through_the_browser(world: World, home: Path) -> None:
    before = json.loads(world.answer(home, "session", "show", "-F", "json"))["authentications"]
    output = world.with_browser(home, "session", "update", "ada@localhost")
    assert "You have successfully updated your CLI session" in output
    after = json.loads(world.answer(home, "session", "show", "-F", "json"))["authentications"]
    assert set(before) == set(after)
    (identity,) = before
    assert after[identity]["auth_time"] >= before[identity]["auth_time"]
    world.with_browser(home, "session", "update", "--all")
    world.with_browser(home, "session", "update", "localhost")
    assert "updated" in world.by_code(home, "session", "update", "--no-local-server", "ada@localhost")
    output = world.with_browser(home, "session", "consent", "urn:globus:auth:scope:transfer.api.globus.org:all")
    assert "consent" in output


def test_projects_applications_and_policies_through_the_cli(world: World, home: Path) -> None:
    """The CLI has no commands of its own for them; its `api auth` reaches them once the person has consented."""
    manage = "urn:globus:auth:scope:auth.globus.org:manage_projects"
    world.with_browser(home, "session", "update", "ada@localhost", "--scope", manage)

    def api(method: str, path: str, body: object = None) -> dict[str, Any]:
        more = () if body is None else ("--body", json.dumps(body))
        document = json.loads(world.answer(home, "api", "auth", method, path, *more))
        return dict(next(iter(document.values())))

    project = api("POST", "/v2/api/projects", {"project": {"display_name": "P", "contact_email": "a@mail.example"}})
    wish = {"name": "Hub", "project": project["id"], "client_type": "confidential_client"}
    client = api("POST", "/v2/api/clients", {"client": wish})
    policy = {
        "project_id": project["id"],
        "display_name": "p",
        "description": "d",
        "domain_constraints_include": ["localhost"],
    }
    made = api("POST", "/v2/api/policies", {"policy": policy})
    scope = {"name": "n", "description": "d", "scope_suffix": "s"}
    assert api("POST", f"/v2/api/clients/{client['id']}/scopes", {"scope": scope})["client"] == client["id"]
    world.with_browser(home, "session", "update", "--policy", made["id"])


def test_an_identity_that_is_not_hers_is_refused_in_words(world: World, home: Path) -> None:
    (bob,) = json.loads(world.answer(home, "get-identities", "bob@localhost", "-F", "json"))["identities"]
    done = world.globus(home, "session", "update", bob["id"])
    assert done.returncode == 1
    assert "is not in your identity set" in done.stderr


def test_refusing_ends_the_login_with_a_sentence(world: World, tmp_path: Path) -> None:
    output = world.with_browser(tmp_path, "login", allow=False)
    assert "Authorization failed" in output or "refused" in output


def test_login_by_copying_a_code(world: World, tmp_path: Path) -> None:
    world.by_code(tmp_path, "login", "--no-local-server")
    assert world.answer(tmp_path, "whoami").strip() == "ada@localhost"
    assert "already logged in" in world.answer(tmp_path, "login")
    world.by_code(tmp_path, "login", "--force", "--no-local-server")
    world.answer(tmp_path, "logout", "--yes", "--ignore-errors", "--delete-client")
    gone = world.globus(tmp_path, "whoami")
    assert gone.returncode != 0
    assert "Traceback" not in gone.stderr


def test_secrets_are_in_no_log(world: World, home: Path) -> None:
    text = world.relay.log
    for word in (PASSWORD, "code=", "refresh_token", "client_secret", "access_token"):
        assert word not in text
