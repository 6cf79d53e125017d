"""Signing in at an upstream OpenID provider: the relay is its client (OpenID Connect Core 1.0, RFC 9700).

Each provider has a redirect address of its own, the state is bound to the browser, the code to a PKCE verifier, the
id_token to a nonce; its issuer, audience, signature and times are checked. What a provider may say is bounded by the
configuration: it names people in its own domains and in no others.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import string
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlencode, urlsplit

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric import rsa

from protocol.errors import NeedsPerson
from relay.auth.identities import CLIENT_DOMAIN, normal_username
from relay.auth.outbound import Answer, Outbound, OutboundFailed
from relay.settings import Provider

_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"]
_LEAST_RSA = 2048
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_LEEWAY = 120
_MAX_AGE = 600
_CACHED = 3600.0
_KEYS_AGAIN = 60.0
_MAX_TEXT = 300
_MAX_SUBJECT = 255


class NotWelcome(NeedsPerson):
    """The provider's word is not taken, or the person may not sign in; the sentence says why."""

    default_code = "NOT_WELCOME"


class Fetch(Protocol):
    """How requests are made; `Outbound` in production."""

    async def request(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Answer:
        """One request. Raises `OutboundFailed`."""
        ...


@dataclass(frozen=True)
class Claims:
    """What a provider says about somebody, checked. ``methods`` are words of RFC 8176."""

    issuer: str
    subject: str
    username: str
    name: str | None
    email: str | None
    organization: str | None
    methods: tuple[str, ...]


class _Discovery(msgspec.Struct, frozen=True):
    issuer: str
    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    userinfo_endpoint: str | None = None
    authorization_response_iss_parameter_supported: bool = False


def provider_identity_id(provider: Provider) -> str:
    """The id of the provider as Globus's documents name it."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, provider.issuer))


class Upstream:
    """One provider of the configuration."""

    def __init__(
        self, provider: Provider, directory: Path, clock: Callable[[], float], fetch: Fetch | None = None
    ) -> None:
        self.provider = provider
        self._directory = directory
        self._clock = clock
        ca_file = None if provider.ca_file is None else str(directory / provider.ca_file)
        self._fetch = fetch or Outbound(private=provider.private_addresses, ca_file=ca_file)
        self._discovery: tuple[float, _Discovery] | None = None
        self._keys: tuple[float, Mapping[str, Any]] | None = None

    async def authorization_url(self, redirect_uri: str, *, state: str, nonce: str, verifier: str) -> str:
        """Where to send the browser. Raises `OutboundFailed` and `NotWelcome`."""
        found = await self._discover()
        digest = hashlib.sha256(verifier.encode()).digest()
        query = {
            "response_type": "code",
            "client_id": self.provider.client_id,
            "redirect_uri": redirect_uri,
            "scope": " ".join(self.provider.scopes),
            "state": state,
            "nonce": nonce,
            "code_challenge": base64.urlsafe_b64encode(digest).rstrip(b"=").decode(),
            "code_challenge_method": "S256",
        }
        join = "&" if urlsplit(found.authorization_endpoint).query else "?"
        return f"{found.authorization_endpoint}{join}{urlencode(query)}"

    async def check_issuer(self, issuer: str | None) -> None:
        """Look at the ``iss`` of an answer (RFC 9207). Raises `NotWelcome` when the answer is another provider's."""
        found = await self._discover()
        if issuer is None and not found.authorization_response_iss_parameter_supported:
            return
        if issuer != self.provider.issuer:
            raise NotWelcome("The answer came from another provider than the one that was asked.")

    async def claims(self, code: str, redirect_uri: str, *, nonce: str, verifier: str) -> dict[str, Any]:
        """What the provider says for a code, its signature and binding checked.

        Raises `OutboundFailed` and `NotWelcome`.
        """
        found = await self._discover()
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect_uri,
            "code_verifier": verifier,
            "client_id": self.provider.client_id,
        }
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        secret = self._secret()
        if secret is not None:
            pair = f"{quote(self.provider.client_id, safe='')}:{quote(secret, safe='')}"
            headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
            del form["client_id"]
        answer = await self._fetch.request("POST", found.token_endpoint, headers=headers, body=urlencode(form).encode())
        document = _object_untrusted(answer, "its token endpoint")
        claims = await self._checked(str(document.get("id_token", "")), nonce)
        access = document.get("access_token")
        if found.userinfo_endpoint is not None and isinstance(access, str) and access.isascii():
            claims = await self._with_userinfo(found.userinfo_endpoint, access, claims)
        return claims

    async def _with_userinfo(self, url: str, access_token: str, claims: dict[str, Any]) -> dict[str, Any]:
        answer = await self._fetch.request("GET", url, headers={"Authorization": f"Bearer {access_token}"})
        more = _object_untrusted(answer, "its userinfo endpoint")
        # OpenID Connect Core 1.0, 5.3.2: another subject means that the answer was swapped.
        if more.get("sub") != claims["sub"]:
            raise NotWelcome("The provider spoke of two different people.")
        return {**more, **claims}

    async def _checked(self, id_token: str, nonce: str) -> dict[str, Any]:
        try:
            header = jwt.get_unverified_header(id_token)
            key = await self._key(header.get("kid"))
            claims: dict[str, Any] = jwt.decode(
                id_token,
                key,
                algorithms=_ALGORITHMS,
                audience=self.provider.client_id,
                issuer=self.provider.issuer,
                # Times are compared below, with the relay's own clock.
                options={
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_nbf": False,
                    "require": ["sub", "exp", "iat"],
                },
            )
        except (jwt.PyJWTError, TypeError, ValueError, RecursionError) as error:
            # TypeError and ValueError when the token names an algorithm that its key is not for.
            raise NotWelcome("The provider's id_token is not valid.") from error
        now, issued, expires = self._clock(), claims["iat"], claims["exp"]
        if not isinstance(issued, int | float) or not isinstance(expires, int | float):
            raise NotWelcome("The provider's id_token has no times.")
        if not issued - _LEEWAY <= now <= expires + _LEEWAY or now - issued > _MAX_AGE + _LEEWAY:
            raise NotWelcome("The provider's id_token is not of now; compare the clocks of both servers.")
        if not hmac.compare_digest(str(claims.get("nonce", "")).encode(), nonce.encode()):
            raise NotWelcome("The provider's id_token was not made for this sign-in.")
        if claims.get("azp", self.provider.client_id) != self.provider.client_id:
            raise NotWelcome("The provider's id_token was made for another application.")
        subject = claims["sub"]
        if not isinstance(subject, str) or not 1 <= len(subject) <= _MAX_SUBJECT:
            raise NotWelcome("The provider names nobody.")
        return claims

    async def _key(self, kid: str | None) -> Any:
        for again in (False, True):
            keys = await self._key_set(again=again)
            for key in keys.get("keys", []) if isinstance(keys.get("keys"), list) else []:
                if isinstance(key, dict) and (kid is None or key.get("kid") == kid) and key.get("use", "sig") == "sig":
                    return _strong(jwt.PyJWK(key).key)
        raise NotWelcome("The provider signed with a key that it does not publish.")

    async def _key_set(self, *, again: bool) -> Mapping[str, Any]:
        now = self._clock()
        # A provider that has changed its keys is asked again, but not for every made-up name of a key.
        if self._keys is not None and now - self._keys[0] < (_KEYS_AGAIN if again else _CACHED):
            return self._keys[1]
        found = await self._discover()
        keys = _object_untrusted(await self._fetch.request("GET", found.jwks_uri), "its keys")
        self._keys = (now, keys)
        return keys

    async def _discover(self) -> _Discovery:
        now = self._clock()
        if self._discovery is not None and now - self._discovery[0] < _CACHED:
            return self._discovery[1]
        issuer = self.provider.issuer
        answer = await self._fetch.request("GET", f"{issuer.rstrip('/')}/.well-known/openid-configuration")
        if answer.status != 200:
            raise OutboundFailed(f"{self.provider.name} does not describe itself (status {answer.status}).")
        try:
            found = msgspec.json.decode(answer.body, type=_Discovery)
        except _UNREADABLE as error:
            raise OutboundFailed(f"{self.provider.name} describes itself in a form that cannot be read.") from error
        # OpenID Connect Discovery 1.0, 4.3: or one provider could speak for another.
        if found.issuer != issuer:
            raise NotWelcome(f"{self.provider.name} calls itself another issuer than the configuration does.")
        places = [found.authorization_endpoint, found.token_endpoint, found.jwks_uri, found.userinfo_endpoint]
        if not all(place is None or place.startswith("https://") for place in places):
            raise NotWelcome(f"{self.provider.name} names an address that is not https.")
        self._discovery = (now, found)
        return found

    def _secret(self) -> str | None:
        if self.provider.client_secret_file is None:
            return None
        path = self._directory / self.provider.client_secret_file
        try:
            return path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise NotWelcome(f"The relay's secret for {self.provider.name} cannot be read.") from error


