"""Where people type the code that a program on another device shows them (RFC 8628, 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from sqlalchemy import Connection

from relay.audit.notes import note
from relay.auth import consents, device
from relay.auth.browser_sessions import BrowserSession
from relay.auth.clients import Client, find_client
from relay.auth.known_scopes import NotForPerson, ScopeFacts, check_domains, digest_of, expand, leave_out, wishes_of
from relay.auth.linked import set_of
from relay.auth.providers import check_provider
from relay.auth.public_clients import is_nameless, title_of
from relay.auth.scopes import InvalidScope, Scope, parse_untrusted
from relay.auth.session_rules import provider_wishes
from relay.auth.step_up import Unsatisfiable
from relay.pages.account import signed_in
from relay.pages.browser import Browser, again
from relay.pages.render import PageProblem, page
from relay.pages.sign_in import count_failure, limit_guesses
from relay.pages.typed import NOTHING_TYPED, Typed
from relay.services import services_of

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class _Waiting:
    request: device.DeviceRequest
    client: Client
    expanded: dict[str, tuple[Scope, ScopeFacts]]

    @property
    def scopes(self) -> list[Scope]:
        return [scope for scope, _ in self.expanded.values()]


@router.get("/device")
async def ask_for_code(request: Request) -> HTMLResponse:
    """The page that asks for the code. A link may bring the code along; it still has to be confirmed."""
    browser, session = await signed_in(request)
    return await _code_page(browser, session)


async def _code_page(browser: Browser, session: BrowserSession, typed: Typed = NOTHING_TYPED) -> HTMLResponse:
    code = browser.request.query_params.get("user_code", "")[:20]
    answer = page(
        browser.request,
        "device.html",
        form_token=browser.form_token,
        username=session.identity.username,
        code=code if code.replace("-", "").isalpha() else "",
        typed=typed,
    )
    browser.keep(answer)
    return answer


@router.post("/device")
async def check_or_decide(request: Request) -> Response:
    """First show where the request comes from and what it wants; then take in the decision."""
    browser, session = await signed_in(request)
    form = await browser.form()
    code = form.get("user_code", "")
    try:
        waiting = await _find(request, session, code)
    except PageProblem as problem:
        return await again(problem, "code", form, partial(_code_page, browser, session))
    if "decision" not in form:
        return _show(browser, session, waiting, code)
    services = services_of(request)
    now, allowed = services.clock(), form["decision"] == "allow"
    if allowed and form.get("shown") != digest_of(wishes_of(waiting.expanded)):
        return _show(browser, session, waiting, code, changed=True)

    def work(connection: Connection) -> bool:
        note(
            request,
            action="consent" if allowed else "refuse_consent",
            application=waiting.client.id,
            application_name=title_of(waiting.client),
            scope=" ".join(str(scope) for scope in waiting.scopes),
            device=waiting.request.address,
        )
        if not allowed:
            return device.refuse(connection, waiting.request)
        mine, client_id = session.identity.id, waiting.client.id
        refused = leave_out(waiting.expanded, form.keys())
        consents.record(connection, mine, client_id, waiting.scopes, offline=waiting.request.offline, now=now)
        consents.forget_refused(connection, mine, client_id, refused)
        return device.allow(connection, waiting.request, mine, session.authentications.values(), now)

    if not await services.store.write(work):
        raise PageProblem(409, "Too late", "This code was answered already or has expired.")
    if allowed:
        return page(request, "device_done.html", name=title_of(waiting.client))
    raise PageProblem(200, "Not allowed", "Nothing was allowed. You can close this page.")


async def _find(request: Request, session: BrowserSession, code: str) -> _Waiting:
    """The waiting request. Guessing is limited by person and by address. Raises `PageProblem`."""
    services = services_of(request)
    name = f"device code by {session.identity.id}"
    limit_guesses(request, name)
    # Before it is looked at, or as many as come at once would be.
    forgive = count_failure(request, name)

    def look(connection: Connection) -> _Waiting | None:
        found = device.find_request(connection, code, services.clock())
        client = None if found is None else find_client(connection, found.client_id)
        if found is None or client is None:
            return None
        try:
            expanded = expand(connection, parse_untrusted(found.scope).values())
        except InvalidScope:
            return None
        person = set_of(connection, session.identity.id)
        try:
            check_domains((facts for _, facts in expanded.values()), person)
            check_provider(services.settings, client, provider_wishes(connection, client), person)
        except (NotForPerson, Unsatisfiable) as error:
            raise PageProblem(403, "Not for you", str(error)) from error
        return _Waiting(found, client, expanded)

    try:
        waiting = await services.store.read(look)
    except PageProblem:
        # The code was right, whatever else is said of it.
        forgive()
        raise
    if waiting is None:
        raise PageProblem(404, "Unknown code", "This code is not known or has expired. Check it, or begin anew.")
    forgive()
    return waiting


def _show(
    browser: Browser, session: BrowserSession, waiting: _Waiting, code: str, *, changed: bool = False
) -> HTMLResponse:
    wishes = wishes_of(waiting.expanded)
    answer = page(
        browser.request,
        "device_consent.html",
        form_token=browser.form_token,
        code=code,
        name=title_of(waiting.client),
        nameless=is_nameless(waiting.client),
        client_id=waiting.client.id,
        username=session.identity.username,
        wishes=wishes,
        shown=digest_of(wishes),
        changed=changed,
        asked=waiting.request,
    )
    browser.keep(answer)
    return answer
