"""The configuration file: every key documented, every mistake named with its line."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from relay.initialise import initialise
from relay.settings import Duration, Settings, SettingsError, load, parse

EXAMPLE = Path(__file__).parents[2] / "conf" / "relay.yaml"


def test_the_documented_file_has_every_key_with_its_default() -> None:
    text = EXAMPLE.read_text()
    assert parse(text) == Settings()
    document = yaml.safe_load(text)
    for field in msgspec.structs.fields(Settings):
        assert field.name in document
        if isinstance(document[field.name], dict):
            assert set(document[field.name]) == {inner.name for inner in msgspec.structs.fields(field.type)}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("listen:\n  prot: 9\n", "line 2: there is no key listen.prot"),
        ("\n\nname: x\nnmae: y\n", "line 4: there is no key nmae"),
        ("listen:\n  port: eighty\n", "line 2: listen.port must be a whole number from 0 to 65535"),
        ("listen:\n  proxies: [proxy.example]\n", "is no IP address"),
        ("listen:\n  proxies: [10.0.0.1/8]\n", "is no IP address, nor a network such as 10.0.0.0/8"),
        (
            "listen:\n  proxy_header: x-real-ip\n",
            "line 2: listen.proxy_header must be one of x-forwarded-for, forwarded",
        ),
        ("listen:\n  port: 70000\n", "line 2: listen.port"),
        ("listen:\n  port: true\n", "line 2: listen.port"),
        ("listen:\n  port: 1\n  port: 2\n", "line 3: listen.port stands here for the second time"),
        ("tickets:\n\n  life: 3\n", "line 3: tickets.life must be a length of time"),
        ("tickets:\n  life: -1h\n", "line 2: tickets.life"),
        ("tickets:\n  life: 0s\n", "line 2: tickets.life"),
        ("tickets: {life: 20d, key_life: 30d}\n", "tickets.key_life must be at least three times"),
        ("log: {level: loud}\n", "line 1: log.level must be one of debug, info, warning, error"),
        ("tls:\n  names: x\n", "line 2: tls.names must be a list"),
        ("tls:\n  names: ['a b']\n", "'a b' is neither a host name nor an IP address"),
        ("tls:\n  key: a.pem\n", "belong together"),
        ("listen:\n  url: http://relay.example.org\n", "listen.url must be an origin"),
        ("listen:\n  url: https://relay.example.org/path\n", "listen.url must be an origin"),
        ("listen:\n  url: 'https://relay.example.org:x'\n", "listen.url must be an origin"),
        ("name:\n", "line 1: name must be a text"),
        ("- 1\n", "line 1: the file must be a section"),
        ("a: [\n", "this is not YAML"),
        ("listen:\n  host: !!python/name:os.system x\n", "line 2: listen.host cannot be read"),
        ("sign_in: {domain: 'a@b'}\n", "sign_in.domain"),
        ("web:\n  allowed_origins: [banana]", "web.allowed_origins: 'banana' is no origin"),
        (
            "sign_in:\n  providers:\n"
            "  - {id: x, name: X, issuer: 'https://x', client_id: y, domains: [x.org]}\n"
            "  - {id: y, name: Y, issuer: 'https://y', client_id: y, domains: [y.org], tyop: 1}",
            "line 4: sign_in.providers, entry 2: there is no key `tyop`",
        ),
        ("sign_in:\n  providers:\n  - id: x", "line 3: sign_in.providers, entry 1: it needs the key `name`"),
    ],
)
def test_mistakes_are_named_with_their_line(text: str, complaint: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse(text, "relay.yaml")
    assert complaint in caught.value.sentence
    assert caught.value.sentence.startswith("relay.yaml")


def test_empty_files_and_empty_sections_mean_the_defaults() -> None:
    assert parse("") == parse("listen:\ntls:\n") == Settings()


@given(st.sampled_from([("s", 1), ("m", 60), ("h", 3600), ("d", 86400)]), st.integers(1, 1000))
def test_lengths_of_time(unit: tuple[str, int], count: int) -> None:
    settings = parse(f"sign_in:\n  failures_window: {count}{unit[0]}\n")
    assert settings.sign_in.failures_window == Duration(count * unit[1])


def test_the_directory_counts_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "relay.yaml").write_text("directory: data\nlisten: {url: 'https://Relay.example.org/'}\n")
    settings = load(tmp_path / "relay.yaml")
    assert settings.directory_path == tmp_path / "data"
    assert settings.public_url == "https://Relay.example.org"
    assert settings.user_domain == "relay.example.org"
    assert settings.certificate_names == ["relay.example.org", "localhost", "127.0.0.1", "::1"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"relay\.yaml: cannot be read: No such file.*--config"):
        load(tmp_path / "relay.yaml")


@pytest.mark.parametrize(
    ("host", "url", "names"),
    [
        ("0.0.0.0", "https://localhost:8443", ["localhost", "127.0.0.1", "::1"]),
        ("192.0.2.7", "https://192.0.2.7:8443", ["192.0.2.7", "localhost", "127.0.0.1", "::1"]),
        ("::1", "https://[::1]:8443", ["::1", "localhost", "127.0.0.1"]),
    ],
)
def test_the_address_follows_from_host_and_port(host: str, url: str, names: list[str]) -> None:
    settings = parse(f"listen:\n  host: '{host}'\n")
    assert settings.public_url == url
    assert settings.certificate_names == names


@pytest.mark.parametrize(
    ("port", "url", "expected"),
    [
        (None, None, 8443),
        (None, "https://relay.example.org", 8443),
        (None, "https://relay.example.org:9000", 9000),
        (9001, "https://relay.example.org:9000", 9001),
    ],
)
def test_a_new_relay_listens_where_its_address_says(
    tmp_path: Path, port: int | None, url: str | None, expected: int
) -> None:
    made = initialise(tmp_path / "relay", host="127.0.0.1", port=port, url=url, name=None)
    assert made.settings.listen.port == expected
