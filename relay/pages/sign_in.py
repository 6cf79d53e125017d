"""Signing in at the relay's own page, and out again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from sqlalchemy import Connection, delete

from relay.api.client_authentication import caller_of
from relay.audit.notes import acting, note
from relay.auth.browser_sessions import (
    Authentication,
    BrowserSession,
    note_authentication,
    open_browser_session,
    renew_cookie,
)
from relay.auth.identities import Identity, select_by_ids, select_by_usernames
from relay.auth.linked import primary_of
from relay.auth.public_clients import client_for, may_redirect_to
from relay.auth.upstream import provider_identity_id
from relay.pages.browser import (
    SESSION_COOKIE,
    Browser,
    browser_of,
    destination_untrusted,
    drop_session_cookie,
    go,
    set_cookie,
    where_from,
)
from relay.pages.render import Look, PageProblem, page
from relay.services import Services, services_of
from relay.settings import Provider
from relay.store.sign_in_tables import browser_sessions

router = APIRouter(include_in_schema=False)

PASSWORD = ("pwd",)
# One answer for an unknown name and a wrong password.
_WRONG = "The username or the password is wrong."


@dataclass(frozen=True)
class Invitation:
    """What the sign-in page says and offers. ``reason`` is our own sentence, ``message`` the application's.

    ``provider`` is the id of the one to offer first.
    """

    destination: str = "/account"
    reason: str = ""
    message: str = ""
    application: str = ""
    username: str = ""
    error: str = ""
    provider: str | None = None
    form_targets: Sequence[str] = ()


def sign_in_page(browser: Browser, invitation: Invitation, status: int = 200) -> HTMLResponse:
    """The page on which people show who they are."""
    settings = services_of(browser.request).settings
    targets = [*invitation.form_targets, *elsewhere(settings.sign_in.providers)]
    answer = page(
        browser.request,
        "sign_in.html",
        status=status,
        look=Look(targets, script=settings.sign_in.local_accounts),
        form_token=browser.form_token,
        invitation=invitation,
        local=settings.sign_in.local_accounts,
        domain=settings.user_domain,
        # The one that the application wishes for comes first.
        providers=sorted(settings.sign_in.providers, key=lambda one: provider_identity_id(one) != invitation.provider),
        signed_in=None if browser.session is None else browser.session.identity.username,
    )
    browser.keep(answer)
    return answer


def elsewhere(providers: Sequence[Provider]) -> list[str]:
    """What forms that lead to a provider need: where its pages are is for it to say."""
    return ["https:"] if providers else []


@router.get("/sign-in")
async def show(request: Request) -> HTMLResponse:
    """The sign-in page."""
    browser = await browser_of(request)
    destination = destination_untrusted(request.query_params.get("next", ""))
    targets = await form_targets(services_of(request), destination)
    return sign_in_page(browser, Invitation(destination=destination, form_targets=targets))


@router.post("/sign-in")
async def sign_in(request: Request) -> Response:
    """Sign in with a username and a password."""
    browser = await browser_of(request)
    services = services_of(request)
    form = await browser.form()
    destination = destination_untrusted(form.get("next", ""))
    if not services.settings.sign_in.local_accounts:
        raise PageProblem(403, "Not offered", "This relay has no passwords of its own; sign in at a provider.")
    identity = await check_password(request, form.get("username", ""), form.get("password", ""))
    if identity is None:
        targets = await form_targets(services, destination)
        username = form.get("username", "")[:320]
        again = Invitation(destination=destination, username=username, error=_WRONG, form_targets=targets)
        return sign_in_page(browser, again, status=401)
    return await welcome(browser, identity, PASSWORD, destination)


async def check_password(request: Request, username: str, password: str) -> Identity | None:
    """The identity, when the password is its own. Raises `PageProblem` 429 when there was too much guessing."""
    services = services_of(request)
    name = username.strip().lower()
    if "@" not in name:
        name = f"{name}@{services.settings.user_domain}"
    limit_guesses(request, name)
    # Before it is looked at, or as many as come at once would be.
    forgive = count_failure(request, name)
    found = (await services.store.read(lambda connection: select_by_usernames(connection, [name]))).get(name)
    usable = found if found is not None and found.kind == "login" and found.status in ("used", "private") else None
    if await services.passwords.check(None if usable is None else usable.id, password):
        forgive()
        return usable
    return None


def guesser_of(request: Request, what: str) -> str:
    """The name for `limit_guesses` where there is nothing to guess at, as with a link or a passkey: what is counted for
    all addresses together would only keep everybody out."""
    return f"{what} from {caller_of(request)}"


def limit_guesses(request: Request, name: str) -> None:
    """Make those wait who have guessed too often: at one name from one address, at one name, or from one address.

    Raises `PageProblem` 429.
    """
    services = services_of(request)
    now, caller = services.clock(), caller_of(request)
    wait = max(
        services.guesses.retry_after([f"{caller} {name}"], now),
        services.crowd_guesses.retry_after([f"{caller} *", f"account {name}"], now),
    )
    if wait > 0:
        minutes = math.ceil(wait / 60)
        sentence = f"There were too many wrong tries. Try again in {minutes} minute{'' if minutes == 1 else 's'}."
        raise PageProblem(429, "Please wait", sentence, retry_after=math.ceil(wait))


def count_failure(request: Request, name: str) -> Callable[[], None]:
    """A guess at a name was wrong. Returns what takes that back."""
    services = services_of(request)
    now, caller = services.clock(), caller_of(request)
    pair, crowd = [f"{caller} {name}"], [f"{caller} *", f"account {name}"]
    services.guesses.failed(pair, now)
    services.crowd_guesses.failed(crowd, now)

    def forgive() -> None:
        services.guesses.forgive(pair, now)
        services.crowd_guesses.forgive(crowd, now)

    return forgive


async def welcome(browser: Browser, identity: Identity, methods: tuple[str, ...], destination: str) -> Response:
    """Sign an identity in that has just shown who it is, and send the browser on.

    The same person's session goes on under a new cookie; anybody else's ends first, so that no session changes hands.
    """
    services = services_of(browser.request)
    now = services.clock()
    shown = Authentication(identity.id, identity.provider_id, now, methods)
    address, agent = where_from(browser.request)
    life, idle = services.settings.sign_in.session_life, services.settings.sign_in.session_idle

    def work(connection: Connection) -> str | None:
        # Who signs in is let in as the person's primary identity.
        both = {identity.id, primary_of(connection, identity.id)}
        current = select_by_ids(connection, both)
        if len(current) < len(both) or any(one.status == "closed" for one in current.values()):
            return None
        acting(browser.request, identity.id)
        note(browser.request, action="sign_in", identity=identity.id, methods=" ".join(methods))
        session = browser.session
        if session is not None and session.identity.id == primary_of(connection, identity.id):
            note_authentication(connection, session.id, shown)
            return renew_cookie(connection, session.id)
        if session is not None:
            connection.execute(delete(browser_sessions).where(browser_sessions.c.id == session.id))
        return open_browser_session(connection, shown, life=life, idle=idle, address=address, user_agent=agent)

    cookie = await services.store.write(work)
    if cookie is None:
        raise PageProblem(403, "This account is closed", "Ask the relay's operator.")
    answer = go(destination)
    set_cookie(answer, SESSION_COOKIE, cookie, life)
    browser.keep(answer)
    return answer


@router.post("/sign-out")
async def sign_out(request: Request) -> Response:
    """End the browser's session."""
    browser = await browser_of(request)
    await browser.form()
    return await _ended(browser, go("/sign-in"))