def _strong(key: Any) -> Any:
    """The key, unless anybody could find out its private half (RFC 7518, 3.3). Raises `NotWelcome`."""
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < _LEAST_RSA:
        raise NotWelcome("The provider signs with a key that is too short.")
    return key


def _object_untrusted(answer: Answer, what: str) -> dict[str, Any]:
    if answer.status != 200:
        raise OutboundFailed(f"The provider refused at {what} (status {answer.status}).")
    try:
        document = msgspec.json.decode(answer.body, type=dict[str, Any])
    except _UNREADABLE as error:
        raise OutboundFailed(f"The provider's answer at {what} cannot be read.") from error
    return document


def person_untrusted(
    provider: Provider, claims: Mapping[str, Any], own_domain: str, providers: Sequence[Provider]
) -> Claims:
    """Who somebody is here, by what the provider says and what the configuration lets it say. Raises `NotWelcome`.

    A provider names people in its own ``domains``; with ``*`` in any that is not the relay's or another provider's.
    """
    reserved = {own_domain, CLIENT_DOMAIN}
    reserved |= {domain for other in providers if other.id != provider.id for domain in other.domains}
    for template in provider.usernames:
        username = _filled(template, claims)
        if username is None:
            continue
        domain = username.rpartition("@")[2]
        if domain in reserved or not (domain in provider.domains or "*" in provider.domains):
            continue
        if not _is_allowed(provider, username):
            raise NotWelcome(f"{username} is not among those who may sign in here; ask the relay's operator.")
        return Claims(
            issuer=provider.issuer,
            subject=str(claims["sub"]),
            username=username,
            name=_text(claims.get("name")),
            email=_text(claims.get("email")),
            organization=_text(claims.get("organization")),
            methods=("mfa",) if "mfa" in (claims.get("amr") or ()) else (),
        )
    raise NotWelcome(f"{provider.name} gives you no name that this relay takes from it.")


def _filled(template: str, claims: Mapping[str, Any]) -> str | None:
    parts = []
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is not None:
            value = claims.get(name)
            if not isinstance(value, str) or not value:
                return None
            # An address that the provider has not verified may be anybody's. Some say so with a text.
            if name == "email" and str(claims.get("email_verified", True)).lower() not in ("true", "none"):
                return None
            parts.append(value)
    try:
        return normal_username("".join(parts))
    except ValueError:
        return None


def _is_allowed(provider: Provider, username: str) -> bool:
    domain = username.rpartition("@")[2]
    return not provider.allow or any(entry.lower() in (username, domain) for entry in provider.allow)


def _text(value: object) -> str | None:
    if not isinstance(value, str):
        return None
    plain = "".join(c for c in value[:_MAX_TEXT] if c.isprintable()).strip()
    return plain or None
