"""Signing in at an upstream provider, honest and hostile; and where the relay never connects to."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from relay import settings
from relay.auth.identities import add_identity, select_by_usernames
from relay.auth.outbound import Answer, Outbound, OutboundFailed, is_public_address
from relay.auth.upstream import NotWelcome, Upstream, person_untrusted
from relay.settings import Provider
from tests.relay.sign_in_world import Person, add_person, forms_of, person_at

if TYPE_CHECKING:
    from tests.relay.relay_world import RelayWorld

ISSUER = "https://login.campus.example"
NOW = 1_800_000_000.0
CAMPUS = Provider(id="campus", name="Campus", issuer=ISSUER, client_id="me", domains=["campus.example"])
OTHER = Provider(id="other", name="Other", issuer="https://other.example", client_id="me", domains=["*"])


@dataclass
class FakeProvider:
    """An OpenID provider in memory, honest unless told otherwise."""

    claims: dict[str, Any] = field(default_factory=dict)
    discovery: dict[str, Any] = field(default_factory=dict)
    userinfo: dict[str, Any] | None = None
    key: ed25519.Ed25519PrivateKey = field(default_factory=ed25519.Ed25519PrivateKey.generate)
    algorithm: str = "EdDSA"
    nonce: str = ""
    signer: Any = None
    sent: list[tuple[str, str, bytes | None]] = field(default_factory=list)
    published: list[dict[str, Any]] | None = None

    async def request(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> Answer:
        self.sent.append((method, url, body))
        path = urlsplit(url).path
        if path.endswith("/.well-known/openid-configuration"):
            document: Any = {
                "issuer": ISSUER,
                "authorization_endpoint": f"{ISSUER}/authorize",
                "token_endpoint": f"{ISSUER}/token",
                "jwks_uri": f"{ISSUER}/keys",
                "userinfo_endpoint": None if self.userinfo is None else f"{ISSUER}/userinfo",
                **self.discovery,
            }
        elif path == "/keys":
            public = json.loads(jwt.algorithms.OKPAlgorithm.to_jwk(self.key.public_key()))
            document = {"keys": self.published if self.published is not None else [{**public, "kid": "k"}]}
        elif path == "/userinfo":
            document = self.userinfo
        else:
            claims = {"iss": ISSUER, "aud": "me", "sub": "s-1", "iat": NOW, "exp": NOW + 300, "nonce": self.nonce}
            claims |= {"preferred_username": "grace@campus.example", "name": "Grace", **self.claims}
            claims = {name: value for name, value in claims.items() if value is not None}
            key: Any = None if self.algorithm == "none" else self.key if self.algorithm == "EdDSA" else "secret" * 8
            key = self.signer or key
            document = {"access_token": "at", "id_token": jwt.encode(claims, key, self.algorithm, headers={"kid": "k"})}
        return Answer(200, json.dumps(document).encode())


def upstream_of(fake: FakeProvider, provider: Provider = CAMPUS) -> Upstream:
    return Upstream(provider, Path("/nonexistent"), lambda: NOW, fake)


# --- what a provider says ---------------------------------------------------------------------------------


async def test_an_honest_provider_is_believed() -> None:
    fake = FakeProvider(nonce="n")
    upstream = upstream_of(fake)
    url = await upstream.authorization_url("https://relay/x", state="s", nonce="n", verifier="v" * 43)
    query = parse_qs(urlsplit(url).query)
    assert query["code_challenge_method"] == ["S256"]
    assert "v" * 43 not in url
    claims = await upstream.claims("code", "https://relay/x", nonce="n", verifier="v" * 43)
    assert claims["sub"] == "s-1"
    body = dict(parse_qsl((fake.sent[-2][2] or b"").decode()))
    assert body["code_verifier"] == "v" * 43


HOSTILE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("another issuer", {"claims": {"iss": "https://evil.example"}}),
    ("another audience", {"claims": {"aud": "somebody"}}),
    ("another nonce", {"claims": {"nonce": "other"}}),
    ("no nonce", {"claims": {"nonce": None}}),
    ("for another application", {"claims": {"aud": ["me", "you"], "azp": "you"}}),
    ("too old", {"claims": {"iat": NOW - 3600}}),
    ("expired", {"claims": {"exp": NOW - 600}}),
    ("of the future", {"claims": {"iat": NOW + 3600, "exp": NOW + 7200}}),
    ("times that are none", {"claims": {"iat": "now", "exp": "then"}}),
    ("no subject", {"claims": {"sub": None}}),
    ("a long subject", {"claims": {"sub": "x" * 300}}),
    ("no signature", {"algorithm": "none"}),
    ("a signature with a shared secret", {"algorithm": "HS256"}),
    ("a key that is not published", {"published": []}),
    ("keys that are none", {"published": [{"kty": "oct", "k": "c2VjcmV0", "kid": "k"}]}),
    ("another name of itself", {"discovery": {"issuer": "https://evil.example"}}),
    ("plain http", {"discovery": {"token_endpoint": "http://login.campus.example/token"}}),
    ("somebody else at userinfo", {"userinfo": {"sub": "s-2"}}),
)


@pytest.mark.parametrize(("what", "changes"), HOSTILE, ids=[what for what, _ in HOSTILE])
async def test_a_hostile_provider_is_not(what: str, changes: dict[str, Any]) -> None:
    fake = FakeProvider(nonce="n", **changes)
    with pytest.raises(NotWelcome):
        await upstream_of(fake).claims("code", "https://relay/x", nonce="n", verifier="v" * 43)


SIGNERS: dict[str, Any] = {
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
    "RS256": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "PS384": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
}
OF_KEY = {
    "EdDSA": jwt.algorithms.OKPAlgorithm,
    "RS256": jwt.algorithms.RSAAlgorithm,
    "PS384": jwt.algorithms.RSAAlgorithm,
    "ES256": jwt.algorithms.ECAlgorithm,
}


def _public(name: str, key: Any = None) -> dict[str, Any]:
    return {**json.loads(OF_KEY[name].to_jwk((key or SIGNERS[name]).public_key())), "kid": "k"}


@pytest.mark.parametrize("published", SIGNERS)
@pytest.mark.parametrize("signed", SIGNERS)
async def test_only_the_published_key_counts_whatever_the_token_names(signed: str, published: str) -> None:
    fake = FakeProvider(nonce="n", published=[_public(published)], algorithm=signed, signer=SIGNERS[signed])
    asked = upstream_of(fake).claims("code", "https://relay/x", nonce="n", verifier="v" * 43)
    if signed == published:
        assert (await asked)["sub"] == "s-1"
    else:
        with pytest.raises(NotWelcome):
            await asked


@pytest.mark.parametrize("place", ["/.well-known/openid-configuration", "/token", "/keys", "id_token"])
async def test_documents_of_ten_thousand_boxes_are_told_in_words(place: str) -> None:
    boxes = b'{"issuer":' + b"[" * 10_000 + b"]" * 10_000 + b"}"
    fake = FakeProvider(nonce="n")
    honest = fake.request

    async def request(method: str, url: str, **more: Any) -> Answer:
        answer = await honest(method, url, **more)
        if url.endswith("/token") and place == "id_token":
            header = base64.urlsafe_b64encode(boxes).rstrip(b"=").decode()
            return Answer(200, json.dumps({"id_token": f"{header}.e30.AAAA"}).encode())
        return Answer(200, boxes) if url.endswith(place) else answer

    fake.request = request  # type: ignore[method-assign, assignment]
    with pytest.raises((NotWelcome, OutboundFailed)):
        await upstream_of(fake).claims("code", "https://relay/x", nonce="n", verifier="v" * 43)


async def test_a_short_key_is_not_believed() -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    fake = FakeProvider(nonce="n", published=[_public("RS256", key)], algorithm="RS256", signer=key)
    with pytest.warns(jwt.warnings.InsecureKeyLengthWarning), pytest.raises(NotWelcome, match="too short"):
        await upstream_of(fake).claims("code", "https://relay/x", nonce="n", verifier="v" * 43)


async def test_keys_of_a_wrong_kind_do_not_break_anything() -> None:
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    published = [json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(rsa_key.public_key())) | {"kid": "k"}, "nonsense", 7]
    fake = FakeProvider(nonce="n", published=published)  # type: ignore[arg-type]
    with pytest.raises(NotWelcome):
        await upstream_of(fake).claims("code", "https://relay/x", nonce="n", verifier="v" * 43)


async def test_an_answer_of_another_provider_is_noticed() -> None:
    """Mix-up (RFC 9700, 4.4)."""
    fake = FakeProvider(discovery={"authorization_response_iss_parameter_supported": True})
    upstream = upstream_of(fake)
    await upstream.check_issuer(ISSUER)
    for issuer in ("https://evil.example", None):
        with pytest.raises(NotWelcome):
            await upstream.check_issuer(issuer)


@pytest.mark.parametrize(
    ("provider", "claims", "name"),
    [
        (CAMPUS, {"preferred_username": "Grace@Campus.example"}, "grace@campus.example"),
        (CAMPUS, {"email": "grace@campus.example", "email_verified": True}, "grace@campus.example"),
        (CAMPUS, {"email": "grace@campus.example", "email_verified": "true"}, "grace@campus.example"),
        (CAMPUS, {"email": "grace@campus.example"}, "grace@campus.example"),
        (CAMPUS, {"email": "grace@campus.example", "email_verified": False}, None),
        (CAMPUS, {"email": "grace@campus.example", "email_verified": "false"}, None),
        (CAMPUS, {"email": "grace@campus.example", "email_verified": 0}, None),
        (CAMPUS, {"email": "grace@campus.example", "email_verified": []}, None),
        (CAMPUS, {"preferred_username": "ada@relay.example"}, None),
        (CAMPUS, {"preferred_username": "x@clients.auth.globus.org"}, None),
        (CAMPUS, {"preferred_username": "grace@elsewhere.example"}, None),
        (CAMPUS, {"preferred_username": "grace@campus.example.evil.example"}, None),
        (CAMPUS, {"preferred_username": "a b@campus.example"}, None),
        (CAMPUS, {"preferred_username": 7}, None),
        (CAMPUS, {}, None),
        (OTHER, {"preferred_username": "grace@elsewhere.example"}, "grace@elsewhere.example"),
        (OTHER, {"preferred_username": "grace@campus.example"}, None),
        (OTHER, {"preferred_username": "ada@relay.example"}, None),
    ],
)
def test_a_provider_names_people_in_its_own_domains_only(
    provider: Provider, claims: dict[str, Any], name: str | None
) -> None:
    if name is None:
        with pytest.raises(NotWelcome):
            person_untrusted(provider, {"sub": "s", **claims}, "relay.example", [CAMPUS, OTHER])
    else:
        found = person_untrusted(provider, {"sub": "s", **claims}, "relay.example", [CAMPUS, OTHER])
        assert found.username == name


@pytest.mark.parametrize(
    ("allow", "welcome"), [([], True), (["campus.example"], True), (["ada@campus.example"], False)]
)
def test_who_may_sign_in_is_the_operators_choice(allow: list[str], welcome: bool) -> None:
    provider = msgspec.structs.replace(CAMPUS, allow=allow)
    claims = {"sub": "s", "preferred_username": "grace@campus.example"}
    if welcome:
        person_untrusted(provider, claims, "relay.example", [provider])
    else:
        with pytest.raises(NotWelcome):
            person_untrusted(provider, claims, "relay.example", [provider])


# --- through the pages -------------------------------------------------------------------------------------


@pytest.fixture
def campus(world: RelayWorld) -> FakeProvider:
    """The world's relay with a provider."""
    fake = FakeProvider()
    upstream = Upstream(CAMPUS, Path("/nonexistent"), world.clock, fake)
    services = world.relay.app.state.services
    settings = msgspec.structs.replace(
        services.settings, sign_in=msgspec.structs.replace(services.settings.sign_in, providers=[CAMPUS])
    )
    object.__setattr__(services, "settings", settings)
    object.__setattr__(services, "upstreams", {"campus": upstream})
    return fake


