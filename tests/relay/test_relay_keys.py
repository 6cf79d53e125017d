"""Keys and certificates of a relay: made once, renewed in time, never mixed up, readable by their owner alone."""

from __future__ import annotations

import datetime
import hashlib
import os
import ssl
import time
from pathlib import Path

import jwt
import msgspec
import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric import ec

from protocol.errors import ProtocolError
from protocol.private_file import write_private_file
from protocol.ticket import RelayRoot, TicketVerifier
from relay import keys, tls
from relay.keys import KeysUnusable, RelayKeys
from relay.settings import Settings
from relay.settings import parse as parse_settings

DAY = 86400.0
LIFE = 30 * DAY
TICKET = DAY / 2
NOW = 1_800_000_000.0


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    keys.create(tmp_path / "keys", NOW, LIFE)
    return tmp_path / "keys"


def signed(relay: RelayKeys, now: float) -> str:
    return relay.signer.sign_claims({"iss": relay.relay_id, "iat": int(now), "exp": int(now + TICKET)})


def test_making_keys_again_keeps_them(directory: Path) -> None:
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    keys.create(directory, NOW + DAY, LIFE)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_every_key_file_is_the_owners_alone(directory: Path) -> None:
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}


def test_a_year_of_rotation_is_followed_by_agents_that_pinned_the_root(directory: Path) -> None:
    relay = RelayKeys(directory)
    verifier = TicketVerifier(relay.relay_id, relay.root_public_pem)
    used, now = set(), NOW
    while now < NOW + 365 * DAY:
        relay.renew(now, key_life=LIFE, ticket_life=TICKET)
        used.add(relay.signer.kid)
        token = signed(relay, now)
        # A ticket is good for its whole life, whatever happens to the key meanwhile.
        verifier.claims_untrusted(token, now)
        verifier.claims_untrusted(token, now + TICKET)
        now += DAY / 4
    assert 17 <= len(used) <= 20
    with pytest.raises(ProtocolError):
        verifier.claims_untrusted(token, now + TICKET + DAY)


def test_a_key_that_another_process_certified_is_taken_up(directory: Path) -> None:
    relay = RelayKeys(directory)
    made = keys.certify_ticket_key(directory, RelayRoot.load(directory / "root.pem"), NOW, LIFE)
    assert relay.signer.kid != made.kid
    assert relay.renew(NOW, key_life=LIFE, ticket_life=TICKET)
    assert relay.signer.kid == made.kid
    assert not relay.renew(NOW, key_life=LIFE, ticket_life=TICKET)


def test_a_key_of_a_clock_that_went_too_fast_is_replaced(directory: Path) -> None:
    relay = RelayKeys(directory)
    verifier = TicketVerifier(relay.relay_id, relay.root_public_pem)
    assert not relay.renew(NOW, key_life=LIFE, ticket_life=TICKET)
    with pytest.raises(ProtocolError):
        verifier.claims_untrusted(signed(relay, NOW - DAY), NOW - DAY)
    assert relay.renew(NOW - DAY, key_life=LIFE, ticket_life=TICKET)
    verifier.claims_untrusted(signed(relay, NOW - DAY), NOW - DAY)
    assert not relay.renew(NOW - DAY, key_life=LIFE, ticket_life=TICKET)


def test_without_the_root_nothing_renews_and_the_operator_is_told(directory: Path, tmp_path: Path) -> None:
    kept = tmp_path / "safe"
    keys.move_root(directory, kept)
    assert kept.stat().st_mode & 0o777 == 0o600
    relay = RelayKeys(directory)
    assert not relay.statistics().root_present
    assert not relay.renew(NOW + 19 * DAY, key_life=LIFE, ticket_life=TICKET)
    with pytest.raises(KeysUnusable, match="root certify"):
        relay.renew(NOW + 21 * DAY, key_life=LIFE, ticket_life=TICKET)
    keys.certify_ticket_key(directory, RelayRoot.load(kept), NOW + 21 * DAY, LIFE)
    assert relay.renew(NOW + 21 * DAY, key_life=LIFE, ticket_life=TICKET)
    with pytest.raises(KeysUnusable):
        keys.move_root(directory, tmp_path / "again")


