"""Where applications send people: sign in if need be, see in words what is asked for, allow or refuse.

Every step reads the whole request again from its text; nothing is kept on the way, so nothing can be mixed up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from sqlalchemy import Connection

from relay.applications import registration
from relay.applications.registration import Registered
from relay.audit.notes import note
from relay.auth import consents
from relay.auth.authorization import (
    MAX_QUERY,
    AuthorizationRequest,
    NotForTheClient,
    Refused,
    answer_uri,
    check_target,
    parse_request_untrusted,
    single_values_untrusted,
)
from relay.auth.browser_sessions import BrowserSession
from relay.auth.codes import issue_code
from relay.auth.identities import Identity
from relay.auth.known_scopes import NotForPerson, ScopeFacts, check_domains, digest_of, expand, leave_out, wishes_of
from relay.auth.linked import set_of
from relay.auth.providers import check_provider
from relay.auth.public_clients import client_for, ensure_row, is_nameless, title_of
from relay.auth.scopes import InvalidScope, Scope
from relay.auth.session_rules import provider_wishes, rules_of
from relay.auth.step_up import Lacking, Unsatisfiable, lacking
from relay.pages.browser import Browser, browser_of, go
from relay.pages.render import Look, PageProblem, page
from relay.pages.sign_in import Invitation, origin_of, sign_in_page, targets_of
from relay.services import Services, services_of

router = APIRouter(tags=["Auth"])

# The name under which the time of the request travels through the sign-in page and back.
_MARK = "towpath_since"
_MARK_LIFE = 3600.0
# What `relay.auth.codes` makes: nothing that a terminal, or somebody who reads it, could take for an order.
_CODE = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True)
class Asking:
    """A request with all that is needed to decide about it."""

    request: AuthorizationRequest
    expanded: dict[str, tuple[Scope, ScopeFacts]]
    person: list[Identity]
    covered: bool
    registered: Registered | None


@router.get("/v2/oauth2/authorize", response_model=None)
async def authorize(request: Request) -> Response:
    """Ask whoever is at the browser whether an application may act for them (RFC 6749, 3.1)."""
    browser = await browser_of(request)
    query = request.url.query
    asked = await _read(request, query)
    if not isinstance(asked, AuthorizationRequest):
        return asked
    try:
        return await _answer(browser, asked, request.query_params.get(_MARK, ""))
    except Refused as error:
        return _tell(request, asked.redirect_uri, error, asked.state)


@router.post("/v2/oauth2/authorize", include_in_schema=False, response_model=None)
async def decide(request: Request) -> Response:
    """Take in what the person decided on the page."""
    browser = await browser_of(request)
    form = await browser.form()
    asked = await _read(request, form.get("query", ""))
    if not isinstance(asked, AuthorizationRequest):
        return asked
    if browser.session is None:
        return await _answer(browser, asked, "")
    if form.get("decision") != "allow":
        note(request, action="refuse_consent", application=asked.client.id, scope=asked.scope)
        return _tell(request, asked.redirect_uri, Refused("access_denied", "The person refused."), asked.state)
    try:
        asking = await _asking(services_of(request), asked, browser.session)
        missing = await _missing(browser, browser.session, asked, asking.person, form.get("since", ""))
        if missing is not None:
            return await _sign_in(browser, asked, missing, form.get("since", ""))
        if form.get("shown") != digest_of(wishes_of(asking.expanded)):
            return _consent_page(browser, browser.session, asking, form.get("since", ""), changed=True)
        return await _allow(browser, asking, browser.session, leave_out(asking.expanded, form.keys()))
    except Refused as error:
        return _tell(request, asked.redirect_uri, error, asked.state)


async def _read(request: Request, query: str) -> AuthorizationRequest | Response:
    """The request; an answer at once where it cannot be. Raises `PageProblem` where nothing may be sent anywhere."""
    services = services_of(request)
    settings = services.settings
    try:
        if len(query) > MAX_QUERY:
            raise NotForTheClient("The link is too long.")
        try:
            pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=100, errors="strict")
        except ValueError as error:
            raise NotForTheClient("The link cannot be read.") from error
        values = single_values_untrusted((name, value) for name, value in pairs if name != _MARK)
        found = await services.store.read(
            lambda connection: client_for(
                connection, values.get("client_id", ""), unregistered=settings.sign_in.unregistered_clients
            )
        )
        client, redirect_uri = check_target(found, values, settings.public_url)
    except NotForTheClient as error:
        raise PageProblem(400, "This link does not work", str(error)) from error
    try:
        return parse_request_untrusted(client, redirect_uri, values)
    except Refused as error:
        return _tell(request, redirect_uri, error, values.get("state"))


async def _answer(browser: Browser, asked: AuthorizationRequest, mark: str) -> Response:
    """The next step: sign-in page, consent page, or the code. Raises `Refused`."""
    services = services_of(browser.request)
    silent = "none" in asked.prompt
    session = browser.session
    if session is None:
        if silent:
            raise Refused("login_required", "Nobody is signed in.")
        return await _sign_in(browser, asked, Lacking(""), "")
    asking = await _asking(services, asked, session)
    missing = await _missing(browser, session, asked, asking.person, mark)
    if missing is not None:
        if silent:
            raise Refused("login_required", missing.sentence)
        return await _sign_in(browser, asked, missing, mark)
    native = asked.client.public or asked.client.parent_id is not None
    # Nobody can tell one native application from another, so these are never let in unseen (RFC 8252, 8.6).
    if asking.covered and not native and "consent" not in asked.prompt:
        return await _allow(browser, asking, session)
    if silent:
        raise Refused("consent_required", "The person has not consented to this.")
    return _consent_page(browser, session, asking, mark)


async def _asking(services: Services, asked: AuthorizationRequest, session: BrowserSession) -> Asking:
    def work(connection: Connection) -> Asking:
        try:
            expanded = expand(connection, asked.scopes.values())
        except InvalidScope as error:
            raise Refused("invalid_scope", str(error)) from error
        person = set_of(connection, session.identity.id)
        try:
            check_domains((facts for _, facts in expanded.values()), person)
            check_provider(services.settings, asked.client, provider_wishes(connection, asked.client), person)
        except (NotForPerson, Unsatisfiable) as error:
            raise Refused("access_denied", str(error)) from error
        covered = consents.covers(
            connection,
            session.identity.id,
            asked.client.id,
            [scope for scope, _ in expanded.values()],
            offline=asked.offline,
        )
        return Asking(asked, expanded, person, covered, registration.find(connection, asked.client.id))

    return await services.store.read(work)


async def _missing(
    browser: Browser, session: BrowserSession, asked: AuthorizationRequest, person: Sequence[Identity], mark: str
) -> Lacking | None:
    services = services_of(browser.request)
    not_before = -math.inf
    if asked.prompt & {"login", "select_account"}:
        since = browser.marked(mark, asked.query)
        # Whole seconds travel; without a mark, whatever was shown before this request does not count.
        not_before = math.inf if since is None or services.clock() - since > _MARK_LIFE else since
    try:
        rules = await services.store.read(lambda connection: rules_of(connection, asked.step_up.policies))
        return lacking(
            asked.step_up, rules, person, session.authentications, not_before=not_before, now=services.clock()
        )
    except Unsatisfiable as error:
        raise Refused("access_denied", str(error)) from error


async def _sign_in(browser: Browser, asked: AuthorizationRequest, missing: Lacking, mark: str) -> HTMLResponse:
    services = services_of(browser.request)
    since = browser.marked(mark, asked.query)
    if since is None or services.clock() - since > _MARK_LIFE:
        mark = browser.mark(asked.query, services.clock())
    destination = f"/v2/oauth2/authorize?{asked.query}&{urlencode({_MARK: mark})}"
    wishes = await services.store.read(lambda connection: provider_wishes(connection, asked.client))
    return sign_in_page(
        browser,
        Invitation(
            destination=destination,
            reason=missing.sentence,
            message=asked.message,
            application=title_of(asked.client),
            username=missing.hint or asked.login_hint,
            provider=wishes.required or wishes.preselected,
            form_targets=targets_of(asked.redirect_uri, services.settings.public_url),
        ),
    )


def _consent_page(
    browser: Browser, session: BrowserSession, asking: Asking, mark: str, *, changed: bool = False
) -> HTMLResponse:
    asked, wishes = asking.request, wishes_of(asking.expanded)
    own = services_of(browser.request).settings.public_url
    target = origin_of(asked.redirect_uri)
    answer = page(
        browser.request,
        "consent.html",
        look=Look(targets_of(asked.redirect_uri, own)),
        form_token=browser.form_token,
        query=asked.query,
        since=mark,
        name=title_of(asked.client),
        client_id=asked.client.id,
        nameless=is_nameless(asked.client),
        username=session.identity.username,
        wishes=wishes,
        shown=digest_of(wishes),
        changed=changed,
        offline=asked.offline,
        registered=asking.registered,
        label=asked.label,
        message=asked.message,
        goes_to="a page that shows you a code" if target == own else (target or asked.redirect_uri),
    )
    browser.keep(answer)
    return answer


async def _allow(
    browser: Browser, asking: Asking, session: BrowserSession, refused: Sequence[tuple[str, str]] = ()
) -> Response:
    services = services_of(browser.request)
    asked, now = asking.request, services.clock()

    def work(connection: Connection) -> str:
        ensure_row(connection, asked.client, now)
        note(
            browser.request,
            action="consent",
            application=asked.client.id,
            application_name=title_of(asked.client),
            scope=" ".join(str(scope) for scope, _ in asking.expanded.values()),
            goes_to=origin_of(asked.redirect_uri) or "",
            lasting="yes" if asked.offline else "no",
        )
        allowed = [scope for scope, _ in asking.expanded.values()]
        consents.record(connection, session.identity.id, asked.client.id, allowed, offline=asked.offline, now=now)
        consents.forget_refused(connection, session.identity.id, asked.client.id, refused)
        return issue_code(
            connection,
            asked,
            session.identity.id,
            session.authentications.values(),
            now=now,
            life=services.settings.sign_in.code_life,
        )

    code = await services.store.write(work)
    # RFC 9207: the client can tell which server answered.
    answer = [("code", code), ("state", asked.state), ("iss", services.settings.public_url)]
    return go(answer_uri(asked.redirect_uri, answer))


def _tell(request: Request, redirect_uri: str, error: Refused, state: str | None) -> Response:
    issuer = services_of(request).settings.public_url
    answer = [("error", error.code), ("error_description", str(error)), ("state", state), ("iss", issuer)]
    return go(answer_uri(redirect_uri, answer))


@router.get("/v2/web/auth-code", response_class=HTMLResponse)
async def show_code(request: Request) -> HTMLResponse:
    """The page from which people copy an authorization code into a terminal."""
    code = request.query_params.get("code", "")
    if request.query_params.get("error") == "access_denied":
        raise PageProblem(200, "Not allowed", "Nothing was allowed. You can close this page.")
    if "error" in request.query_params or _CODE.fullmatch(code) is None:
        raise PageProblem(400, "There is no code here", "Start the sign-in again.")
    return page(request, "code.html", code=code)
