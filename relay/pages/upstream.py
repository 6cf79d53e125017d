"""Signing in at an upstream provider: away to it, and back with its answer."""

from __future__ import annotations

import math

from fastapi import APIRouter, Request
from fastapi.responses import Response
from sqlalchemy import Connection

from protocol.errors import ItemFailed
from relay.api.client_authentication import caller_of
from relay.auth import linked
from relay.auth.identities import Identity
from relay.auth.outbound import OutboundFailed
from relay.auth.upstream import NotWelcome, Upstream, person_untrusted, provider_identity_id
from relay.auth.upstream_accounts import Visit, begin_visit, end_visit, settle_identity
from relay.pages.account import signed_in
from relay.pages.browser import Browser, browser_of, destination_untrusted, go
from relay.pages.render import PageProblem
from relay.pages.sign_in import welcome
from relay.services import services_of

router = APIRouter(include_in_schema=False)

_MAX_CODE = 4096
# Whoever is sent to a provider leaves a row behind before they have shown who they are. So many in so many seconds may
# leave from one address: enough for all who are behind one router.
DEPARTURES, DEPARTURES_PERIOD = 600, 60.0


def _upstream(request: Request, name: str) -> Upstream:
    found = services_of(request).upstreams.get(name)
    if found is None:
        raise PageProblem(404, "Unknown provider", "This relay has no such provider.")
    return found


def _redirect_uri(request: Request, name: str) -> str:
    """One address for each provider, so that no answer can be taken for another's (RFC 9700, 4.4)."""
    return f"{services_of(request).settings.public_url}/sign-in/from/{name}"


@router.post("/sign-in/with/{name}")
async def leave(request: Request, name: str) -> Response:
    """Send the browser to a provider, to sign in or to link an identity of there."""
    upstream = _upstream(request, name)
    browser = await browser_of(request)
    form = await browser.form()
    link_to = None
    if form.get("link") == "yes":
        _, session = await signed_in(request, fresh=True)
        link_to = session.identity.id
    destination = destination_untrusted(form.get("next", ""))
    services = services_of(request)
    balance = services.departures.take(caller_of(request), services.clock())
    if balance is not None and balance.wait:
        raise PageProblem(
            429, "Please wait", "Too many sign-ins were begun from here lately.", retry_after=math.ceil(balance.wait)
        )

    def work(connection: Connection) -> tuple[str, Visit]:
        return begin_visit(connection, name, browser.digest, destination, link_to, services.clock())

    state, visit = await services.store.write(work)
    try:
        place = await upstream.authorization_url(
            _redirect_uri(request, name), state=state, nonce=visit.nonce, verifier=visit.verifier
        )
    except (OutboundFailed, NotWelcome) as error:
        raise PageProblem(502, f"{upstream.provider.name} does not answer", error.sentence) from error
    answer = go(place)
    browser.keep(answer)
    return answer


@router.get("/sign-in/from/{name}")
async def come_back(request: Request, name: str) -> Response:
    """Take in the provider's answer."""
    upstream = _upstream(request, name)
    browser = await browser_of(request)
    services = services_of(request)
    query = request.query_params
    state, now = query.get("state", ""), services.clock()
    visit = await services.store.write(lambda c: end_visit(c, name, browser.digest, state, now))
    if visit is None:
        raise PageProblem(403, "That sign-in has expired", "It was not begun in this browser, or took too long.")
    if "error" in query or not 1 <= len(query.get("code", "")) <= _MAX_CODE:
        raise PageProblem(403, "Not signed in", f"{upstream.provider.name} did not sign you in.")
    try:
        await upstream.check_issuer(query.get("iss"))
        said = await upstream.claims(
            query["code"], _redirect_uri(request, name), nonce=visit.nonce, verifier=visit.verifier
        )
        providers = services.settings.sign_in.providers
        claims = person_untrusted(upstream.provider, said, services.settings.user_domain, providers)
    except OutboundFailed as error:
        raise PageProblem(502, f"{upstream.provider.name} does not answer", error.sentence) from error
    except NotWelcome as error:
        raise PageProblem(403, "Not signed in", error.sentence) from error
    provider_id = provider_identity_id(upstream.provider)

    def settle(connection: Connection) -> Identity:
        return settle_identity(connection, claims, provider_id, now)

    try:
        identity = await services.store.write(settle)
        if visit.link_to is not None:
            await _link(browser, visit.link_to, identity)
            return go("/account?done=link")
    except ItemFailed as error:
        raise PageProblem(409, "That did not work", error.sentence) from error
    return await welcome(browser, identity, claims.methods, visit.destination)


async def _link(browser: Browser, primary_id: str, identity: Identity) -> None:
    """Link an identity to whoever began the visit, provided that they are still the one who is signed in."""
    services = services_of(browser.request)
    if browser.session is None or browser.session.identity.id != primary_id:
        raise PageProblem(403, "Not linked", "Somebody else is signed in now; begin again.")
    await services.store.write(lambda c: linked.link(c, primary_id, identity.id, services.clock()))