def test_another_relays_root_is_refused(directory: Path) -> None:
    with pytest.raises(KeysUnusable, match="another one"):
        keys.certify_ticket_key(directory, RelayRoot.generate(), NOW, LIFE)


@pytest.mark.parametrize("name", ["relay-id", "root-public.pem", "id-token.pem", "ticket-key.json"])
def test_missing_and_damaged_files_are_named(directory: Path, name: str) -> None:
    if name.endswith((".json", "token.pem")):
        (directory / name).write_bytes(b"damaged")
        with pytest.raises(KeysUnusable, match=name):
            RelayKeys(directory)
    (directory / name).unlink()
    with pytest.raises(KeysUnusable, match=name):
        RelayKeys(directory)


@pytest.mark.parametrize("key", ["no PEM", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "rsa"])
def test_a_damaged_key_within_the_file_of_the_ticket_key_is_named(directory: Path, key: str) -> None:
    file = directory / "ticket-key.json"
    stored = msgspec.json.decode(file.read_bytes())
    stored["key"] = (directory / keys.ID_TOKEN_KEY).read_text() if key == "rsa" else key
    file.write_bytes(msgspec.json.encode(stored))
    with pytest.raises(KeysUnusable, match=r"/ticket-key\.json .*(restore it from a backup|root certify)"):
        RelayKeys(directory)


# --- certificates ----------------------------------------------------------------------------------------


def handshake(server: ssl.SSLContext, authority: str, name: str) -> bytes:
    """A TLS handshake in memory, strict as Python 3.13's default; returns the server's certificate."""
    client = ssl.create_default_context(cadata=authority)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(back, there, server_hostname=name)
    other = server.wrap_bio(there, back, server_side=True)
    for _ in range(4):
        for side in (one, other):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    certificate = one.getpeercert(binary_form=True)
    assert certificate is not None
    return certificate


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    parsed = parse_settings("listen: {url: 'https://relay.example.org'}\ntls: {names: [192.0.2.7, '2001:DB8:0::1']}\n")
    return msgspec.structs.replace(parsed, directory=str(tmp_path))


@pytest.mark.parametrize("name", ["relay.example.org", "localhost", "127.0.0.1", "::1", "192.0.2.7", "2001:db8::1"])
def test_a_self_made_certificate_is_good_for_its_names(settings: Settings, name: str) -> None:
    tls.create(settings, datetime.datetime.now(datetime.UTC))
    shown = tls.ServerCertificate(settings)
    authority = tls.ca_certificate_pem(settings)
    assert authority is not None
    assert hashlib.sha256(handshake(shown.context, authority, name)).hexdigest() == shown.channel


def test_other_names_are_refused(settings: Settings) -> None:
    shown = tls.ServerCertificate(settings)
    authority = tls.ca_certificate_pem(settings)
    assert authority is not None
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(shown.context, authority, "elsewhere.example.org")


def test_a_certificate_is_renewed_before_its_end_by_the_same_authority(settings: Settings) -> None:
    now = datetime.datetime.now(datetime.UTC)
    tls.create(settings, now - datetime.timedelta(days=300))
    authority = tls.ca_fingerprint(settings)
    aged = tls.ServerCertificate(settings)
    first = aged.channel
    assert not aged.renew(now)
    # The clock of the certificates is moved back, since nobody may handshake in the future.
    (tls.tls_directory(settings) / "server.pem").unlink()
    tls.create(settings, now - datetime.timedelta(days=350))
    assert aged.renew(now)
    assert aged.channel != first
    assert aged.statistics().expires > (now + datetime.timedelta(days=390)).timestamp()
    assert tls.ca_fingerprint(settings) == authority
    pem = tls.ca_certificate_pem(settings)
    assert pem is not None
    for context in (aged.context, aged.link_context):
        assert hashlib.sha256(handshake(context, pem, "localhost")).hexdigest() == aged.channel


def test_a_new_name_gives_a_new_certificate(settings: Settings) -> None:
    first = tls.ServerCertificate(settings)
    assert tls.ServerCertificate(settings).channel == first.channel
    wider = msgspec.structs.replace(settings, tls=Settings().tls)
    wider = msgspec.structs.replace(
        wider, listen=msgspec.structs.replace(settings.listen, url="https://new.example.org")
    )
    second = tls.ServerCertificate(wider)
    assert second.channel != first.channel
    assert "new.example.org" in second.statistics().names