async def leave(person: Person, at: str = "/sign-in") -> dict[str, str]:
    """Go to the provider; what the relay asked of it."""
    page = await person.get(at)
    form = next(form for form in forms_of(page.text) if form.action == "/sign-in/with/campus")
    answer = await person.post(form)
    place = answer.headers["location"]
    assert place.startswith(f"{ISSUER}/authorize?")
    return dict(parse_qsl(urlsplit(place).query))


async def come_back(person: Person, fake: FakeProvider, asked: dict[str, str], **changes: str) -> Any:
    fake.nonce = asked["nonce"]
    return await person.get("/sign-in/from/campus?" + urlencode({"code": "c", "state": asked["state"], **changes}))


async def test_somebody_signs_in_at_their_provider(world: RelayWorld, campus: FakeProvider) -> None:
    person = Person(world)
    page = await come_back(person, campus, await leave(person))
    assert "grace@campus.example" in page.text
    # The same account is the same identity, whatever name it has by now.
    again = Person(world)
    campus.claims = {"preferred_username": "hopper@campus.example"}
    page = await come_back(again, campus, await leave(again))
    assert "grace@campus.example" in page.text
    # Another account of the same name is not.
    other = Person(world)
    campus.claims = {"sub": "s-2"}
    page = await come_back(other, campus, await leave(other))
    assert page.status_code == 409


