"""The account pages: who you are here, your sessions, the applications you allowed, your tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from sqlalchemy import Connection

from protocol.errors import ItemFailed
from relay.audit.notes import note
from relay.auth import browser_sessions, consents, linked, passkeys, passwords, service_tokens
from relay.auth.administrators import is_administrator
from relay.auth.browser_sessions import BrowserSession
from relay.auth.clients import find_client
from relay.auth.known_scopes import facts_of
from relay.auth.public_clients import title_of
from relay.pages.browser import Browser, again, browser_of, go, is_old
from relay.pages.render import Look, NotSignedIn, PageProblem, page
from relay.pages.sign_in import Invitation, check_password, elsewhere, sign_in_page
from relay.pages.typed import NOTHING_TYPED, Typed
from relay.quota.requests import count
from relay.refusal import ApiError
from relay.services import services_of
from relay.transfer import task_turns

router = APIRouter(include_in_schema=False)

T = TypeVar("T")
_DAY = 86400.0


async def signed_in(request: Request, *, fresh: bool = False, back: str = "/account") -> tuple[Browser, BrowserSession]:
    """The browser and its session. Raises `NotSignedIn`; with ``fresh``, also when the last proof is old.

    ``back`` is where somebody goes on who sent a form and has to sign in first; they have to send it again.
    """
    browser = await browser_of(request)
    session = browser.session
    if session is None:
        raise NotSignedIn(sign_in_page(browser, Invitation(destination=_here(request, back))))
    services = services_of(request)
    try:
        count(request, services.requests, session.identity.id, services.clock())
    except ApiError as error:
        raise PageProblem(
            429, "Please wait", error.message, retry_after=int(error.headers.get("Retry-After", "60"))
        ) from error
    if fresh and is_old(request, session):
        reason = "Sign in again to change this, and then send the form once more."
        name = session.identity.username
        raise NotSignedIn(
            sign_in_page(browser, Invitation(destination=_here(request, back), reason=reason, username=name))
        )
    return browser, session


def _here(request: Request, back: str) -> str:
    if request.method != "GET":
        return back
    return request.url.path + (f"?{request.url.query}" if request.url.query else "")


async def change(request: Request, session: BrowserSession, work: Callable[[Connection], T]) -> T:
    """Do what a form asks for. Raises `PageProblem` with the sentence of an error for people."""
    try:
        return await services_of(request).store.write(work)
    except ItemFailed as error:
        raise PageProblem(409, "That did not work", error.sentence) from error


@router.get("/")
async def front() -> Response:
    """What people type, and what the tray opens: the address alone."""
    return go("/account")


@router.get("/account")
async def account(request: Request) -> HTMLResponse:
    """Who you are here and how you sign in."""
    browser, session = await signed_in(request)
    return await account_page(browser, session)


async def account_page(browser: Browser, session: BrowserSession, typed: Typed = NOTHING_TYPED) -> HTMLResponse:
    """The page, after a refused form with what was typed into that."""
    services = services_of(browser.request)

    def look(connection: Connection) -> dict[str, Any]:
        person = linked.set_of(connection, session.identity.id)
        return {
            "person": person,
            "passkeys": passkeys.passkeys_of(connection, [identity.id for identity in person]),
            "has_password": passwords.has_password(connection, session.identity.id),
            "administrator": is_administrator(connection, session.identity.id),
        }

    facts = await services.store.read(look)
    sign_in = services.settings.sign_in
    facts |= {
        "providers": sign_in.providers,
        "local": sign_in.local_accounts,
        "relay_url": services.settings.public_url,
    }
    done = browser.request.query_params.get("done", "")
    return _page(browser, session, "account", done=done, typed=typed, **facts)


def _page(browser: Browser, session: BrowserSession, here: str, **values: Any) -> HTMLResponse:
    """One of the account pages."""
    answer = page(
        browser.request,
        f"{here}.html",
        look=Look(elsewhere(services_of(browser.request).settings.sign_in.providers), script=here == "account"),
        form_token=browser.form_token,
        session=session,
        here=here,
        # Ending things is possible at any time.
        stale=here in ("account", "tokens") and is_old(browser.request, session),
        **values,
    )
    browser.keep(answer)
    return answer


@router.post("/account/password")
async def change_password(request: Request) -> Response:
    """Choose a new password; whoever else is signed in with the old one is signed out."""
    browser, session = await signed_in(request, fresh=True)
    form = await browser.form()
    try:
        await _change_password(request, session, form)
    except PageProblem as problem:
        return await again(problem, "password", form, partial(account_page, browser, session))
    return go("/account?done=password")


async def _change_password(request: Request, session: BrowserSession, form: Mapping[str, str]) -> None:
    services = services_of(request)
    identity = session.identity
    if await services.store.read(lambda connection: passwords.has_password(connection, identity.id)):
        if await check_password(request, identity.username, form.get("current", "")) is None:
            raise PageProblem(403, "That did not work", "The present password is wrong.")
    elif identity.provider_id != services.own_provider_id:
        raise PageProblem(403, "Not offered", "You sign in at your provider; it keeps your password.")
    digest = await checked_digest(request, identity.username, form)

    def work(connection: Connection) -> None:
        passwords.store_digest(connection, identity.id, digest, services.clock())
        browser_sessions.end_all_sessions(connection, identity.id, but=session.id)

    await change(request, session, work)


async def checked_digest(request: Request, username: str, form: Any) -> str:
    """The digest of a new password that was typed twice. Raises `PageProblem`."""
    wanted = form.get("password", "")
    if wanted != form.get("again", ""):
        raise PageProblem(400, "That did not work", "The two passwords differ; type them again.")
    try:
        passwords.check_strength(wanted, username)
    except passwords.WeakPassword as error:
        raise PageProblem(400, "That did not work", error.sentence) from error
    return await services_of(request).passwords.digest(wanted)


@router.post("/account/link")
async def link_local(request: Request) -> Response:
    """Link another local account by showing its password."""
    browser, session = await signed_in(request, fresh=True)
    form = await browser.form()
    try:
        other = await check_password(request, form.get("username", ""), form.get("password", ""))
        if other is None:
            raise PageProblem(403, "That did not work", "The username or the password is wrong.")
        mine, second, now = session.identity.id, other.id, services_of(request).clock()
        await change(request, session, lambda connection: linked.link(connection, mine, second, now))
    except PageProblem as problem:
        return await again(problem, "link", form, partial(account_page, browser, session))
    return go("/account?done=link")


@router.post("/account/unlink")
async def unlink(request: Request) -> Response:
    """Let a linked identity stand alone again."""
    browser, session = await signed_in(request, fresh=True)
    wanted = (await browser.form()).get("identity", "")
    mine, services = session.identity.id, services_of(request)
    now = services.clock()

    def work(connection: Connection) -> list[str]:
        linked.unlink(connection, mine, wanted)
        browser_sessions.end_what_was_opened_by(connection, mine, wanted, but=session.id)
        people = [wanted, *(identity.id for identity in linked.set_of(connection, mine))]
        reason = (
            "The permission that this task needs was given to an identity that is not linked to its owner's any more."
        )
        return task_turns.end_of_people_without_access(connection, people, reason, now)

    for task_id in await change(request, session, work):
        services.steward.cut(task_id)
    return go("/account?done=unlink")


@router.post("/account/primary")
async def choose_primary(request: Request) -> Response:
    """Act under another of your identities. All sessions of the browser kind end: they belong to the former one."""
    browser, session = await signed_in(request, fresh=True)
    wanted = (await browser.form()).get("identity", "")

    def work(connection: Connection) -> None:
        linked.make_primary(connection, session.identity.id, wanted)
        browser_sessions.end_all_sessions(connection, session.identity.id)

    await change(request, session, work)
    return go("/sign-in")


@router.get("/account/sessions")
async def sessions(request: Request) -> HTMLResponse:
    """Where you are signed in."""
    browser, session = await signed_in(request)
    services = services_of(request)
    now = services.clock()
    found = await services.store.read(lambda c: browser_sessions.sessions_of(c, session.identity.id, now))
    return _page(browser, session, "sessions", found=found)


@router.post("/account/sessions")
async def end_session(request: Request) -> Response:
    """End one session, or all but this one."""
    browser, session = await signed_in(request)
    wanted = (await browser.form()).get("session", "")
    mine = session.identity.id
    if wanted == "others":
        await change(request, session, lambda c: browser_sessions.end_all_sessions(c, mine, but=session.id))
    else:
        await change(request, session, lambda c: browser_sessions.end_session(c, wanted, mine))
    return go("/account/sessions")


@router.get("/account/applications")
async def applications(request: Request) -> HTMLResponse:
    """What you allowed applications to do."""
    browser, session = await signed_in(request)

    def look(connection: Connection) -> list[dict[str, Any]]:
        return _applications(connection, session.identity.id)

    found = await services_of(request).store.read(look)
    return _page(browser, session, "applications", found=found)


def _applications(connection: Connection, identity_id: str) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for consent in consents.consents_of(connection, identity_id):
        if len(consent.path) > 1:
            continue
        if consent.client_id not in found:
            client = find_client(connection, consent.client_id)
            name = consent.client_name if client is None else title_of(client)
            empty: dict[str, Any] = {"words": [], "used": 0.0, "since": math.inf}
            found[consent.client_id] = {"id": consent.client_id, "name": name, **empty}
        entry = found[consent.client_id]
        facts = facts_of(connection, consent.scope)
        entry["words"].append(consent.scope if facts is None else facts.words)
        entry["used"] = max(entry["used"], consent.last_used)
        entry["since"] = min(entry["since"], consent.created)
    return sorted(found.values(), key=lambda entry: -entry["used"])


@router.post("/account/applications")
async def withdraw(request: Request) -> Response:
    """Take back what an application was allowed."""
    browser, session = await signed_in(request)
    client_id = (await browser.form()).get("client", "")
    note(request, action="withdraw_consent", application=client_id)
    await change(request, session, lambda c: consents.withdraw(c, session.identity.id, client_id))
    return go("/account/applications")


@router.get("/account/tokens")
async def tokens(request: Request) -> HTMLResponse:
    """Your tokens of long life."""
    browser, session = await signed_in(request)
    return await _tokens_page(browser, session)


async def _tokens_page(
    browser: Browser, session: BrowserSession, typed: Typed = NOTHING_TYPED, *, made: str = "", name: str = ""
) -> HTMLResponse:
    services = services_of(browser.request)
    now = services.clock()
    found = await services.store.read(lambda c: service_tokens.tokens_of(c, session.identity.id, now))
    longest = int(services.settings.sign_in.service_token_life // _DAY)
    return _page(browser, session, "tokens", found=found, now=now, longest=longest, made=made, name=name, typed=typed)


@router.post("/account/tokens")
async def change_tokens(request: Request) -> Response:
    """Make a token and show it, this once; or end one."""
    browser, session = await signed_in(request, fresh=True)
    form = await browser.form()
    if "end" in form:
        await change(request, session, lambda c: service_tokens.end(c, session.identity.id, form["end"]))
        return go("/account/tokens")
    try:
        made = await _make_token(request, session, form)
    except PageProblem as problem:
        return await again(problem, "make", form, partial(_tokens_page, browser, session))
    return await _tokens_page(browser, session, made=made, name=form.get("name", ""))


async def _make_token(request: Request, session: BrowserSession, form: Mapping[str, str]) -> str:
    services = services_of(request)
    days = form.get("days", "")
    longest = services.settings.sign_in.service_token_life
    if not days.isdecimal() or len(days) > 5 or not 1 <= int(days) * _DAY <= longest:
        raise PageProblem(400, "That did not work", f"A token counts for 1 to {int(longest // _DAY)} days.")
    name, now = form.get("name", ""), services.clock()
    return await change(
        request,
        session,
        lambda c: service_tokens.make(c, session.identity.id, name, life=int(days) * _DAY, now=now),
    )
