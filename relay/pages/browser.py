"""The browser behind a request: its cookies, its session, and whether a form it sends is one of ours.

Two cookies, both out of reach for scripts and other hosts: one names the visit and signs forms, the other names the
session of somebody who is signed in. A form counts only with a token made from both, from a page of this relay.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from relay.api.client_authentication import address_of, form_untrusted
from relay.audit.notes import acting
from relay.auth.browser_sessions import BrowserSession, find_browser_session, is_stale, touch
from relay.pages.render import PageProblem
from relay.pages.typed import Typed
from relay.refusal import ApiError
from relay.services import services_of

# The prefix makes browsers refuse the cookie without TLS, for another path or from a sibling host.
SESSION_COOKIE = "__Host-towpath-session"
VISIT_COOKIE = "__Host-towpath-visit"
_MAX_COOKIE = 200
_VISIT_LIFE = 86400
# Where somebody who has signed in may be sent on: our own pages alone.
_DESTINATIONS = ("/v2/oauth2/authorize", "/account", "/device", "/developers")
# For changing how one signs in, the last proof of who one is may be so old, in seconds.
FRESH = 900.0


@dataclass(frozen=True)
class Browser:
    """One browser at the time of one request."""

    request: Request
    visit: str
    cookie: str
    session: BrowserSession | None

    @property
    def form_token(self) -> str:
        """The token that this browser's forms carry."""
        return self._sign("form")

    @property
    def digest(self) -> str:
        """The visit as the database may know it."""
        return hashlib.sha256(self.visit.encode()).hexdigest()

    def _sign(self, text: str) -> str:
        key = f"{self.visit}\0{self.cookie}".encode()
        return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()

    def mark(self, subject: str, now: float) -> str:
        """A note of now that this browser hands back and cannot change; see `marked`."""
        # Rounded down, so that whoever signs in right after the page was shown is not asked again.
        key, text = self.visit.encode(), str(math.floor(now))
        return f"{text}.{hmac.new(key, f'{text} {subject}'.encode(), hashlib.sha256).hexdigest()}"

    def marked(self, mark: str, subject: str) -> float | None:
        """The time of a mark that this browser was given for this subject, or None."""
        text = mark.partition(".")[0]
        if not text.isdecimal() or len(text) > 12:
            return None
        if not mark.isascii() or not hmac.compare_digest(mark, self.mark(subject, float(text))):
            return None
        return float(text)

    async def form(self) -> Mapping[str, str]:
        """The fields of a form of ours. Raises `PageProblem` for a form that is not."""
        self._check_origin()
        try:
            fields = await form_untrusted(self.request)
        except ApiError as error:
            raise PageProblem(error.status, "That did not work", error.message) from error
        if not hmac.compare_digest(fields.get("form_token", "").encode(), self.form_token.encode()):
            raise _foreign()
        return fields

    def _check_origin(self) -> None:
        headers = self.request.headers
        origin = headers.get("origin")
        if origin is not None and origin != f"https://{headers.get('host', '')}":
            raise _foreign()
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            raise _foreign()

    def keep(self, answer: Response) -> None:
        """Make sure that the browser has the visit's cookie."""
        if self.request.cookies.get(VISIT_COOKIE) != self.visit:
            set_cookie(answer, VISIT_COOKIE, self.visit, _VISIT_LIFE)


def _foreign() -> PageProblem:
    return PageProblem(
        403, "That form has expired", "The form was not sent from a page of this relay, or it is too old. Start again."
    )


async def browser_of(request: Request) -> Browser:
    """The browser that sent the request."""
    visit = request.cookies.get(VISIT_COOKIE, "")
    if not 40 <= len(visit) <= _MAX_COOKIE:
        visit = secrets.token_urlsafe(32)
    cookie = request.cookies.get(SESSION_COOKIE, "")
    if not cookie or len(cookie) > _MAX_COOKIE:
        return Browser(request, visit, "", None)
    services = services_of(request)
    now = services.clock()
    session = await services.store.read(lambda connection: find_browser_session(connection, cookie, now))
    if session is None:
        return Browser(request, visit, "", None)
    life, idle = services.settings.sign_in.session_life, services.settings.sign_in.session_idle
    if is_stale(session, now, idle):
        await services.store.write(lambda c: touch(c, session, now, life=life, idle=idle), aside=True)
    acting(request, session.identity.id)
    return Browser(request, visit, cookie, session)


def is_old(request: Request, session: BrowserSession) -> bool:
    """Whether the last proof of who somebody is does not count any more for changing how they sign in, or who may."""
    return services_of(request).clock() - session.authenticated > FRESH


async def again(
    problem: PageProblem, form: str, fields: Mapping[str, str], show: Callable[[Typed], Awaitable[HTMLResponse]]
) -> HTMLResponse:
    """The page of a form that was refused once more, with what was typed and what is wrong.

    ``form`` is its name on the page. Raises the problem itself where typing something else does not help.
    """
    if problem.retry_after is not None:
        raise problem
    answer = await show(Typed.of(form, fields, problem.sentence))
    answer.status_code = problem.status
    return answer


def set_cookie(answer: Response, name: str, value: str, life: float) -> None:
    """Give the browser a cookie that only this host sees, and no script."""
    answer.set_cookie(name, value, max_age=int(life), path="/", secure=True, httponly=True, samesite="lax")


def drop_session_cookie(answer: Response) -> None:
    """Take the session's cookie from the browser."""
    answer.delete_cookie(SESSION_COOKIE, path="/", secure=True, httponly=True, samesite="lax")


def destination_untrusted(text: str) -> str:
    """Where to send somebody after signing in: a path of our own pages, else the account page."""
    parts = urlsplit(text) if _is_plain(text) else None
    if parts is None or parts.scheme or parts.netloc:
        return "/account"
    known = any(parts.path == place or parts.path.startswith(place + "/") for place in _DESTINATIONS)
    return text if known and ".." not in parts.path else "/account"


def _is_plain(text: str) -> bool:
    if not text.startswith("/") or text.startswith("//") or len(text) > 48 * 1024:
        return False
    return all("!" <= c <= "~" and c != "\\" for c in text)


def go(place: str) -> RedirectResponse:
    """Send the browser on with a GET."""
    return RedirectResponse(place, 303, headers={"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"})


def sign_in_link(destination: str) -> str:
    """The sign-in page that leads on to a destination of ours."""
    return f"/sign-in?next={quote(destination, safe='')}"


def where_from(request: Request) -> tuple[str, str]:
    """Address and program of a request, as they are kept with sessions."""
    return address_of(request), request.headers.get("user-agent", "")