async def test_an_identity_that_rules_have_named_is_found_by_its_owner(world: RelayWorld, campus: FakeProvider) -> None:
    name = "grace@campus.example"
    made = await world.store.write(lambda c: add_identity(c, username=name, now=1.0, provider_id="p", status="unused"))
    person = Person(world)
    await come_back(person, campus, await leave(person))
    found = (await world.store.read(lambda c: select_by_usernames(c, [name])))[name]
    assert (found.id, found.status, found.name) == (made.id, "used", "Grace")


async def test_people_of_a_provider_can_be_named_before_they_come(world: RelayWorld, campus: FakeProvider) -> None:
    client_id, _ = await world.client()
    headers = await world.bearer(client_id, client_id, "auth.globus.org")
    asked = {"usernames": "grace@campus.example,x@elsewhere.example", "provision": "true"}
    found = (await world.http.get("/v2/api/identities", params=asked, headers=headers)).json()["identities"]
    assert [(item["username"], item["status"]) for item in found] == [("grace@campus.example", "unused")]
    person = Person(world)
    page = await come_back(person, campus, await leave(person))
    assert found[0]["id"] in page.text


async def test_an_answer_counts_once_in_the_browser_that_asked(world: RelayWorld, campus: FakeProvider) -> None:
    """Login CSRF: an attacker sends a victim the end of the attacker's own sign-in."""
    mallory, victim = Person(world), Person(world)
    asked = await leave(mallory)
    assert (await come_back(victim, campus, asked)).status_code == 403
    assert (await come_back(mallory, campus, asked, state="x")).status_code == 403
    assert (await come_back(mallory, campus, asked)).status_code == 200
    assert (await come_back(mallory, campus, asked)).status_code == 403
    refused = await leave(mallory)
    assert (await come_back(mallory, campus, refused, error="access_denied")).status_code == 403
    late = await leave(mallory)
    world.clock.now += 901
    assert (await come_back(mallory, campus, late)).status_code == 403


