"""Names that play with terminals, browsers and spreadsheets, in everything in which the relay shows names: the
operator's commands, the pages, and JSON. They get past every check here, as if the database came from a version with
fewer."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import Connection, Table, select, update

from relay.audit import trail
from relay.auth import service_tokens
from relay.cli import cli
from relay.refusal import ApiError
from relay.store import application_tables, auth_tables, sign_in_tables
from relay.store.database import Store
from relay.transfer.fields import check_text
from tests.relay.sign_in_world import Application
from tests.relay.test_developer_pages import BACK, desk

# A title is set, the screen cleared (in two ways), a row forged, text runs backwards, markup in text and in attributes,
# and what a spreadsheet would compute.
HOSTILE = (
    "\x1b]0;owned\x07\x1b[2J\x9b2J\nforged  row\r\u202etxt.exe\u2028"
    "<script>alert(1)</script>\" onload='alert(2)' &amp; {{ 7*7 }} =cmd|' /C calc'!A0"
)
HARMFUL = {chr(number) for number in [*range(32), *range(127, 160)]} - {"\n"} | {"\u202e", "\u2028"}
# What people and programs are called, wherever the relay keeps it.
NAMES: list[tuple[Table, tuple[str, ...]]] = [
    (auth_tables.identities, ("name", "email", "organization")),
    (auth_tables.clients, ("name",)),
    (auth_tables.client_secrets, ("name",)),
    (auth_tables.sessions, ("name",)),
    (sign_in_tables.browser_sessions, ("user_agent",)),
    (sign_in_tables.scopes, ("name", "description")),
    (application_tables.projects, ("display_name", "contact_email")),
    (application_tables.policies, ("display_name", "description")),
]


def rename_all(connection: Connection, text: str) -> int:
    """Call everything so. How many rows there were."""
    changed = 0
    for table, columns in NAMES:
        done = connection.execute(update(table).values(dict.fromkeys(columns, text)))
        changed += done.rowcount
    return changed


class Skeleton(HTMLParser):
    """A page's tags with their attributes' names, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, ...]] = []
        self.shown = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *sorted(name for name, _ in attrs)))
        self.shown += " ".join(value or "" for _, value in attrs)

    def handle_data(self, data: str) -> None:
        self.shown += data


async def test_names_are_text_on_every_page(world: Any) -> None:
    dev = await desk(world, "dev")
    client_id, _ = await dev.register()
    place = f"/developers/applications/{client_id}"
    await dev.do(place, "scope", name="Move", description="Move it", scope_suffix="move", needs="openid")
    project = await world.store.read(lambda c: c.execute(select(application_tables.projects.c.id)).scalar_one())
    await dev.do(f"/developers/projects/{project}", "policy", display_name="Staff", description="Only", minutes="10")
    hub = Application(client_id=client_id, redirect_uri=BACK, scope="openid profile email")
    await hub.code(dev.person)
    now = world.clock.now
    await world.store.write(lambda c: service_tokens.make(c, dev.id, "beamline", life=86400.0, now=now))
    places = [
        *("/account", "/account/sessions", "/account/applications", "/account/tokens"),
        *("/developers", f"/developers/projects/{project}", place),
        hub.url(prompt="consent"),
    ]
    before = {url: Skeleton((await dev.person.get(url)).text) for url in places}
    rows = await world.store.write(lambda c: rename_all(c, HOSTILE))
    for url, plain in before.items():
        page = await dev.person.get(url)
        assert page.status_code == 200, url
        found = Skeleton(page.text)
        assert found.tags == plain.tags, url
        assert "<script>" not in page.text
        assert "<script>alert(1)</script>" in found.shown, url
        assert "{{ 7*7 }}" in found.shown, url
    print(f"rows renamed: {rows}, pages: {len(places)}, tags as before: {sum(len(p.tags) for p in before.values())}")


def test_the_operators_commands_show_names_as_one_line_of_plain_text(relay_directory: Path, relay_store: Store) -> None:
    def run(*words: str) -> str:
        done = CliRunner().invoke(cli, ["--config", str(relay_directory / "relay.yaml"), *words])
        assert done.exit_code == 0, done.output
        return done.output

    ada = json.loads(
        run("user", "add", "ada", "--full-name", HOSTILE, "--email", "ada@mail.example", "--no-link", "--json")
    )
    run("client", "add", "robot", "--owner", "ada")
    with relay_store.writing_engine.begin() as connection:
        service_tokens.make(connection, ada["id"], "beamline", life=86400.0, now=1.8e9)
        rename_all(connection, HOSTILE)
    shown = 0
    for words in (("user", "list"), ("client", "list"), ("token", "list")):
        text = run(*words)
        assert not HARMFUL & set(text), words
        documents = json.loads(run(*words, "--json"))
        # One line for each below the heading, whatever its name would like.
        assert len(text.splitlines()) == 1 + len(documents), words
        shown += text.count("\N{SYMBOL FOR ESCAPE}1B]0;owned\N{SYMBOL FOR ESCAPE}07")
        assert run(*words, "--json").isascii()
        assert any(HOSTILE in row.values() for row in documents)
    text = run("user", "add", "eve", "--full-name", HOSTILE, "--no-link")
    assert not HARMFUL & set(text)
    log = run("audit", "export")
    assert log.isascii()
    assert all(json.loads(line) for line in log.splitlines())
    with relay_store.writing_engine.begin() as connection:
        assert trail.verify(connection).broken is None
    print(f"lines with such names: {shown}, lines of the log: {len(log.splitlines())}")


@pytest.mark.parametrize("character", ["\x00", "\x07", "\x1b", "\x7f", "\x80", "\x9b", "\x9f", "\r"])
def test_control_characters_are_refused_in_labels_and_names(character: str) -> None:
    with pytest.raises(ApiError, match="control characters"):
        check_text("label", f"a{character}b")
    check_text("label", "a\n\tb \u00e9\u200d\U0001f600 =1+1")
