"""Requests to act for a person, as they arrive at the authorize route (RFC 6749, 4.1.1; OpenID Connect Core, 3.1.2).

First the client and where it wants the browser sent are checked: as long as these are not right, nothing may be sent
there, and the person is told instead. Everything else that is wrong is told to the client.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlencode, urlsplit, urlunsplit

from relay.auth.clients import Client
from relay.auth.public_clients import may_redirect_to
from relay.auth.scopes import InvalidScope, Scope, parse_untrusted

MAX_QUERY = 32 * 1024
MAX_STATE = 4096
MAX_MESSAGE = 500
MAX_REQUIRED = 50
_CHALLENGE = re.compile(r"[A-Za-z0-9_-]{43}")
_VERIFIER = re.compile(r"[A-Za-z0-9._~-]{43,128}")


class NotForTheClient(Exception):
    """The request is not answered with a redirect, because where to is not trusted. The sentence is for the person."""


class Refused(Exception):
    """The request is answered with an error at its redirect address. ``code`` is a word of RFC 6749, 4.1.2.1."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True, kw_only=True)
class StepUp:
    """What the browser session must show beyond somebody being signed in."""

    identities: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    multi_factor: bool = False
    max_age: float | None = None


@dataclass(frozen=True, kw_only=True)
class AuthorizationRequest:
    """A request whose form is right. ``query`` is its canonical text, from which it can be read again."""

    client: Client
    redirect_uri: str
    scopes: Mapping[str, Scope]
    state: str | None
    offline: bool
    challenge: str | None
    nonce: str | None
    prompt: frozenset[str]
    step_up: StepUp
    message: str
    label: str
    login_hint: str
    query: str = field(repr=False)

    @property
    def scope(self) -> str:
        """The scopes as text, dependencies included."""
        return " ".join(str(scope) for scope in self.scopes.values())


def single_values_untrusted(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The parameters of a query. A repeated one is refused, since readers could differ on which counts.

    ``scope`` may be repeated, because Globus's clients do; the lists are joined. Raises `NotForTheClient`.
    """
    values: dict[str, str] = {}
    for name, value in pairs:
        if name == "scope" and name in values:
            values[name] += " " + value
        elif name in values:
            raise NotForTheClient(f"The link names {name[:40]} twice.")
        else:
            values[name] = value
    return values


def check_target(client: Client | None, values: Mapping[str, str], public_url: str) -> tuple[Client, str]:
    """The client and the address that its answer goes to. Raises `NotForTheClient`."""
    if client is None:
        raise NotForTheClient("The application that sent you here is not known to this relay.")
    redirect_uri = values.get("redirect_uri", "")
    own_page = f"{public_url}/v2/web/auth-code"
    if redirect_uri == own_page.replace("/v2/web", "v2/web", 1):
        raise NotForTheClient(
            "The address of the relay lacks its final slash in your settings: GLOBUS_SDK_SERVICE_URL_AUTH must end "
            "in '/'."
        )
    if not redirect_uri or not may_redirect_to(client, redirect_uri, own_page):
        raise NotForTheClient(
            f"{client.name} wants your answer sent to an address that is not registered for it. Nothing was sent."
        )
    return client, redirect_uri


def parse_request_untrusted(client: Client, redirect_uri: str, values: Mapping[str, str]) -> AuthorizationRequest:
    """The rest of a request. Raises `Refused`."""
    if values.get("response_type") != "code":
        raise Refused("unsupported_response_type", "This relay knows the response_type code only.")
    if values.get("response_mode", "query") != "query" or "request" in values or "request_uri" in values:
        raise Refused("invalid_request", "This relay takes plain requests and answers in the query only.")
    state = values.get("state")
    if state is not None and len(state) > MAX_STATE:
        raise Refused("invalid_request", f"state is longer than {MAX_STATE} characters.")
    nonce = values.get("nonce")
    if nonce is not None and len(nonce) > MAX_STATE:
        raise Refused("invalid_request", f"nonce is longer than {MAX_STATE} characters.")
    if values.get("access_type", "online") not in ("online", "offline"):
        raise Refused("invalid_request", "access_type must be online or offline.")
    try:
        scopes = parse_untrusted(values.get("scope", ""))
    except InvalidScope as error:
        raise Refused("invalid_scope", str(error)) from error
    if not scopes:
        raise Refused("invalid_scope", "The request names no scope.")
    prompt = frozenset(values.get("prompt", "").split())
    if not prompt <= {"none", "login", "consent", "select_account"} or ("none" in prompt and len(prompt) > 1):
        raise Refused("invalid_request", "prompt holds a word that this relay does not know.")
    return AuthorizationRequest(
        client=client,
        redirect_uri=redirect_uri,
        scopes=scopes,
        state=state,
        offline=values.get("access_type") == "offline",
        challenge=_challenge(client, values),
        nonce=nonce,
        prompt=prompt,
        step_up=_step_up(values),
        message=values.get("session_message", "")[:MAX_MESSAGE],
        label=values.get("prefill_named_grant", "")[:MAX_MESSAGE],
        login_hint=values.get("login_hint", "")[:MAX_MESSAGE],
        query=urlencode(sorted(values.items())),
    )


def _challenge(client: Client, values: Mapping[str, str]) -> str | None:
    challenge = values.get("code_challenge")
    if challenge is None:
        if client.public:
            raise Refused("invalid_request", "An application without a secret must use PKCE (code_challenge).")
        return None
    if values.get("code_challenge_method") != "S256":
        raise Refused("invalid_request", "code_challenge_method must be S256.")
    if _CHALLENGE.fullmatch(challenge) is None:
        raise Refused("invalid_request", "code_challenge is no SHA-256 in base64url.")
    return challenge


def is_verifier_untrusted(text: str) -> bool:
    """Whether a text has the form of a PKCE verifier (RFC 7636, 4.1)."""
    return _VERIFIER.fullmatch(text) is not None


def _step_up(values: Mapping[str, str]) -> StepUp:
    max_age = None
    if "max_age" in values:
        if not values["max_age"].isdecimal() or len(values["max_age"]) > 9:
            raise Refused("invalid_request", "max_age must be a number of seconds.")
        max_age = float(values["max_age"])
    if values.get("session_required_mfa", "false").lower() not in ("true", "false"):
        raise Refused("invalid_request", "session_required_mfa must be true or false.")
    return StepUp(
        identities=_list(values, "session_required_identities"),
        domains=_list(values, "session_required_single_domain"),
        policies=_list(values, "session_required_policies"),
        multi_factor=values.get("session_required_mfa", "false").lower() == "true",
        max_age=max_age,
    )


def _list(values: Mapping[str, str], name: str) -> tuple[str, ...]:
    parts = tuple(dict.fromkeys(part.strip().lower() for part in values.get(name, "").split(",") if part.strip()))
    if len(parts) > MAX_REQUIRED:
        raise Refused("invalid_request", f"{name} has more than {MAX_REQUIRED} entries.")
    return parts


def answer_uri(redirect_uri: str, answer: Sequence[tuple[str, str | None]]) -> str:
    """The redirect address with the answer added to its query; parts that are None are left out."""
    parts = urlsplit(redirect_uri)
    added = urlencode([(name, value) for name, value in answer if value is not None])
    return urlunsplit(parts._replace(query=f"{parts.query}&{added}" if parts.query else added))