def test_an_authority_whose_key_is_away_or_another_is_not_replaced(settings: Settings) -> None:
    """Agents trust the CA for good: what another key signed would shut all of them out."""
    now = datetime.datetime.now(datetime.UTC)
    tls.create(settings, now)
    key = tls.tls_directory(settings) / "ca.key"
    kept = key.read_bytes()
    key.unlink()
    shown = tls.ServerCertificate(settings)
    assert not key.exists(), "it is not needed until the certificate nears its end"
    with pytest.raises(tls.CertificateUnusable, match=r"ca\.key: No such file"):
        shown.renew(now + datetime.timedelta(days=390))
    write_private_file(key, tls._pem(ec.generate_private_key(ec.SECP256R1())))
    with pytest.raises(tls.CertificateUnusable, match=r"ca\.key is not the key of .*ca\.pem; restore both"):
        shown.renew(now + datetime.timedelta(days=390))
    write_private_file(key, kept)
    assert shown.renew(now + datetime.timedelta(days=390))


def test_near_the_authoritys_end_nothing_is_made_over_and_over(settings: Settings) -> None:
    """A certificate lasts no longer than its authority: there, one of 60 days is as good as can be had."""
    made = datetime.datetime.now(datetime.UTC)
    tls.create(settings, made)
    shown = tls.ServerCertificate(settings)
    for left in (59.0, 30.0, 0.5, -5.0):
        now = made + datetime.timedelta(days=3650 - left)
        assert shown.renew(now) == (left == 59.0)
        assert not shown.renew(now + datetime.timedelta(minutes=1))
    assert shown.statistics().expires == shown.statistics().authority_expires
    (tls.tls_directory(settings) / "server.pem").unlink()
    with pytest.raises(tls.CertificateUnusable, match=r"has ended; run `towpath-relay authority renew"):
        shown.renew(made + datetime.timedelta(days=3660))


def test_a_renewed_authority_is_believed_by_those_who_trust_the_former_one(settings: Settings) -> None:
    now = datetime.datetime.now(datetime.UTC)
    tls.create(settings, now - datetime.timedelta(days=3640))
    shown = tls.ServerCertificate(settings)
    former = tls.ca_certificate_pem(settings)
    assert former is not None
    assert shown.statistics().expires < (now + datetime.timedelta(days=11)).timestamp()
    # What the relay is called now has no part in it: who trusts the authority knows it by its name of then.
    renamed = msgspec.structs.replace(settings, name="Another name")
    ends = tls.renew_authority(renamed, now)
    assert ends > now + datetime.timedelta(days=3600)
    assert shown.renew(now)
    assert shown.statistics().expires > (now + datetime.timedelta(days=390)).timestamp()
    assert shown.statistics().authority_expires == int(ends.timestamp())
    renewed = tls.ca_certificate_pem(settings)
    assert renewed is not None
    assert renewed != former
    for authority in (former, renewed, former + renewed):
        assert hashlib.sha256(handshake(shown.context, authority, "localhost")).hexdigest() == shown.channel
    assert (tls.tls_directory(settings) / "ca.pem").stat().st_mode & 0o777 == 0o644


def test_an_authority_without_its_key_is_not_renewed(settings: Settings) -> None:
    now = datetime.datetime.now(datetime.UTC)
    tls.create(settings, now)
    key, before = tls.tls_directory(settings) / "ca.key", tls.ca_fingerprint(settings)
    write_private_file(key, tls._pem(ec.generate_private_key(ec.SECP256R1())))
    with pytest.raises(tls.CertificateUnusable, match=r"ca\.key is not the key of .*ca\.pem; restore both"):
        tls.renew_authority(settings, now)
    key.unlink()
    with pytest.raises(tls.CertificateUnusable, match=r"ca\.key: No such file"):
        tls.renew_authority(settings, now)
    assert tls.ca_fingerprint(settings) == before
    own = msgspec.structs.replace(settings.tls, certificate="mine.pem", key="mine.key")
    with pytest.raises(tls.CertificateUnusable, match=r"tls\.certificate"):
        tls.renew_authority(msgspec.structs.replace(settings, tls=own), now)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_replaces_belongs_to_whom_it_did(tmp_path: Path) -> None:
    """`root certify` by root, beside a relay that runs as a user of its own."""
    keys.create(tmp_path, time.time(), 86400.0)
    file = tmp_path / "ticket-key.json"
    os.chown(file, 12345, 23456)
    keys.certify_ticket_key(tmp_path, RelayRoot.load(tmp_path / "root.pem"), time.time(), 86400.0)
    status = file.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (12345, 23456, 0o600)
    assert (tmp_path / "root.pem").stat().st_uid == 0