@router.get("/v2/web/logout")
async def log_out(request: Request) -> Response:
    """End the browser's session on behalf of an application, and lead back to it where that is allowed.

    A link elsewhere can do this; images and frames cannot, since the cookie does not travel with them.
    """
    browser = await browser_of(request)
    target, name = await _way_back(request)
    answer = page(request, "signed_out.html", target=target, name=name)
    return await _ended(browser, answer)


async def _way_back(request: Request) -> tuple[str | None, str]:
    client_id = request.query_params.get("client_id", "")
    target = request.query_params.get("redirect_uri") or request.query_params.get("redirect", "")
    if not client_id or not target:
        return None, ""
    client = await services_of(request).store.read(
        lambda connection: client_for(connection, client_id, unregistered=False)
    )
    origin = origin_of(target)
    if client is None or origin is None or origin not in {origin_of(uri) for uri in client.redirect_uris}:
        return None, ""
    return target, client.name


async def _ended(browser: Browser, answer: Response) -> Response:
    session = browser.session
    if session is not None:
        note(browser.request, action="sign_out")
        await end_one(services_of(browser.request), session)
    drop_session_cookie(answer)
    return answer


async def end_one(services: Services, session: BrowserSession) -> None:
    """End a browser session."""
    this = browser_sessions.c.id == session.id
    await services.store.write(lambda connection: connection.execute(delete(browser_sessions).where(this)).rowcount)


def origin_of(uri: str) -> str | None:
    """Scheme, host and port of a web address, or None for what is none."""
    try:
        parts = urlsplit(uri)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            return None
        _ = parts.port
    except ValueError:
        return None
    if any(c in parts.netloc for c in " ;,'\"\\@") or not parts.netloc.isascii():
        return None
    return f"{parts.scheme}://{parts.netloc}"


def targets_of(redirect_uri: str, own: str) -> list[str]:
    """What a page's forms may lead to so that the browser can go on to an application.

    Browsers apply the policy to every redirect that follows a form, and an application on the web may have its own.
    """
    origin = origin_of(redirect_uri)
    if origin is None or origin == own:
        return []
    return [origin, "https:"] if origin.startswith("https:") else [origin]


async def form_targets(services: Services, destination: str) -> list[str]:
    """The same for a destination of ours, which may be the authorize route on behalf of an application."""
    parts = urlsplit(destination)
    if parts.path != "/v2/oauth2/authorize":
        return []
    values = dict(parse_qsl(parts.query))
    settings = services.settings
    client = await services.store.read(
        lambda connection: client_for(
            connection, values.get("client_id", ""), unregistered=settings.sign_in.unregistered_clients
        )
    )
    redirect_uri = values.get("redirect_uri", "")
    own_page = f"{settings.public_url}/v2/web/auth-code"
    if client is None or not may_redirect_to(client, redirect_uri, own_page):
        return []
    return targets_of(redirect_uri, settings.public_url)
