"""Rules of RFC 9700 and its kin that no other test is about; docs/sign-in.md says which test shows which rule."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest
from sqlalchemy import update

from relay.auth.scopes import AUTH_SERVER
from relay.store.auth_tables import clients
from tests.relay.sign_in_world import Application, Person, add_person, forms_of

if TYPE_CHECKING:
    from tests.relay.relay_world import RelayWorld

ROOT = Path(__file__).parents[2]


# --- secrets are compared in constant time ------------------------------------------------------------------------

# In small letters: what is written in capitals is the name of something, not its value.
_SECRET = re.compile(r"(?:[a-z_]*_)?(?:secret|token|password|verifier|challenge|cookie|state|nonce|mark|tag|hmac|mac)")
# What is named like a secret and is none, or is compared by nobody whom its value would tell anything.
_HARMLESS = {
    ("agent/cli/screen.py", "state != self._last"),  # a picture of a terminal
    ("agent/storage/access_lists.py", "tag == USER"),  # the kind of an entry, from <sys/acl.h>
    ("agent/transfer/begun_place.py", "token != known"),  # the name of a disk, in a journal beside it
    ("agent/connect/port_control.py", "data[24:36] != nonce"),  # the router's answer to a question of this process
    ("protocol/link.py", "claims.get('nonce') != hello.nonce"),  # both sides of a signed statement, seen by its sender
}


def _last_name(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value=str(name)), *_]):
            return name
        case ast.Call(func=ast.Attribute(value=inner, attr="encode" | "decode" | "strip")):
            return _last_name(inner)
        case ast.Subscript(value=inner):
            return _last_name(inner)
    return ""


def _compared(tree: ast.AST) -> Iterator[ast.Compare]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq):
            sides = [node.left, *node.comparators]
            plain = not any(isinstance(side, ast.Constant) for side in sides)
            # A column of the database: rows are found by digests, whose timing tells nothing of what they are of.
            column = any(".c." in ast.unparse(side) or ast.unparse(side).startswith("table.") for side in sides)
            if plain and not column and any(_SECRET.fullmatch(_last_name(side)) for side in sides):
                yield node


def test_no_secret_is_compared_with_an_equals_sign() -> None:
    found = {
        (str(path.relative_to(ROOT)), ast.unparse(node))
        for folder in ("relay", "protocol", "agent")
        for path in (ROOT / folder).rglob("*.py")
        for node in _compared(ast.parse(path.read_text()))
    }
    assert found == _HARMLESS


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("form['secret'] == x", False),
        ("given_token == self.token", True),
        ("request.headers.get('state') != state", True),
        ("state.encode() == other", True),
        ("state == 'x'", False),
        ("tokens.c.state == state", False),
    ],
)
def test_the_search_finds_comparisons_of_secrets(source: str, told: bool) -> None:
    assert any(True for _ in _compared(ast.parse(source))) == told


# --- where tokens, addresses and answers may be -------------------------------------------------------------------


async def test_the_two_descriptions_of_the_server_are_one(world: RelayWorld) -> None:
    """RFC 8414 for clients of plain OAuth, OpenID Connect Discovery for the others."""
    documents = [
        (await world.http.get(f"/.well-known/{name}")).json()
        for name in ("oauth-authorization-server", "openid-configuration")
    ]
    assert documents[0] == documents[1]
    assert documents[0]["issuer"] == world.settings.public_url
    assert documents[0]["code_challenge_methods_supported"] == ["S256"]
    assert not {"implicit", "password"} & set(documents[0]["grant_types_supported"])


async def test_a_token_counts_in_the_header_alone(world: RelayWorld, ada: Person) -> None:
    """RFC 9700, 4.3.2; RFC 6750, 2.3: what stands in an address gets into logs and histories."""
    application = Application()
    document = (await application.redeem(world, await application.code(ada))).json()
    token, place = document["access_token"], "/v2/oauth2/userinfo"
    assert (await world.http.get(place, headers={"Authorization": f"Bearer {token}"})).status_code == 200
    assert (await world.http.get(place, params={"access_token": token})).status_code == 401
    assert (await world.http.get("/v0.10/endpoint_search", params={"access_token": token})).status_code == 401


async def test_a_form_with_a_password_is_never_sent_on(world: RelayWorld) -> None:
    """RFC 9700, 4.12: after 303 a browser sends no body along."""
    await add_person(world, "ada")
    person = Person(world)
    page = await person.get("/sign-in?next=" + Application().url().replace("&", "%26"))
    form = forms_of(page.text)[0]
    answer = await person.request(
        "POST", form.action, {**form.fields, "username": "ada", "password": "quiet boats go by"}
    )
    assert answer.status_code == 303


async def test_no_header_of_a_stranger_says_where_they_are(world: RelayWorld) -> None:
    """RFC 9700, 4.13: the relay ends TLS itself, so that no proxy's word about clients counts."""
    headers = {"X-Forwarded-For": "8.8.8.8", "Forwarded": "for=8.8.8.8", "X-Real-IP": "8.8.8.8"}
    form = {"client_id": "8a2b1f0e-6c0d-5e0a-9d53-2f6c1d7a4b11", "scope": "openid"}
    made = (await world.http.post("/v2/oauth2/device_authorization", data=form, headers=headers)).json()
    ada = Person(world)
    await ada.arrive(await add_person(world, "ada"))
    (device,) = forms_of((await ada.get("/device")).text)
    page = await ada.post(device, user_code=made["user_code"])
    assert "127.0.0.1" in page.text
    assert "8.8.8.8" not in page.text
    host = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "http", "Host": "evil.example"}
    document = (await world.http.get("/.well-known/openid-configuration", headers=host)).json()
    assert "evil.example" not in str(document)