def test_private_files_are_private_and_the_authority_is_not(settings: Settings) -> None:
    tls.ServerCertificate(settings)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tls.tls_directory(settings).iterdir()}
    assert modes == {"ca.key": 0o600, "ca.pem": 0o644, "server.pem": 0o600}


def test_an_operators_certificate_is_used_and_taken_up_when_it_changes(tmp_path: Path) -> None:
    authority = trustme.CA()

    def issue(name: str) -> None:
        leaf = authority.issue_cert("relay.example.org")
        leaf.private_key_pem.write_to_path(tmp_path / "own.key")
        (tmp_path / name).write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))

    issue("own.pem")
    settings = msgspec.structs.replace(
        parse_settings("tls: {certificate: own.pem, key: own.key}\n"), directory=str(tmp_path)
    )
    shown = tls.ServerCertificate(settings)
    first = shown.channel
    assert tls.ca_certificate_pem(settings) is None
    assert tls.ca_fingerprint(settings) is None
    issue("own.pem")
    assert shown.renew(datetime.datetime.now(datetime.UTC))
    assert shown.channel != first
    handshake(shown.context, authority.cert_pem.bytes().decode(), "relay.example.org")
    # A half-finished replacement must not spoil the pair in use.
    issue("other.pem")
    with pytest.raises(tls.CertificateUnusable):
        tls.ServerCertificate(settings)
    handshake(shown.context, authority.cert_pem.bytes().decode(), "relay.example.org")


@pytest.mark.parametrize("kinds", [("ECDSA", "RSA"), ("RSA", "ECDSA")])
def test_a_certificate_of_another_kind_of_key_takes_the_place_of_the_former(
    kinds: tuple[str, str], tmp_path: Path
) -> None:
    authority = trustme.CA()

    def issue(kind: str) -> None:
        leaf = authority.issue_cert("relay.example.org", key_type=trustme.KeyType[kind])
        leaf.private_key_pem.write_to_path(tmp_path / "own.key")
        (tmp_path / "own.pem").write_bytes(leaf.cert_chain_pems[0].bytes())

    issue(kinds[0])
    settings = msgspec.structs.replace(
        parse_settings("tls: {certificate: own.pem, key: own.key}\n"), directory=str(tmp_path)
    )
    shown = tls.ServerCertificate(settings)
    issue(kinds[1])
    assert shown.renew(datetime.datetime.now(datetime.UTC))
    pem = authority.cert_pem.bytes().decode()
    for context in (shown.context, shown.link_context):
        assert hashlib.sha256(handshake(context, pem, "relay.example.org")).hexdigest() == shown.channel


def test_the_key_of_id_tokens_is_replaced_and_the_former_one_stays_published(tmp_path: Path) -> None:
    now = time.time()
    keys.create(tmp_path, now, 1000.0)
    held = keys.RelayKeys(tmp_path)
    first = held.jwk_set["keys"][0]
    signed = held.id_token({"sub": "s"})
    assert not held.renew_id_token_key(now + 10, life=1000.0)
    assert held.renew_id_token_key(now + 2000, life=1000.0)
    newest, former = held.jwk_set["keys"]
    assert former == first != newest
    assert jwt.decode(signed, jwt.PyJWK(former).key, algorithms=["RS512"])["sub"] == "s"
    assert jwt.get_unverified_header(held.id_token({}))["kid"] == newest["kid"]
    assert keys.RelayKeys(tmp_path).jwk_set == held.jwk_set
    assert not held.renew_id_token_key(now + 2010, life=1000.0)
    for name in (keys.ID_TOKEN_KEY, keys.FORMER_ID_TOKEN_KEY):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0
