"""Signing a person in: with a browser on this machine, with a code copied from one, or on another device.

Every installation makes itself a copy of the Towpath application at the relay, with a secret of its own, so that a
refresh token alone is worth nothing elsewhere (RFC 9700, 4.14).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.server
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx
import msgspec

from agent.cli.failures import network_sentence
from agent.cli.output import CommandFailed
from agent.cli.profile import Tokens

APPLICATION = "8a2b1f0e-6c0d-5e0a-9d53-2f6c1d7a4b11"
AUTH_SERVER = "auth.globus.org"
TRANSFER_SERVER = "transfer.api.globus.org"
SCOPES = (
    "openid profile email urn:globus:auth:scope:auth.globus.org:view_identity_set "
    "urn:globus:auth:scope:transfer.api.globus.org:all"
)
DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
# How long a person has at the browser, in seconds.
PATIENCE = 900.0
TIMEOUT = 30.0
MAX_ANSWER = 1 << 20


@dataclass(frozen=True)
class Copy:
    """This installation's own copy of the application. The secret stays out of tracebacks."""

    client_id: str
    secret: str

    def __repr__(self) -> str:
        return f"Copy(client_id={self.client_id!r})"


@dataclass(frozen=True)
class DeviceCode:
    """What the relay gave for signing in on another device. Times in seconds."""

    device_code: str
    user_code: str
    page: str
    whole_page: str
    expires_in: float
    interval: float

    def __repr__(self) -> str:
        return f"DeviceCode(page={self.page!r})"


