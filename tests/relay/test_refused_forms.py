"""A form that is refused comes back as it was typed, with what is wrong; passwords never do."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection, select

from relay.auth import one_time_links
from relay.pages.browser import FRESH
from relay.store.application_tables import projects
from tests.relay.sign_in_world import PASSWORD, Form, Person, forms_of
from tests.relay.test_developer_pages import Desk, desk

NAME = 'It\'s <b>"mine"</b> & theirs'
LINES = "one.example\r\n  two <three> & four"


class _Fields(HTMLParser):
    """What a browser would show in the fields of each form."""

    def __init__(self) -> None:
        super().__init__()
        self.forms: list[dict[str, str]] = []
        self._area: str | None = None
        self._select = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = dict(attrs)
        name = has.get("name") or ""
        if tag == "form":
            self.forms.append({"action": has.get("action") or ""})
        elif tag == "input" and (has.get("type") != "checkbox" or "checked" in has):
            self.forms[-1][name] = has.get("value") or ""
        elif tag == "textarea":
            self._area, self.forms[-1][name] = name, ""
        elif tag == "select":
            self._select = name
        elif tag == "option" and (self._select not in self.forms[-1] or "selected" in has):
            self.forms[-1][self._select] = has.get("value") or ""

    def handle_data(self, data: str) -> None:
        if self._area is not None:
            self.forms[-1][self._area] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "textarea":
            self._area = None


def shown(page: httpx.Response, **which: str) -> dict[str, str]:
    """The fields of one form of a page."""
    parser = _Fields()
    parser.feed(page.text)
    return next(form for form in parser.forms if which.items() <= form.items())


def refused(page: httpx.Response, status: int, sentence: str, typed: dict[str, str], **which: str) -> None:
    assert page.status_code == status, page.text
    assert page.text.count('role="alert"') >= 1
    assert sentence in page.text
    assert "<title>Not done: " in page.text
    there = shown(page, **which)
    assert {name: there.get(name, "").split() for name in typed} == {name: text.split() for name, text in typed.items()}


@pytest.fixture
async def dev(world: Any) -> Desk:
    return await desk(world, "dev")


def the_project(connection: Connection) -> str:
    return str(connection.execute(select(projects.c.id)).scalar_one())


async def test_registering_an_application(world: Any, dev: Desk) -> None:
    typed = {"name": NAME, "kind": "service", "redirect_uris": "http://a.example/ b", "contact_email": "x@y.example"}
    refused(await dev.do("/developers", "register", **typed), 400, "https address", typed, do="register")
    await dev.register()
    # With a project chosen, or none although there is one.
    for chosen in (await world.store.read(the_project), ""):
        page = await dev.do("/developers", "register", **typed, project=chosen)
        refused(page, 400, "https address", typed | {"project": chosen}, do="register")
    typed["kind"] = "nonsense"
    assert "Choose what kind" in (await dev.do("/developers", "register", **typed)).text


async def test_an_application_its_secrets_and_its_scopes(world: Any, dev: Desk) -> None:
    client_id, _ = await dev.register()
    place = f"/developers/applications/{client_id}"
    typed = {"name": NAME, "redirect_uris": "http://a.example/ b", "terms_and_conditions": "c", "privacy_policy": "d"}
    refused(await dev.do(place, "change", **typed, public="yes"), 400, "https", typed | {"public": "yes"}, do="change")
    refused(await dev.do(place, "secret", name="x" * 2000), 400, "name", {"name": "x" * 2000}, do="secret")
    typed = {"name": NAME, "description": "d", "scope_suffix": "BIG", "needs": "*+a b", "required_domains": LINES}
    page = await dev.do(place, "scope", **typed)
    refused(page, 400, "scope", typed, do="scope")
    assert "<details open>" in page.text
    # The boxes as they were left, not as they are in an empty form; and the other forms as they were.
    assert "advertised" not in shown(page, do="scope")
    assert shown(page, do="change")["name"] == "Hub"
    made = {"name": "n", "description": "d", "scope_suffix": "s"}
    page = await dev.do(place, "scope", **made)
    scope = "/developers/scopes/" + page.text.partition('"/developers/scopes/')[2].partition('"')[0]
    refused(await dev.do(scope, "change", **typed, advertised="y"), 400, "scope", typed, do="change")
    assert shown(await dev.person.get(scope), do="change")["name"] == "n"


async def test_a_project_and_its_policies(world: Any, dev: Desk) -> None:
    await dev.register()
    place = f"/developers/projects/{await world.store.read(the_project)}"
    typed = {"display_name": NAME, "contact_email": "x" * 500}
    refused(await dev.do(place, "change", **typed), 400, "contact_email", typed, do="change")
    refused(await dev.do(place, "add", username="nob<b>ody"), 400, "Nobody here", {"username": "nob<b>ody"}, do="add")
    assert (await dev.do(place, "delete")).status_code == 409
    typed = {"display_name": NAME, "description": "d", "minutes": "many", "required_mfa": "yes", "include": LINES}
    refused(await dev.do(place, "policy", **typed), 400, "number of minutes", typed, do="policy")
    page = await dev.do(place, "policy", **(typed | {"minutes": "5", "include": ""}))
    policy = "/developers/policies/" + page.text.partition('"/developers/policies/')[2].partition('"')[0]
    refused(await dev.do(policy, "change", **typed), 400, "number of minutes", typed, do="change")


async def test_account_and_tokens(world: Any, dev: Desk) -> None:
    async def send(place: str, action: str, **fields: str) -> httpx.Response:
        forms = forms_of((await dev.person.get(place)).text)
        return await dev.person.post(
            next(form for form in forms if form.action == action and "end" not in form.fields), **fields
        )

    secret = "never to be shown"
    page = await send("/account", "/account/link", username="some<b>ody", password=secret)
    refused(page, 403, "is wrong", {"username": "some<b>ody", "password": ""}, action="/account/link")
    assert "<details open>" in page.text
    assert secret not in page.text
    for current, new, status, sentence in (
        ("wrong", secret, 403, "present password is wrong"),
        (PASSWORD, "short", 400, "at least"),
    ):
        page = await send("/account", "/account/password", current=current, password=new, again=new)
        refused(page, status, sentence, {"password": "", "again": "", "current": ""}, action="/account/password")
        assert secret not in page.text
    typed = {"name": NAME, "days": "many"}
    refused(await send("/account/tokens", "/account/tokens", **typed), 400, "days", typed, action="/account/tokens")


async def test_a_code_and_a_one_time_link(world: Any, dev: Desk) -> None:
    (form,) = forms_of((await dev.person.get("/device")).text)
    page = await dev.person.post(form, user_code="BCDF<GHJK")
    refused(page, 404, "not known", {"user_code": "BCDF<GHJK"}, action="/device")

    def work(connection: Connection) -> str:
        return one_time_links.make(connection, "administrator", None, now=world.clock.now)

    key = await world.store.write(work)
    person = Person(world)
    (form,) = forms_of((await person.get(f"/welcome?key={key}")).text)
    typed = {"username": "ada", "name": NAME}
    page = await person.post(form, **typed, password="never to be shown", again="something else")
    refused(page, 400, "differ", typed, action="/welcome")
    assert "never to be shown" not in page.text
    # The link is not used up.
    answer = await person.post(Form("/welcome", form.fields), **typed, password=PASSWORD, again=PASSWORD)
    assert "You administer this relay" in answer.text


async def test_whoever_signed_in_long_ago_is_told_before_typing(world: Any, dev: Desk) -> None:
    for place in ("/account", "/account/tokens", "/developers"):
        assert "sign in again</a>" not in (await dev.person.get(place)).text
    world.clock.now += FRESH + 1
    for place in ("/account", "/account/tokens", "/developers"):
        assert f'<a href="/sign-in?next={place}">sign in again</a>' in (await dev.person.get(place)).text
    assert "sign in again</a>" not in (await dev.person.get("/account/sessions")).text
