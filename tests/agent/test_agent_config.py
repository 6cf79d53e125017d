"""The configuration: every key is documented, every mistake is named with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.config.document import Entries, Section
from agent.config.document import settings as settings_of
from agent.config.keys import (
    MAX_CONFIG_BYTES,
    AgentConfig,
    ConfigError,
    default_config_file,
    default_state_dir,
    parse_config,
)
from agent.config.layers import load_config
from agent.enrol import template

FILE = Path("/etc/example/agent.yaml")
ID = "6c54cade-bde5-45c1-bdea-f4bd71dba2cc"


def problems(text: str) -> list[tuple[int, str]]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text.encode(), FILE)
    return [tuple(problem) for problem in caught.value.problems]


def test_the_documented_configuration_is_valid_and_names_every_key() -> None:
    text = template()
    config = parse_config(text.encode(), FILE)
    assert config == AgentConfig(state_dir=Path("/etc/example/agent.state"))
    document = yaml.safe_load(text)
    assert_documented(AgentConfig, document, text)


def assert_documented(record: type[Any], document: dict[str, Any], text: str) -> None:
    """Every key of the definition stands in the documented file, and no other; entries of lists in its comments."""
    assert set(document) == {row.key for row in settings_of(record)}
    for row in settings_of(record):
        if isinstance(row.kind, Section):
            assert_documented(row.kind.record, document[row.key], text)
        elif isinstance(row.kind, Entries):
            for inner in settings_of(row.kind.record):
                assert f"#   {inner.key} " in text, inner.key


def test_a_full_configuration_is_read() -> None:
    text = f"""
relay: {{url: "https://relay.example.org:8443", ca_file: ca.pem}}
state_dir: /var/lib/x
collections:
  - id: {ID}
    name: Measurements
    root: /data/m
    access: read-only
    sharing: true
    home: /people/me
    default_directory: /people
data: {{listen: "::", port: 50000, advertise: [192.0.2.7, data.example.org, "2001:db8::1"], allow_loopback: true}}
limits: {{workers: 8, lanes: 3}}
"""
    config = parse_config(text.encode(), FILE)
    (collection,) = config.collections
    assert (collection.read_only, collection.shareable, collection.home) == (True, True, "/people/me")
    assert config.relay.ca_file == Path("/etc/example/ca.pem")
    assert config.data.advertise == ("192.0.2.7", "data.example.org", "2001:db8::1")
    assert (config.limits.workers, config.limits.lanes) == (8, 3)
    assert config.state_dir == Path("/var/lib/x")


def test_every_mistake_is_reported_at_once_with_its_line() -> None:
    found = problems(
        "relay:\n"
        "  ulr: https://x.example\n"
        "data:\n"
        "  port: abc\n"
        "  listen: 300\n"
        "collections:\n"
        "  - name: A\n"
        f"    id: {ID}\n"
        "    acess: read-only\n"
        "    root: relative\n"
        "limits: 7\n"
    )
    assert [line for line, _ in found] == [2, 4, 5, 9, 10, 11]
    assert "did you mean `url`" in found[0][1]
    assert "whole number" in found[1][1]
    assert "did you mean `access`" in found[3][1]
    ((_, sentence),) = problems("limits: {bandwidth: {timetable: [{when: sat}]}}\n")
    assert sentence == "An entry needs the key `name`."


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("relay:\n  url: http://relay.example.org\n", 2, "https://"),
        ("relay:\n  url: https://relay.example.org/path\n", 2, "origin"),
        ("relay:\n  url: https://me:secret@relay.example.org\n", 2, "origin"),
        ("data:\n  port: 65536\n", 2, "between 0 and 65535"),
        ("data:\n  port: true\n", 2, "whole number"),
        ("data:\n  allow_loopback: 1\n", 2, "true or false"),
        ("data:\n  advertise: host\n", 2, "list"),
        ("data:\n  advertise: ['a b']\n", 2, "neither an address nor a host name"),
        ("limits:\n  workers: 0\n", 2, "between 1 and 64"),
        ("limits:\n\n  lanes: 99\n", 3, "between 1 and 32"),
        ("state_dir: 5\n", 1, "text"),
        ("relay: {}\nrelay: {}\n", 2, "twice"),
        ("a: [\n", 2, "not valid YAML"),
        ("- x\n", 1, "must hold keys"),
        (f"collections:\n- {{id: {ID}, name: a, root: /a, access: ro}}\n", 2, "read-only or read-write"),
        (f"collections:\n- {{id: {ID}, name: a, root: /a, sharing: 'yes'}}\n", 2, "true or false"),
        (f"collections:\n- {{id: {ID}, name: a, root: /a, home: /../x}}\n", 2, "inside the collection"),
        (f"collections:\n- {{id: {ID.upper()}, name: a, root: /a}}\n", 2, "lower-case UUID"),
        (f'collections:\n- {{id: {ID}, name: "a\\e[2J", root: /a}}\n', 2, "control characters"),
        (
            f"collections:\n- {{id: {ID}, name: a, root: /a}}\n- {{id: {ID}, name: b, root: /b}}\n",
            3,
            "listed twice",
        ),
        ("collections: {}\n", 1, "must be a list"),
        ("unknown: 1\n", 1, "Unknown key"),
        ("? [complex, key]\n: 1\n", 1, "Unknown key"),
    ],
)
def test_a_mistake_is_named_with_its_line(text: str, line: int, words: str) -> None:
    ((found, sentence),) = problems(text)
    assert (found, words in sentence) == (line, True), sentence


def test_files_that_are_no_configuration_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="towpath setup"):
        load_config(tmp_path / "missing.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"relay:\n  url: \xff\n")
    with pytest.raises(ConfigError, match=r"bytes\.yaml:2: .*UTF-8"):
        load_config(tmp_path / "bytes.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(ConfigError, match="larger"):
        load_config(tmp_path / "large.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "folder.yaml")


def test_deep_nesting_is_an_error_and_not_a_crash() -> None:
    assert problems("relay: " + "[" * 5000)[0][1].startswith("This is not valid YAML")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_configuration_or_a_config_error(data: bytes) -> None:
    try:
        parse_config(data, FILE)
    except ConfigError as error:
        assert error.problems
        assert all(problem.line >= 1 for problem in error.problems)


_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=10), st.floats(allow_nan=False))
_VALUES = st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
_KEYS = st.sampled_from(["relay", "url", "collections", "id", "root", "data", "port", "advertise", "limits", "lanes"])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(_KEYS, st.one_of(_VALUES, st.dictionaries(_KEYS, _VALUES, max_size=3)), max_size=4))
def test_any_yaml_is_a_configuration_or_a_config_error(document: object) -> None:
    try:
        parse_config(yaml.safe_dump(document).encode(), FILE)
    except ConfigError as error:
        assert error.problems


def test_the_places_of_configuration_and_state_follow_the_xdg_specification() -> None:
    environment = {"XDG_CONFIG_HOME": "/c", "XDG_STATE_HOME": "/s"}
    file = default_config_file(environment)
    assert file == Path("/c/towpath/agent.yaml")
    assert default_state_dir(file, environment) == Path("/s/towpath/agent")
    assert default_state_dir(Path("/else/beta.yaml"), environment) == Path("/else/beta.state")
    assert default_config_file({"XDG_CONFIG_HOME": "relative"}) == Path.home() / ".config/towpath/agent.yaml"