class SignIn:
    """Talks to one relay. Calls block; close it when done. Raises `CommandFailed` with a sentence for the user."""

    def __init__(
        self,
        relay_url: str,
        ca_file: str | None,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._relay = relay_url
        self._ca_file = ca_file
        context = ssl.create_default_context(cafile=ca_file)
        headers = {"User-Agent": f"towpath on {socket.gethostname()[:100]}", "Accept": "application/json"}
        self._http = httpx.Client(verify=context, timeout=TIMEOUT, headers=headers)
        self._sleep = sleep
        self._clock = clock

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def make_copy(self) -> Copy:
        """Have the relay make this installation's copy of the application. Raises `CommandFailed`, as do all here."""
        body = {"client": {"template_id": APPLICATION, "name": f"Towpath on {socket.gethostname()[:100]}"}}
        document = self._ask("POST", "/v2/api/clients", json=body)
        try:
            credential = document["included"]["client_credential"]
            return Copy(str(credential["client"]), str(credential["secret"]))
        except (KeyError, TypeError) as error:
            raise CommandFailed(f"{self._relay} does not answer like a Towpath relay.") from error

    def with_browser(self, copy: Copy, open_browser: Callable[[str], object]) -> Mapping[str, Tokens]:
        """Open a browser here and wait for its answer on a port of this machine."""
        with _Catcher() as catcher:
            asking = _Asking.new(f"http://127.0.0.1:{catcher.port}/")
            open_browser(asking.url(self._relay, copy))
            answer = catcher.wait(PATIENCE)
        return self._redeem(copy, asking, asking.code_untrusted(answer, self._relay))

    def with_copied_code(
        self, copy: Copy, show: Callable[[str], object], ask: Callable[[], str]
    ) -> Mapping[str, Tokens]:
        """Show an address to be opened anywhere, and ask for the code that is shown there."""
        asking = _Asking.new(f"{self._relay}/v2/web/auth-code")
        show(asking.url(self._relay, copy))
        return self._redeem(copy, asking, ask().strip())

    def begin_device(self, copy: Copy) -> DeviceCode:
        """Ask for a code to be typed in on another device."""
        form = {"scope": SCOPES, "access_type": "offline"}
        document = self._ask("POST", "/v2/oauth2/device_authorization", copy, data=form)
        try:
            return DeviceCode(
                str(document["device_code"]),
                str(document["user_code"]),
                str(document["verification_uri"]),
                str(document.get("verification_uri_complete", document["verification_uri"])),
                float(document["expires_in"]),
                max(1.0, float(document.get("interval", 5))),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CommandFailed(f"{self._relay} gave an answer that cannot be read.") from error

    def wait_for_device(self, copy: Copy, code: DeviceCode) -> Mapping[str, Tokens]:
        """Ask again and again until somebody has allowed it (RFC 8628, 3.4)."""
        interval, deadline = code.interval, self._clock() + code.expires_in
        form = {"grant_type": DEVICE_GRANT, "device_code": code.device_code}
        while self._clock() < deadline:
            self._sleep(interval)
            answer = self._send("POST", "/v2/oauth2/token", copy, data=form)
            document = _object_untrusted(answer)
            error = document.get("error")
            if answer.status_code == 200:
                return self._tokens(document)
            if error == "slow_down":
                interval += 5
            elif error != "authorization_pending":
                raise CommandFailed(_said(document) or f"The relay refused ({error}).")
        raise CommandFailed("Nobody allowed it in time; begin again.")

    def _redeem(self, copy: Copy, asking: _Asking, code: str) -> Mapping[str, Tokens]:
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": asking.redirect_uri,
            "code_verifier": asking.verifier,
        }
        return self._tokens(self._ask("POST", "/v2/oauth2/token", copy, data=form))

    def _tokens(self, document: Mapping[str, Any]) -> Mapping[str, Tokens]:
        now = self._clock()
        try:
            return {
                str(item["resource_server"]): Tokens(
                    str(item["access_token"]), str(item["refresh_token"]), now + float(item["expires_in"])
                )
                for item in (document, *document["other_tokens"])
            }
        except (KeyError, TypeError, ValueError) as error:
            raise CommandFailed(f"{self._relay} gave tokens that cannot be read.") from error

    def _ask(self, method: str, path: str, copy: Copy | None = None, **more: Any) -> Mapping[str, Any]:
        answer = self._send(method, path, copy, **more)
        document = _object_untrusted(answer)
        if answer.status_code not in (200, 201):
            raise CommandFailed(_said(document) or f"{self._relay} answered with status {answer.status_code}.")
        return document

    def _send(self, method: str, path: str, copy: Copy | None = None, **more: Any) -> httpx.Response:
        auth = None if copy is None else (copy.client_id, copy.secret)
        try:
            return self._http.request(method, self._relay + path, auth=auth, **more)
        except httpx.HTTPError as error:
            raise CommandFailed(network_sentence(error, self._relay, self._ca_file)) from error


@dataclass(frozen=True)
class _Asking:
    """One request at the authorize route."""

    redirect_uri: str
    state: str
    verifier: str

    @classmethod
    def new(cls, redirect_uri: str) -> _Asking:
        return cls(redirect_uri, secrets.token_urlsafe(24), secrets.token_urlsafe(48))

    def url(self, relay: str, copy: Copy) -> str:
        digest = hashlib.sha256(self.verifier.encode()).digest()
        query = {
            "response_type": "code",
            "client_id": copy.client_id,
            "redirect_uri": self.redirect_uri,
            "scope": SCOPES,
            "state": self.state,
            "access_type": "offline",
            "code_challenge": base64.urlsafe_b64encode(digest).rstrip(b"=").decode(),
            "code_challenge_method": "S256",
        }
        return f"{relay}/v2/oauth2/authorize?{urlencode(query)}"

    def code_untrusted(self, answer: Mapping[str, str], relay: str) -> str:
        """The code of an answer that belongs to this request and came from this relay (RFC 9207)."""
        if not hmac.compare_digest(answer.get("state", "").encode(), self.state.encode()):
            raise CommandFailed("The browser's answer does not belong to this sign-in; begin again.")
        if answer.get("iss", relay) != relay:
            raise CommandFailed("The browser's answer came from another relay; begin again.")
        if "error" in answer:
            raise CommandFailed(f"Not signed in: {_plain(answer.get('error_description', answer['error']))}")
        return answer.get("code", "")


class _Catcher:
    """A web server of this machine alone that waits for one answer of the browser."""

    def __enter__(self) -> _Catcher:
        answers: list[Mapping[str, str]] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                query = parse_qs(urlsplit(self.path).query)
                if not {"state", "code", "error"} & set(query):
                    self.send_error(404)
                    return
                answers.append({name: values[0] for name, values in query.items()})
                body = b"<!doctype html><title>Towpath</title><p>You can close this page and go back to the terminal."
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Security-Policy", "default-src 'none'")
                self.send_header("Referrer-Policy", "no-referrer")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """The address holds the code; it must not be printed."""

        self._server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self._server.timeout = 1.0
        self._answers = answers
        return self

    def __exit__(self, *_: object) -> None:
        self._server.server_close()

    @property
    def port(self) -> int:
        return self._server.server_port

    def wait(self, patience: float) -> Mapping[str, str]:
        deadline = time.monotonic() + patience
        while not self._answers:
            if time.monotonic() > deadline:
                raise CommandFailed("The browser did not answer in time; begin again, perhaps with --device.")
            self._server.handle_request()
        return self._answers[0]


def _object_untrusted(answer: httpx.Response) -> Mapping[str, Any]:
    if len(answer.content) > MAX_ANSWER:
        raise CommandFailed("The relay answered with more than a relay would.")
    try:
        return msgspec.json.decode(answer.content, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CommandFailed(
            f"The relay gave an answer that cannot be read (status {answer.status_code}); check its address, which "
            "begins with https:// as a rule."
        ) from error


def _said(document: Mapping[str, Any]) -> str:
    sentence = document.get("error_description")
    return _plain(sentence) if isinstance(sentence, str) else ""


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:500])
