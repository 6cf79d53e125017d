"""Where one-time links lead: the first administrator makes an account, people choose their password."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from sqlalchemy import Connection

from protocol.errors import ItemFailed
from relay.auth import administrators, browser_sessions, one_time_links, passwords
from relay.auth.identities import Identity, add_identity, normal_username, select_by_ids, select_by_usernames
from relay.auth.linked import primary_of
from relay.auth.one_time_links import OneTimeLink
from relay.pages.account import checked_digest
from relay.pages.browser import Browser, again, browser_of
from relay.pages.render import PageProblem, page
from relay.pages.sign_in import PASSWORD, count_failure, guesser_of, limit_guesses, welcome
from relay.pages.typed import NOTHING_TYPED, Typed
from relay.services import Services, services_of

router = APIRouter(include_in_schema=False)


def _gone() -> PageProblem:
    return PageProblem(404, "This link does not work", "It was used already, is too old, or was not copied whole.")


@router.get("/welcome")
async def show(request: Request) -> HTMLResponse:
    """What a link is for. Looking does not use it up: mail programs look, too."""
    browser = await browser_of(request)
    key = request.query_params.get("key", "")
    link, identity = await _look(request, key)
    return await _page(browser, key, link, identity)


async def _page(
    browser: Browser, key: str, link: OneTimeLink, identity: Identity | None, typed: Typed = NOTHING_TYPED
) -> HTMLResponse:
    answer = page(
        browser.request,
        "welcome.html",
        form_token=browser.form_token,
        key=key,
        purpose=link.purpose,
        username=None if identity is None else identity.username,
        domain=services_of(browser.request).settings.user_domain,
        least=passwords.MIN_LENGTH,
        typed=typed,
    )
    browser.keep(answer)
    return answer


async def _look(request: Request, key: str) -> tuple[OneTimeLink, Identity | None]:
    services = services_of(request)
    guesser = guesser_of(request, "link")
    limit_guesses(request, guesser)

    def look(connection: Connection) -> tuple[OneTimeLink, Identity | None] | None:
        link = one_time_links.look(connection, key, services.clock())
        if link is None:
            return None
        identity_id = link.identity_id
        return link, None if identity_id is None else select_by_ids(connection, [identity_id]).get(identity_id)

    found = await services.store.read(look)
    if found is None:
        count_failure(request, guesser)
        raise _gone()
    return found


@router.post("/welcome")
async def use(request: Request) -> Response:
    """Use a link up and sign in."""
    browser = await browser_of(request)
    form = await browser.form()
    key = form.get("key", "")
    link, identity = await _look(request, key)
    try:
        signed = await _use(request, form, link, identity)
    except PageProblem as problem:
        return await again(problem, "account", form, partial(_page, browser, key, link, identity))
    if signed is None:
        raise _gone()
    return await welcome(browser, signed, PASSWORD, "/account")


async def _use(
    request: Request, form: Mapping[str, str], link: OneTimeLink, identity: Identity | None
) -> Identity | None:
    """Who has an account with a password now; None when somebody else was faster."""
    services, key = services_of(request), form.get("key", "")
    username = _username(services, form.get("username", "")) if identity is None else identity.username
    digest = await checked_digest(request, username, form)
    now = services.clock()

    def work(connection: Connection) -> Identity | None:
        if one_time_links.use(connection, key, now) is None:
            return None
        who = identity
        if link.purpose == "administrator":
            who = _own_account(connection, services, username, form.get("name", ""), now)
            administrators.make_administrator(connection, who.id, now)
        assert who is not None
        passwords.store_digest(connection, who.id, digest, now)
        browser_sessions.end_all_sessions(connection, primary_of(connection, who.id))
        return who

    try:
        return await services.store.write(work)
    except ItemFailed as error:
        raise PageProblem(409, "That did not work", error.sentence) from error


def _username(services: Services, text: str) -> str:
    name = text.strip()
    full = name if "@" in name else f"{name}@{services.settings.user_domain}"
    try:
        normal = normal_username(full)
    except ValueError as error:
        raise PageProblem(400, "That did not work", str(error)) from error
    if not normal.endswith("@" + services.settings.user_domain):
        raise PageProblem(400, "That did not work", f"Your username here ends in @{services.settings.user_domain}.")
    return normal


def _own_account(connection: Connection, services: Services, username: str, name: str, now: float) -> Identity:
    """A new account of this relay's own; one that was added on the command line and has no password yet will do."""
    known = select_by_usernames(connection, [username]).get(username)
    if known is None:
        return add_identity(
            connection,
            username=username,
            now=now,
            provider_id=services.own_provider_id,
            name=name.strip()[:200] or None,
        )
    if known.kind != "login" or known.status == "closed" or passwords.has_password(connection, known.id):
        raise ItemFailed(f"There is already a user {username}; choose another name.", code="EXISTS")
    return known