async def test_a_client_cannot_be_taken_for_a_person(world: RelayWorld, ada: Person) -> None:
    """RFC 9700, 4.15: the ids of clients are made here, and a client's own token names the client."""
    client_id, secret = await world.client("Program")
    form = {"grant_type": "client_credentials", "scope": "openid profile email"}
    issued = (await world.http.post("/v2/oauth2/token", data=form, auth=(client_id, secret))).json()
    headers = {"Authorization": f"Bearer {issued['access_token']}"}
    told = (await world.http.get("/v2/oauth2/userinfo", headers=headers)).json()
    assert (told["sub"], told["preferred_username"]) == (client_id, f"{client_id}@clients.auth.globus.org")
    people = [row["id"] for row in await _identities(world, headers, "ada@" + world.settings.user_domain)]
    assert client_id not in people


async def _identities(world: RelayWorld, headers: dict[str, str], username: str) -> list[dict[str, Any]]:
    answer = await world.http.get("/v2/api/identities", params={"usernames": username}, headers=headers)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["identities"]
    return found


async def test_an_access_token_names_one_service_and_no_more_than_was_asked(world: RelayWorld, ada: Person) -> None:
    """RFC 9700, 2.3 and 4.10.2."""
    application = Application(scope="openid")
    document = (await application.redeem(world, await application.code(ada))).json()
    assert (document["resource_server"], document["scope"], document["other_tokens"]) == (AUTH_SERVER, "openid", [])
    headers = {"Authorization": f"Bearer {document['access_token']}"}
    assert (await world.http.get("/v0.10/endpoint_search", headers=headers)).status_code in (401, 403)


@pytest.mark.parametrize(
    ("target", "leads_back"),
    [
        ("https://hub.example.org/after", True),
        ("https://evil.example/", False),
        ("https://hub.example.org@evil.example/", False),
        ("https://hub.example.org.evil.example/", False),
        ("http://hub.example.org/after", False),
        ("//evil.example/", False),
        ("javascript:alert(1)", False),
        ("", False),
    ],
)
async def test_signing_out_leads_back_to_the_application_alone(
    world: RelayWorld, ada: Person, target: str, leads_back: bool
) -> None:
    """RFC 9700, 4.11."""
    client_id, _ = await world.client("Hub")
    # The second is no address of the web, as nothing but a database from elsewhere could hold.
    uris = '["https://hub.example.org/back", "hub:/back"]'
    this = clients.c.id == client_id
    await world.store.write(
        lambda connection: connection.execute(update(clients).where(this).values(redirect_uris=uris))
    )
    page = await ada.get("/v2/web/logout?" + urlencode({"client_id": client_id, "redirect_uri": target}))
    assert page.status_code == 200
    assert (f'href="{target}"' in page.text) == leads_back
    assert "evil.example" not in page.text
    assert "javascript:" not in page.text
    assert "Sign in" in (await ada.get("/account")).text


def test_every_test_that_the_documents_name_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "sign-in.md").read_text()))
    defined = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) > 30
    assert named - defined == set()
