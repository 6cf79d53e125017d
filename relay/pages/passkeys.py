"""Passkeys at the pages. The challenge is derived from a mark of the time that this browser alone can hand back, and
nothing is kept between offering it and its answer. An answer counts once, for this browser, for five minutes.
"""

from __future__ import annotations

import hashlib
import secrets
from urllib.parse import urlsplit

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from sqlalchemy import Connection

from relay.auth import passkeys
from relay.auth.identities import Identity, select_by_ids
from relay.auth.linked import set_of
from relay.auth.passkeys import PasskeyRefused, Site
from relay.pages.account import change, signed_in
from relay.pages.browser import Browser, browser_of, destination_untrusted, go
from relay.pages.render import PageProblem
from relay.pages.sign_in import count_failure, guesser_of, limit_guesses, welcome
from relay.services import Services, services_of

router = APIRouter(include_in_schema=False)

_MAKE, _USE = "make a passkey", "use a passkey"


def _site(services: Services) -> Site:
    settings = services.settings
    return Site(urlsplit(settings.public_url).hostname or "localhost", settings.public_url, settings.name)


def _challenge(mark: str) -> bytes:
    return hashlib.sha256(mark.encode()).digest()


def _mark(browser: Browser, subject: str, now: float) -> str:
    """What the browser hands back with its answer; another one each time."""
    nonce = secrets.token_hex(16)
    return f"{nonce}.{browser.mark(f'{subject} {nonce}', now)}"


def _checked(browser: Browser, mark: str, subject: str) -> bytes:
    """The challenge of a mark of ours. Raises `PageProblem` for one that is too old or another browser's."""
    nonce, _, rest = mark.partition(".")
    services = services_of(browser.request)
    since = browser.marked(rest, f"{subject} {nonce}") if nonce.isascii() else None
    if since is None or not services.passkey_answers.counts(since, services.clock()):
        raise PageProblem(403, "That took too long", "Try the passkey again.")
    return _challenge(mark)


@router.post("/account/passkeys/offer")
async def offer(request: Request) -> Response:
    """What the browser needs to make a passkey."""
    browser, session = await signed_in(request, fresh=True)
    await browser.form()
    services = services_of(request)
    present = await services.store.read(lambda c: passkeys.passkeys_of(c, [session.identity.id]))
    mark = _mark(browser, _MAKE, services.clock())
    options = passkeys.creation_options(_site(services), session.identity, present, _challenge(mark))
    return JSONResponse({"mark": mark, "options": options}, headers={"Cache-Control": "no-store"})


@router.post("/account/passkeys")
async def add(request: Request) -> Response:
    """Keep a passkey that the browser has made."""
    browser, session = await signed_in(request, fresh=True)
    form = await browser.form()
    services = services_of(request)
    challenge = _checked(browser, form.get("mark", ""), _MAKE)
    site, now = _site(services), services.clock()

    def work(connection: Connection) -> None:
        credential, name = form.get("credential", ""), form.get("name", "")
        passkeys.add_untrusted(connection, site, session.identity, credential, challenge, name, now)
        services.passkey_answers.take(challenge, now)

    await change(request, session, work)
    return go("/account?done=passkey")


@router.post("/account/passkeys/remove")
async def remove(request: Request) -> Response:
    """Forget a passkey."""
    browser, session = await signed_in(request, fresh=True)
    wanted = (await browser.form()).get("passkey", "")

    def work(connection: Connection) -> None:
        person = set_of(connection, session.identity.id)
        passkeys.remove(connection, [identity.id for identity in person], wanted)

    await change(request, session, work)
    return go("/account?done=passkey-removed")


@router.post("/sign-in/passkey/offer")
async def offer_sign_in(request: Request) -> Response:
    """What the browser needs to use a passkey."""
    browser = await browser_of(request)
    await browser.form()
    services = services_of(request)
    mark = _mark(browser, _USE, services.clock())
    options = passkeys.request_options(_site(services), _challenge(mark))
    answer = JSONResponse({"mark": mark, "options": options}, headers={"Cache-Control": "no-store"})
    browser.keep(answer)
    return answer


@router.post("/sign-in/passkey")
async def sign_in(request: Request) -> Response:
    """Sign in with a passkey."""
    browser = await browser_of(request)
    form = await browser.form()
    services = services_of(request)
    guesser = guesser_of(request, "passkey")
    limit_guesses(request, guesser)
    challenge = _checked(browser, form.get("mark", ""), _USE)
    site, now = _site(services), services.clock()

    def work(connection: Connection) -> Identity | None:
        identity_id = passkeys.check_untrusted(connection, site, form.get("credential", ""), challenge, now)
        services.passkey_answers.take(challenge, now)
        return select_by_ids(connection, [identity_id]).get(identity_id)

    try:
        identity = await services.store.write(work)
    except PasskeyRefused as error:
        count_failure(request, guesser)
        raise PageProblem(401, "That did not work", error.sentence) from error
    if identity is None:
        raise PageProblem(401, "That did not work", "This passkey is not known here.")
    return await welcome(browser, identity, passkeys.METHODS, destination_untrusted(form.get("next", "")))
