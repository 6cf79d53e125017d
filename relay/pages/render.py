"""The pages' one design: templates with everything escaped, a strict content security policy, no caching.

Nothing needs JavaScript. The pages that offer passkeys load one script of ours, because browsers have no other way.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from relay.pages.typed import NOTHING_TYPED
from relay.pages.user_agents import in_words
from relay.services import services_of

_HERE = Path(__file__).parent
_STATIC = {"style.css": "text/css; charset=utf-8", "passkey.js": "text/javascript; charset=utf-8"}


class PageProblem(Exception):
    """A page that says what is wrong. ``sentence`` is for people."""

    def __init__(self, status: int, title: str, sentence: str, *, retry_after: int | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.title = title
        self.sentence = sentence
        self.retry_after = retry_after


class NotSignedIn(Exception):
    """Answered with the sign-in page."""

    def __init__(self, answer: HTMLResponse) -> None:
        super().__init__("nobody is signed in")
        self.answer = answer


@dataclass(frozen=True)
class Look:
    """How a page may behave beyond its content: where its forms may lead, and whether it loads the script."""

    form_targets: Sequence[str] = ()
    script: bool = False


def page(
    request: Request, template: str, *, status: int = 200, look: Look | None = None, **values: Any
) -> HTMLResponse:
    """An answer made of a template and its values."""
    look = look or Look()
    relay_name = services_of(request).settings.name
    values = {"typed": NOTHING_TYPED, "stale": False, **values}
    text = (
        _environment()
        .get_template(template)
        .render(relay_name=relay_name, script=look.script, request_path=request.url.path, **values)
    )
    return HTMLResponse(text, status_code=status, headers=_headers(look))


def _headers(look: Look) -> dict[str, str]:
    policy = [
        "default-src 'none'",
        "style-src 'self'",
        "img-src 'self'",
        " ".join(["form-action 'self'", *look.form_targets]),
        "frame-ancestors 'none'",
        "base-uri 'none'",
    ]
    if look.script:
        policy += ["script-src 'self'", "connect-src 'self'"]
    return {
        "Content-Security-Policy": "; ".join(policy),
        # Not `no-referrer`: browsers would then send `Origin: null` with our own forms.
        "Referrer-Policy": "same-origin",
        "Cache-Control": "no-store",
        "X-Frame-Options": "DENY",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    }


def not_found(request: Request) -> HTMLResponse:
    """For addresses that were mistyped, or copied in part."""
    sentence = "The address may have been mistyped, or not copied whole."
    return page(request, "problem.html", status=404, title="There is nothing here", sentence=sentence, home=True)


def install(app: FastAPI) -> None:
    """Answer every `PageProblem` with a page, and serve the style sheet and the script."""

    async def on_problem(request: Request, error: Exception) -> HTMLResponse:
        assert isinstance(error, PageProblem)
        answer = page(request, "problem.html", status=error.status, title=error.title, sentence=error.sentence)
        if error.retry_after is not None:
            answer.headers["Retry-After"] = str(error.retry_after)
        return answer

    async def on_sign_in_needed(_request: Request, error: Exception) -> Response:
        assert isinstance(error, NotSignedIn)
        return error.answer

    async def static(name: str) -> Response:
        kind = _STATIC.get(name)
        if kind is None:
            return Response(status_code=404)
        return Response(_static(name), media_type=kind, headers={"Cache-Control": "max-age=300"})

    app.add_exception_handler(PageProblem, on_problem)
    app.add_exception_handler(NotSignedIn, on_sign_in_needed)
    app.add_api_route("/pages/{name}", static, include_in_schema=False)


@cache
def _static(name: str) -> bytes:
    return (_HERE / "static" / name).read_bytes()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["moment"] = _moment
    environment.filters["program"] = in_words
    return environment


def _moment(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
