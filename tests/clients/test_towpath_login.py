"""`towpath login` in all its forms, enrolment without a key, tokens of long life, passkeys: real relay and browser."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clients.browser import Chromium, chromium
from tests.clients.relay_process import PASSWORD, PATIENCE, RelayProcess, make_relay, serving

# One relay and one browser for the whole file.
pytestmark = [pytest.mark.clients]


@dataclass
class World:
    """A relay with Ada on it and her browser."""

    relay: RelayProcess
    browser: Chromium
    base: Path

    def start(self, home: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
        home.mkdir(exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("TOWPATH_", "SSH_", "XDG_"))}
        return subprocess.Popen(
            [sys.executable, "-m", "agent", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**kept, "HOME": str(home), "TOWPATH_CA_FILE": str(self.relay.ca_file), **more},
        )  # fmt: skip

    def towpath(self, home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        process = self.start(home, *arguments, **more)
        out, err = process.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def heard(self, process: subprocess.Popen[str], pattern: str) -> str:
        """What the command says on standard error, up to a line that matches."""
        assert process.stderr is not None
        for line in process.stderr:
            match = re.search(pattern, line)
            if match:
                return match[1]
        pytest.fail(f"the command ended without saying {pattern}")

    def sign_in(self) -> None:
        if "Password" in self.browser.text:
            self.browser.type("#username", "ada")
            self.browser.type("#password", PASSWORD)
            self.browser.click("form[action='/sign-in'] button")

    def allow_device(self, code: str) -> None:
        self.browser.open(f"{self.relay.url}/device")
        self.sign_in()
        self.browser.type("#code", code)
        self.browser.click("main form button")
        self.browser.click("button[value=allow]")
        assert "goes on by itself" in self.browser.text_of("main p")


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base = tmp_path_factory.mktemp("towpath-login")
    relay = make_relay(base / "relay")
    relay.add_person("ada", "--full-name", "Ada Lovelace")
    with serving(relay), chromium(base) as browser:
        yield World(relay, browser, base)


def test_login_with_a_browser(world: World, tmp_path: Path) -> None:
    opener = tmp_path / "opener"
    opener.write_text(f'#!/bin/sh\nprintf %s "$1" > {tmp_path}/part && mv {tmp_path}/part {tmp_path}/opened\n')
    opener.chmod(0o755)
    process = world.start(tmp_path, "login", "--relay", world.relay.url, BROWSER=f"{opener} %s")
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "opened").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    world.browser.open((tmp_path / "opened").read_text())
    world.sign_in()
    world.browser.click("button[value=allow]")
    assert world.browser.shows("You can close this page")
    assert "as ada@localhost" in finished(process)
    profile = next((tmp_path / ".config").rglob("default.json"))
    assert profile.stat().st_mode & 0o777 == 0o600
    assert "ada@localhost" in world.towpath(tmp_path, "whoami").stdout
    assert world.towpath(tmp_path, "endpoint", "search", "--filter-scope", "my-endpoints").returncode == 0
    # An access token past its end is renewed, and the new one kept.
    document = json.loads(profile.read_text())
    for item in document["tokens"].values():
        item |= {"access": "over", "expires": 1.0}
    profile.write_text(json.dumps(document))
    assert "ada@localhost" in world.towpath(tmp_path, "whoami").stdout
    assert json.loads(profile.read_text())["tokens"]["auth.globus.org"]["access"] != "over"
    assert world.towpath(tmp_path, "logout").returncode == 0
    assert not profile.exists()


def test_login_by_copying_a_code(world: World, tmp_path: Path) -> None:
    process = world.start(tmp_path, "login", "--relay", world.relay.url, "--no-browser")
    address = world.heard(process, r"(https://\S+)")
    world.browser.open(address)
    world.sign_in()
    world.browser.click("button[value=allow]")
    assert process.stdin is not None
    process.stdin.write(world.browser.text_of("code.large") + "\n")
    process.stdin.flush()
    assert "as ada@localhost" in finished(process)


def test_login_on_another_device(world: World, tmp_path: Path) -> None:
    process = world.start(tmp_path, "login", "--relay", world.relay.url, "--device", "-F", "json")
    world.allow_device(world.heard(process, r"code ([A-Z]{4}-[A-Z]{4})"))
    assert json.loads(finished(process))["preferred_username"] == "ada@localhost"


def test_a_machine_is_enrolled_without_a_key(world: World, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    process = world.start(
        tmp_path, "setup", "--relay", world.relay.url, "--ca-file", str(world.relay.ca_file),
        "--root", str(root), "--name", "Beamline",
        "--config", str(tmp_path / "agent.yaml"), "--state-dir", str(tmp_path / "state"),
    )  # fmt: skip
    world.allow_device(world.heard(process, r"code ([A-Z]{4}-[A-Z]{4})"))
    assert "Collection Beamline" in finished(process)
    assert (tmp_path / "agent.yaml").exists()
    # Nothing of the sign-in is left on the machine or at the relay.
    assert not (tmp_path / ".config").exists()
    world.browser.open(f"{world.relay.url}/account/applications")
    assert world.browser.text.count("Towpath command line") <= 3


def test_a_token_of_long_life(world: World, tmp_path: Path) -> None:
    world.browser.open(f"{world.relay.url}/account/tokens")
    world.sign_in()
    for name, days in (("beamline cron", "90"), ("short", "7")):
        world.browser.open(f"{world.relay.url}/account/tokens")
        world.browser.type("#name", name)
        world.browser.type("#days", days)
        world.browser.click("form:has(#name) button")
        token = world.browser.text_of("code.large")
        environment = {"TOWPATH_RELAY_URL": world.relay.url, "TOWPATH_TOKEN": token}
        done = world.towpath(tmp_path, "whoami", **environment)
        assert done.returncode == 0, done.stderr
        assert "ada@localhost" in done.stdout
        assert "Token ends" in done.stdout
        assert ("make a new one" in done.stderr) == (name == "short")
        assert (
            world.towpath(tmp_path, "endpoint", "search", "--filter-scope", "my-endpoints", **environment).returncode
            == 0
        )
    assert world.browser.shows("ends soon")
    assert token not in world.relay.log
    world.browser.click("button.small[type=submit]")


def test_passkeys_are_made_and_used(world: World) -> None:
    world.browser.open(f"{world.relay.url}/account")
    world.sign_in()
    world.browser.add_authenticator()
    world.browser.type("#passkey-name", "Laptop")
    world.browser.click("form[data-passkey=make] button")
    world.browser.find("form[action='/account/passkeys/remove']")
    assert world.browser.shows("Laptop")
    world.browser.forget_cookies()
    world.browser.open(f"{world.relay.url}/sign-in")
    world.browser.click("form[data-passkey=sign-in] button")
    world.browser.find("form[action='/sign-out']")
    assert world.browser.shows("ada@localhost")
