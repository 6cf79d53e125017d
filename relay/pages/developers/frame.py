"""What the developers' pages have in common: who looks, and how forms become documents of the developers' API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import HTMLResponse
from sqlalchemy import Connection

from relay.access.decisions import Subject
from relay.access.principals import subject_of
from relay.audit.notes import note
from relay.auth.browser_sessions import BrowserSession
from relay.auth.providers import IdentityProvider, identity_providers, sign_in_provider_ids
from relay.pages.account import signed_in
from relay.pages.browser import Browser, again, is_old
from relay.pages.render import PageProblem, page
from relay.pages.typed import NOTHING_TYPED, Typed
from relay.refusal import ApiError
from relay.services import services_of

T = TypeVar("T")
HOME = "/developers"


class Visit:
    """One developer's look at one page, or what they do there."""

    def __init__(self, browser: Browser, session: BrowserSession, fields: Mapping[str, str]) -> None:
        self._browser = browser
        self.request = browser.request
        self.identity = session.identity
        self._session = session
        self.fields = fields
        self._typed = NOTHING_TYPED
        # Tasks that what was done has ended.
        self.ended: list[str] = []

    async def read(self, work: Callable[[Connection, Subject], T]) -> T:
        """Look something up. Raises `PageProblem`."""
        return await self._told(services_of(self.request).store.read, work)

    async def write(self, work: Callable[[Connection, Subject], T]) -> T:
        """Change something, in one transaction. Raises `PageProblem`."""
        result = await self._told(services_of(self.request).store.write, work)
        for task_id in self.ended:
            services_of(self.request).steward.cut(task_id)
        return result

    async def _told(self, through: Any, work: Callable[[Connection, Subject], T]) -> T:
        now, mine = services_of(self.request).clock(), self.identity.id
        try:
            result: T = await through(lambda connection: work(connection, subject_of(connection, mine, now)))
        except ApiError as error:
            title = "There is no such page" if error.status == 404 else "That did not work"
            raise PageProblem(error.status, title, error.message) from error
        return result

    def page(self, template: str, **values: Any) -> HTMLResponse:
        """The answer."""
        answer = page(
            self.request,
            f"developers/{template}.html",
            form_token=self._browser.form_token,
            session=self._session,
            here="developers",
            stale=is_old(self.request, self._session),
            typed=self._typed,
            **values,
        )
        self._browser.keep(answer)
        return answer

    async def again(self, problem: PageProblem, show: Callable[[], Awaitable[HTMLResponse]]) -> HTMLResponse:
        """The page once more, with what was typed into the form that was refused. Raises what that cannot mend."""

        async def filled(typed: Typed) -> HTMLResponse:
            self._typed = typed
            return await show()

        return await again(problem, self.fields.get("do", ""), self.fields, filled)

    def text(self, name: str) -> str | None:
        """A field of the form; None when it is empty."""
        return self.fields.get(name, "").strip() or None

    def lines(self, name: str) -> list[str]:
        """The lines of a field of the form."""
        return [line.strip() for line in self.fields.get(name, "").splitlines() if line.strip()]

    def ticked(self, name: str) -> bool:
        """Whether a box is ticked."""
        return name in self.fields

    @property
    def providers(self) -> list[IdentityProvider]:
        """The providers that people sign in with here."""
        settings = services_of(self.request).settings
        offered = sign_in_provider_ids(settings)
        return [provider for provider in identity_providers(settings) if provider.id in offered]


async def looking(request: Request) -> Visit:
    """Somebody who looks at a page. Raises `NotSignedIn`."""
    browser, session = await signed_in(request)
    return Visit(browser, session, {})


async def doing(request: Request, subject: str) -> tuple[Visit, str]:
    """Somebody who sent a form, and what they want done. Raises `NotSignedIn`, also when the last proof is old."""
    browser, session = await signed_in(request, fresh=True, back=request.url.path)
    fields = await browser.form()
    deed = fields.get("do", "")
    note(request, action=f"{subject} {deed}"[:60])
    return Visit(browser, session, fields), deed


def unknown() -> PageProblem:
    """A form that no page of ours has."""
    return PageProblem(400, "That did not work", "The form is not one of this page.")