async def test_an_identity_is_linked_and_unlinked(world: RelayWorld, campus: FakeProvider) -> None:
    ada = await add_person(world, "ada")
    person = Person(world)
    await person.arrive(ada)
    page = await person.get("/account")
    form = next(form for form in forms_of(page.text) if form.fields.get("link") == "yes")
    asked = dict(parse_qsl(urlsplit((await person.post(form)).headers["location"]).query))
    page = await come_back(person, campus, asked)
    assert "The identity is linked." in page.text
    assert "grace@campus.example" in page.text
    # Whoever comes by the linked identity is the same person, under the primary one.
    other = Person(world)
    page = await come_back(other, campus, await leave(other))
    assert f"You are <strong>{ada.username}</strong>" in page.text
    form = next(form for form in forms_of(page.text) if form.action == "/account/primary")
    await other.post(form)
    third = Person(world)
    page = await third.sign_in("ada")
    assert "You are <strong>grace@campus.example</strong>" in page.text
    form = next(form for form in forms_of(page.text) if form.action == "/account/unlink")
    page = await third.post(form)
    assert "stands alone again" in page.text
    page = await Person(world).sign_in("ada")
    assert f"You are <strong>{ada.username}</strong>" in page.text


async def test_a_provider_that_is_down_is_told(world: RelayWorld, campus: FakeProvider) -> None:
    class Down:
        async def request(self, *_: Any, **__: Any) -> Answer:
            raise OutboundFailed("login.campus.example cannot be reached.")

    services = world.relay.app.state.services
    object.__setattr__(services, "upstreams", {"campus": Upstream(CAMPUS, Path("/x"), world.clock, Down())})
    person = Person(world)
    page = await person.get("/sign-in")
    form = next(form for form in forms_of(page.text) if form.action == "/sign-in/with/campus")
    answer = await person.post(form)
    assert answer.status_code == 502
    assert "cannot be reached" in answer.text


