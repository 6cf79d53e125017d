"""A person at a browser, without one: cookies are kept, forms are read from the page and sent back."""

from __future__ import annotations

import base64
import hashlib
import html
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx

from relay.auth import passwords
from relay.auth.browser_sessions import Authentication, open_browser_session
from relay.auth.identities import Identity, add_identity
from relay.pages.browser import SESSION_COOKIE

if TYPE_CHECKING:
    from tests.relay.relay_world import RelayWorld

PASSWORD = "quiet boats go by"
SDK_CLIENT = "61338d24-54d5-408f-a10d-66c06b59f6d2"
LOOPBACK = "http://localhost:43210/"
# One digest for all tests: making it is meant to be slow.
_DIGEST = passwords.digest_of(PASSWORD)


async def add_person(world: RelayWorld, name: str = "ada", password: str | None = None) -> Identity:
    """Somebody with a password: `PASSWORD` unless told otherwise."""
    digest = _DIGEST if password is None else passwords.digest_of(password)

    def work(connection: Any) -> Identity:
        made = add_identity(
            connection,
            username=name if "@" in name else f"{name}@{world.settings.user_domain}",
            now=world.clock.now,
            provider_id="p",
            name=name.title(),
            email=f"{name}@mail.example",
        )
        passwords.store_digest(connection, made.id, digest, world.clock.now)
        return made

    return await world.store.write(work)


@dataclass
class Form:
    """A form of a page: where it leads and what is in it already."""

    action: str
    fields: dict[str, str]


def forms_of(text: str) -> list[Form]:
    """The forms of a page, in order."""
    found = []
    for attributes, body in re.findall(r"<form([^>]*)>(.*?)</form>", text, re.DOTALL):
        action = re.search(r'action="([^"]*)"', attributes)
        fields = {}
        for tag in re.findall(r"<(?:input|button)[^>]*>", body):
            name = re.search(r'name="([^"]*)"', tag)
            value = re.search(r'value="([^"]*)"', tag)
            off = 'type="checkbox"' in tag and " checked" not in tag
            if name is not None and tag.startswith("<input") and not off:
                fields[name[1]] = html.unescape(value[1]) if value else ""
        found.append(Form(html.unescape(action[1]) if action else "", fields))
    return found


@dataclass
class Person:
    """Somebody at a browser of their own."""

    world: RelayWorld
    cookies: dict[str, str] = field(default_factory=dict)

    async def request(
        self, method: str, url: str, data: dict[str, str] | None = None, **headers: str
    ) -> httpx.Response:
        """One request with this browser's cookies, no redirect followed."""
        sent = {"Cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items())} if self.cookies else {}
        self.world.http.cookies.clear()
        answer = await self.world.http.request(
            method, url, data=data, headers={**sent, "User-Agent": "Test browser", **headers}, follow_redirects=False
        )
        for header in answer.headers.get_list("set-cookie"):
            name, _, rest = header.partition("=")
            value = rest.partition(";")[0].strip('"')
            assert all(word in rest for word in ("HttpOnly", "Secure", "SameSite=lax", "Path=/")), header
            if not value or "Max-Age=0" in rest:
                self.cookies.pop(name, None)
            else:
                self.cookies[name] = value
        self.world.http.cookies.clear()
        return answer

    async def get(self, url: str, **headers: str) -> httpx.Response:
        """A page, redirects within the relay followed."""
        answer = await self.request("GET", url, **headers)
        return await self._follow(answer)

    async def post(self, form: Form, **fields: str) -> httpx.Response:
        """Send a form back, filled in."""
        answer = await self.request("POST", form.action, {**form.fields, **fields})
        return await self._follow(answer)

    async def _follow(self, answer: httpx.Response) -> httpx.Response:
        for _ in range(10):
            place = answer.headers.get("location", "")
            if not answer.is_redirect or not place.startswith("/"):
                return answer
            answer = await self.request("GET", place)
        raise AssertionError("redirects without end")

    async def arrive(self, identity: Identity, *methods: str) -> None:
        """Be signed in already, as after the sign-in page."""
        now = self.world.clock.now
        shown = Authentication(identity.id, identity.provider_id, now, methods or ("pwd",))
        cookie = await self.world.store.write(
            lambda connection: open_browser_session(
                connection, shown, life=86400.0, idle=86400.0, address="192.0.2.1", user_agent="Test browser"
            )
        )
        self.cookies[SESSION_COOKIE] = cookie

    async def sign_in(self, name: str = "ada", password: str = PASSWORD, at: str = "/sign-in") -> httpx.Response:
        """Fill in the sign-in page."""
        page = await self.get(at)
        form = next(form for form in forms_of(page.text) if form.action == "/sign-in")
        return await self.post(form, username=name, password=password)


@asynccontextmanager
async def person_at(world: RelayWorld, address: str) -> AsyncIterator[Person]:
    """Somebody who comes from an address."""
    transport = httpx.ASGITransport(app=world.relay.app, client=(address, 1))
    async with httpx.AsyncClient(transport=transport, base_url=world.http.base_url) as http:
        yield Person(replace(world, http=http))


@dataclass
class Application:
    """A native application that asks for a sign-in with PKCE."""

    client_id: str = SDK_CLIENT
    redirect_uri: str = LOOPBACK
    scope: str = "openid profile email"
    verifier: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    state: str = field(default_factory=lambda: secrets.token_urlsafe(8))

    @property
    def challenge(self) -> str:
        return base64.urlsafe_b64encode(hashlib.sha256(self.verifier.encode()).digest()).rstrip(b"=").decode()

    def url(self, **changes: str | None) -> str:
        """The authorize address; a change to None leaves the parameter out."""
        values: dict[str, str | None] = {
            "client_id": self.client_id,
            "redirect_uri": self.redirect_uri,
            "scope": self.scope,
            "state": self.state,
            "response_type": "code",
            "code_challenge": self.challenge,
            "code_challenge_method": "S256",
            "access_type": "offline",
            **changes,
        }
        return "/v2/oauth2/authorize?" + urlencode({k: v for k, v in values.items() if v is not None})

    def answer(self, response: httpx.Response) -> dict[str, str]:
        """What came back at the redirect address."""
        assert response.status_code == 303, response.text
        place = response.headers["location"]
        assert place.startswith(self.redirect_uri), place
        return {name: values[0] for name, values in parse_qs(urlsplit(place).query).items()}

    async def code(self, person: Person, **changes: str | None) -> str:
        """Have somebody who is signed in allow everything; the code that comes of it."""
        page = await person.get(self.url(**changes))
        if page.status_code == 200:
            page = await person.post(forms_of(page.text)[0], decision="allow")
        answer = self.answer(page)
        assert answer["state"] == self.state
        return answer["code"]

    async def redeem(self, world: RelayWorld, code: str, **changes: str | None) -> httpx.Response:
        """Ask for the tokens of a code."""
        values = {
            "grant_type": "authorization_code",
            "code": code,
            "client_id": self.client_id,
            "redirect_uri": self.redirect_uri,
            "code_verifier": self.verifier,
            **changes,
        }
        form = {name: value for name, value in values.items() if value is not None}
        return await world.http.post("/v2/oauth2/token", data=form)
