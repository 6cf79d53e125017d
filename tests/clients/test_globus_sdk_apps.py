"""globus-sdk's UserApp and ClientApp sign in against a real relay; and one relay signs people in for another."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.browser import Chromium, chromium
from tests.clients.relay_process import PASSWORD, PATIENCE, RelayProcess, make_relay, serving

# One relay and one browser for the whole file.
pytestmark = [pytest.mark.clients]

USER_APP = """
import sys, json
import globus_sdk
from globus_sdk.login_flows import CommandLineLoginFlowManager

class Manager(CommandLineLoginFlowManager):
    def print_authorize_url(self, url):
        print(url, flush=True)
    def prompt_for_code(self):
        return sys.stdin.readline().strip()

config = globus_sdk.GlobusAppConfig(
    login_flow_manager=Manager, request_refresh_tokens=True,
)
app = globus_sdk.UserApp("test", client_id="61338d24-54d5-408f-a10d-66c06b59f6d2", config=config)
transfer = globus_sdk.TransferClient(app=app)
auth = globus_sdk.AuthClient(app=app)
auth.add_app_scope(globus_sdk.AuthClient.scopes.openid)
auth.add_app_scope(globus_sdk.AuthClient.scopes.profile)
print(json.dumps({
    "me": auth.userinfo()["preferred_username"],
    "collections": [c["id"] for c in transfer.endpoint_search(filter_scope="my-endpoints")],
}), flush=True)
"""
CLIENT_APP = """
import sys, json
import globus_sdk
app = globus_sdk.ClientApp("test", client_id=sys.argv[1], client_secret=sys.stdin.readline().strip())
transfer = globus_sdk.TransferClient(app=app)
print(json.dumps([c["id"] for c in transfer.endpoint_search(filter_scope="my-endpoints")]))
"""


@pytest.fixture(scope="module")
def relays(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RelayProcess, RelayProcess, Chromium]]:
    """A relay, a second one at which it signs people in, and a browser."""
    base = tmp_path_factory.mktemp("sdk")
    relay, upstream = make_relay(base / "relay"), make_relay(base / "upstream")
    configuration = upstream.directory / "relay.yaml"
    configuration.write_text(configuration.read_text() + "name: Partner\nsign_in:\n  domain: partner.example\n")
    upstream.add_person("grace", "--full-name", "Grace Hopper")
    registered = json.loads(upstream.run("client", "add", "Relay", "--json"))
    with sqlite3.connect(upstream.directory / "relay.sqlite") as database:
        database.execute(
            "UPDATE clients SET redirect_uris = ? WHERE id = ?",
            (json.dumps([f"{relay.url}/sign-in/from/partner"]), registered["client_id"]),
        )
    database.close()
    (relay.directory / "partner.secret").write_text(registered["client_secret"])
    configuration = relay.directory / "relay.yaml"
    configuration.write_text(
        configuration.read_text()
        + f"""
sign_in:
  providers:
    - id: partner
      name: Partner institute
      issuer: {upstream.url}
      client_id: {registered["client_id"]}
      client_secret_file: partner.secret
      domains: [partner.example]
      ca_file: {upstream.ca_file}
      private_addresses: true
"""
    )
    relay.add_person("ada", "--full-name", "Ada Lovelace")
    with serving(upstream), serving(relay), chromium(base) as browser:
        yield relay, upstream, browser


def run(relay: RelayProcess, home: Path, program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=relay.environment(home) | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def test_user_app(relays: tuple[RelayProcess, RelayProcess, Chromium], tmp_path: Path) -> None:
    relay, _, browser = relays
    process = run(relay, tmp_path, USER_APP)
    assert process.stdout is not None
    assert process.stdin is not None
    browser.open(process.stdout.readline().strip())
    browser.type("#username", "ada")
    browser.type("#password", PASSWORD)
    browser.click("form[action='/sign-in'] button")
    browser.click("button[value=allow]")
    process.stdin.write(browser.text_of("code.large") + "\n")
    process.stdin.flush()
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert json.loads(out) == {"me": "ada@localhost", "collections": []}
    # The second time it needs nobody.
    again = run(relay, tmp_path, USER_APP)
    out, err = again.communicate(timeout=PATIENCE)
    assert json.loads(out)["me"] == "ada@localhost", err


def test_client_app(relays: tuple[RelayProcess, RelayProcess, Chromium], tmp_path: Path) -> None:
    relay, _, _ = relays
    account = json.loads(relay.run("client", "add", "program", "--json"))
    process = run(relay, tmp_path, CLIENT_APP, account["client_id"])
    out, err = process.communicate(account["client_secret"] + "\n", timeout=PATIENCE)
    assert process.returncode == 0, err
    assert json.loads(out) == []


def test_one_relay_signs_people_in_for_another(relays: tuple[RelayProcess, RelayProcess, Chromium]) -> None:
    relay, upstream, browser = relays
    browser.forget_cookies()
    browser.open(f"{relay.url}/sign-in")
    browser.click("form[action='/sign-in/with/partner'] button")
    browser.find("#username")
    assert browser.url.startswith(upstream.url)
    browser.type("#username", "grace")
    browser.type("#password", PASSWORD)
    browser.click("form[action='/sign-in'] button")
    browser.click("button[value=allow]")
    browser.find("form[action='/sign-out']")
    assert browser.url.startswith(f"{relay.url}/account")
    assert browser.shows("grace@partner.example")
    assert browser.shows("Grace Hopper")
    assert "grace@partner.example" in relay.run("user", "list")