# --- where the relay never connects to ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "224.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:1::1", "localhost"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public_address(address)


def test_addresses_that_are() -> None:
    assert all(map(is_public_address, ("1.1.1.1", "8.8.8.8", "2606:4700:4700::1111")))


@pytest.mark.parametrize(
    "url",
    [
        *(
            "https://127.0.0.1:1/",
            "https://localhost:1/",
            "https://[::1]:1/",
            "https://169.254.169.254/latest/meta-data",
        ),
        *("http://1.1.1.1/", "ftp://1.1.1.1/", "https://user@1.1.1.1/", "https:///x", "file:///etc/passwd"),
        *("https://2130706433/", "https://0x7f000001/", "https://127.1/"),
    ],
)
async def test_nothing_is_fetched_from_inside(url: str) -> None:
    with pytest.raises(OutboundFailed) as caught:
        await Outbound().request("GET", url)
    assert "not public" in caught.value.sentence or "not an https" in caught.value.sentence, caught.value.sentence


def test_the_presets_are_in_order() -> None:
    text = (Path(__file__).parents[2] / "conf" / "providers.yaml").read_text()
    providers = settings.parse(text).sign_in.providers
    assert {"cilogon", "orcid"} <= {provider.id for provider in providers}


async def test_departures_from_one_address_are_bounded(world: RelayWorld, campus: FakeProvider) -> None:
    """Each leaves a row behind before anybody has shown who they are."""
    world.relay.services.departures.__init__(3, 60.0)  # type: ignore[misc]
    person = Person(world)
    form = next(f for f in forms_of((await person.get("/sign-in")).text) if f.action == "/sign-in/with/campus")
    answers = [await person.request("POST", form.action, form.fields) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [303] * 3 + [429] * 2
    assert int(answers[-1].headers["retry-after"]) == 20
    async with person_at(world, "192.0.2.9") as other:
        assert (await leave(other))["state"]
