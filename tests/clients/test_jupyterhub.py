"""A real JupyterHub signs somebody in with oauthenticator's GlobusOAuthenticator; their server uses their tokens."""

from __future__ import annotations

import getpass
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from agent.demo.free_port import free_port
from tests.clients.browser import Chromium, chromium
from tests.clients.relay_process import PASSWORD, PATIENCE, RelayProcess, make_relay, serving

pytestmark = [pytest.mark.clients, pytest.mark.soak]

START = 180.0
# A stand-in for a notebook: with the tokens it was given, it lists the person's collections through globus-sdk.
NOTEBOOK = """
import base64, json, os, pickle, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import urlsplit
import globus_sdk

data = pickle.loads(base64.b64decode(os.environ["GLOBUS_DATA"]))
token = data["tokens"]["transfer.api.globus.org"]["access_token"]
transfer = globus_sdk.TransferClient(authorizer=globus_sdk.AccessTokenAuthorizer(token))
found = [row["display_name"] for row in transfer.endpoint_search(filter_scope="my-endpoints")]

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = ("collections: " + json.dumps(found)).encode()
        self.send_response(200)
        self.send_header("X-JupyterHub-Version", "5")
        self.end_headers()
        self.wfile.write(body)

place = urlsplit(os.environ["JUPYTERHUB_SERVICE_URL"])
HTTPServer((place.hostname, place.port), Handler).serve_forever()
"""
CONFIGURATION = """
import os
from oauthenticator.globus import {authenticator}
c.JupyterHub.bind_url = "http://127.0.0.1:{port}/"
c.JupyterHub.hub_port = {hub_port}
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{api_port}"
c.ConfigurableHTTPProxy.command = {proxy!r}
c.JupyterHub.db_url = "sqlite:///{place}/hub.sqlite"
c.JupyterHub.cookie_secret_file = "{place}/cookie"
c.JupyterHub.authenticator_class = {authenticator}
c.Authenticator.allow_all = True
c.Authenticator.enable_auth_state = True
# The local one wants its users to have accounts of the machine.
c.Authenticator.username_map = {user_map!r}
c.OAuthenticator.http_request_kwargs = {{"ca_certs": "{ca_file}"}}
a = c.{authenticator}
a.authorize_url = "{url}/v2/oauth2/authorize"
a.token_url = "{url}/v2/oauth2/token"
a.userdata_url = "{url}/v2/oauth2/userinfo"
a.revocation_url = "{url}/v2/oauth2/token/revoke"
a.logout_redirect_url = "{url}/v2/web/logout"
a.oauth_callback_url = "{callback}"
a.client_id = "{client_id}"
a.client_secret = "{client_secret}"
a.identity_provider = ""
a.exclude_tokens = ["auth.globus.org"]
a.scope = ["openid", "profile", "email", "urn:globus:auth:scope:transfer.api.globus.org:all"]
from jupyterhub.spawner import SimpleLocalProcessSpawner
class Spawner(SimpleLocalProcessSpawner):
    cmd = ["{python}", "{place}/notebook.py"]
    def make_preexec_fn(self, name):
        return None
c.JupyterHub.spawner_class = Spawner
c.Spawner.environment = {{"GLOBUS_SDK_SERVICE_URL_TRANSFER": "{url}", "GLOBUS_SDK_VERIFY_SSL": "{ca_file}"}}
"""


@dataclass
class Hub:
    """A running JupyterHub beside a relay."""

    relay: RelayProcess
    browser: Chromium
    url: str


@pytest.fixture(params=["GlobusOAuthenticator", "LocalGlobusOAuthenticator"])
def hub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hub]:
    jupyterhub, proxy = os.environ.get("JUPYTERHUB"), os.environ.get("JUPYTERHUB_PROXY")
    if not jupyterhub or not proxy:
        pytest.skip("JUPYTERHUB and JUPYTERHUB_PROXY name no hub; `make hub` installs them and runs this test")
    relay = make_relay(tmp_path / "relay")
    relay.add_person("ada")
    relay.add_person("operator", "--email", "operator@mail.example")
    relay.run("collection", "add", "Beamline data", "--owner", "ada")
    port, hub_port, api_port = free_port(), free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    callback = f"{url}/hub/oauth_callback"
    with serving(relay), chromium(tmp_path) as browser:
        client_id, client_secret = _register(relay, browser, callback)
        (tmp_path / "notebook.py").write_text(NOTEBOOK)
        (tmp_path / "jupyterhub_config.py").write_text(
            CONFIGURATION.format(
                authenticator=request.param,
                port=port,
                hub_port=hub_port,
                api_port=api_port,
                proxy=proxy.split(),
                place=tmp_path,
                ca_file=relay.ca_file,
                url=relay.url,
                callback=callback,
                client_id=client_id,
                client_secret=client_secret,
                python=Path(jupyterhub).with_name("python"),
                user_map={"ada@localhost": getpass.getuser(), "ada": getpass.getuser()},
            )
        )
        with _running(jupyterhub, relay, tmp_path, f"{url}/hub/health"):
            yield Hub(relay, browser, url)


def _register(relay: RelayProcess, browser: Chromium, callback: str) -> tuple[str, str]:
    """What the hub's operator does: the form on the developers' page."""
    browser.open(f"{relay.url}/developers")
    browser.type("#username", "operator")
    browser.type("#password", PASSWORD)
    browser.click("form[action='/sign-in'] button")
    browser.type("#name", "Jupyter of the institute")
    browser.type("#uris", callback)
    browser.click("form[action='/developers'] button[type=submit]")
    assert browser.shows("is registered")
    account = browser.text_of("code.large"), browser.text_of(".note code.large")
    browser.forget_cookies()
    return account


@contextmanager
def _running(jupyterhub: str, relay: RelayProcess, place: Path, health: str) -> Iterator[None]:
    log = place / "hub.log"
    environment = relay.environment(place) | {"JUPYTERHUB_CRYPT_KEY": "00" * 32}
    with log.open("w") as file:
        process = subprocess.Popen(
            [jupyterhub, "-f", str(place / "jupyterhub_config.py")], cwd=place, stdout=file, stderr=file,
            env=environment,
        )  # fmt: skip
        try:
            _wait(health, process, log)
            yield
        except BaseException:
            print(log.read_text()[-5000:])
            raise
        finally:
            process.terminate()
            process.wait(PATIENCE)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-5000:]
        try:
            if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    pytest.fail(log.read_text()[-5000:])


def test_somebody_signs_in_to_a_hub_and_their_server_uses_their_collections(hub: Hub) -> None:
    hub.browser.open(f"{hub.url}/hub/login")
    hub.browser.click("a[href*='oauth_login']")
    hub.browser.type("#username", "ada")
    hub.browser.type("#password", PASSWORD)
    hub.browser.click("form[action='/sign-in'] button")
    assert "Jupyter of the institute" in hub.browser.text
    hub.browser.click("button[value=allow]")
    deadline = time.monotonic() + START
    while "collections:" not in hub.browser.text:
        assert time.monotonic() < deadline, hub.browser.url + hub.browser.text
        time.sleep(0.5)
    assert "Beamline data" in hub.browser.text
    # Signing out of the hub ends the tokens and leads to the relay's page.
    hub.browser.open(f"{hub.url}/hub/logout")
    hub.browser.find("main h1")
    assert hub.browser.url.startswith(f"{hub.relay.url}/v2/web/logout")
    assert "Signed out" in hub.browser.text
