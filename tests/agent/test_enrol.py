"""Set-up against a small relay over real TLS: trust, repetition, interruption, a second collection."""

from __future__ import annotations

import base64
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from agent import enrol
from agent.cli.service import setup
from agent.config.layers import load_config
from agent.enrol import Outcome, SetupFailed, Wish, find_setup_key, parse_setup_key_untrusted, set_up
from agent.enrol_http import RelayUnreachable, SetupRefused
from agent.identity_file import NotSetUp, load_identity, require
from protocol.errors import ProtocolError
from tests.agent.small_relay import SmallRelay, small_relay


@pytest.fixture
def relay() -> Iterator[SmallRelay]:
    with small_relay() as running:
        yield running


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def run_set_up(tmp_path: Path, root: Path, key: str, **wish: object) -> Outcome:
    return set_up(parse_setup_key_untrusted(key), Wish(root=str(root), **wish), tmp_path / "agent.yaml")  # type: ignore[arg-type]


def test_a_setup_key_becomes_an_identity_a_private_key_and_a_configuration(
    relay: SmallRelay, tmp_path: Path, root: Path
) -> None:
    outcome = run_set_up(tmp_path, root, relay.new_key("Reef scans"), read_only=True)
    config = load_config(tmp_path / "agent.yaml")
    (collection,) = config.collections
    assert (collection.id, collection.name, collection.root) == (outcome.collection_id, "Reef scans", str(root))
    assert (collection.read_only, collection.shareable) == (True, False)
    assert config.relay.url == relay.url
    assert config.relay.ca_file is not None
    assert config.relay.ca_file.read_text() == relay.ca_pem
    identity, key = require(config.state_dir)
    assert (identity.node_id, identity.endpoint_id) == relay.nodes[key.certificate_pem]
    assert (identity.relay_id, identity.relay_root) == (relay.relay_id, relay.root_pem)
    assert not outcome.already
    for name in ("node.key", "identity.json", "relay-ca.pem"):
        assert stat.S_IMODE((config.state_dir / name).stat().st_mode) == 0o600
    assert stat.S_IMODE(config.state_dir.stat().st_mode) == 0o700
    assert "# Where the agent keeps its key" in (tmp_path / "agent.yaml").read_text()


def test_nothing_is_written_outside_configuration_and_state(
    relay: SmallRelay, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    run_set_up(tmp_path, root, relay.new_key())
    assert not any(home.iterdir())
    assert not any(root.iterdir())
    assert {entry.name for entry in tmp_path.iterdir()} == {"agent.yaml", "agent.state", "root", "home"}


def test_the_same_command_twice_changes_nothing_and_says_so(relay: SmallRelay, tmp_path: Path, root: Path) -> None:
    key = relay.new_key()
    first = run_set_up(tmp_path, root, key)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    second = run_set_up(tmp_path, root, key)
    assert second.already
    assert second.collection_id == first.collection_id
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert len(relay.requests) == 1


def test_a_new_key_for_a_collection_that_is_configured_is_not_called_one_from_before(
    relay: SmallRelay, tmp_path: Path, root: Path
) -> None:
    """A machine whose key was revoked or lost is set up anew, beside the configuration it had."""
    first = run_set_up(tmp_path, root, relay.new_key())
    (tmp_path / "agent.state").rename(tmp_path / "old state")
    key = relay.new_key()
    relay.keys[key] = f"Data|{first.collection_id}"
    second = run_set_up(tmp_path, root, key)
    assert second.collection_id == first.collection_id
    assert not second.already


def test_a_lost_answer_is_asked_for_again(relay: SmallRelay, tmp_path: Path, root: Path) -> None:
    key = relay.new_key()
    relay.lose_answers = 1
    with pytest.raises(RelayUnreachable):
        run_set_up(tmp_path, root, key)
    assert not (tmp_path / "agent.yaml").exists()
    outcome = run_set_up(tmp_path, root, key)
    assert not outcome.already
    assert load_config(tmp_path / "agent.yaml").collections[0].id == outcome.collection_id
    first, second = (request for _, request in relay.requests)
    assert first["certificate"] == second["certificate"]


@pytest.mark.parametrize("step", ["save_identity", "_write_config", "write_private_file"])
def test_an_interrupted_set_up_is_completed_by_repeating_it(
    relay: SmallRelay, tmp_path: Path, root: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = relay.new_key()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(enrol, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_set_up(tmp_path, root, key)
    outcome = run_set_up(tmp_path, root, key)
    config = load_config(tmp_path / "agent.yaml")
    assert [collection.id for collection in config.collections] == [outcome.collection_id]
    assert config.relay.ca_file is not None
    assert config.relay.ca_file.read_text() == relay.ca_pem
    identity, _ = require(config.state_dir)
    assert [entry.collection_id for entry in identity.redeemed] == [outcome.collection_id]
    assert len({request["certificate"] for _, request in relay.requests}) == 1


def test_a_second_key_adds_a_collection_to_the_same_endpoint_and_keeps_comments(
    relay: SmallRelay, tmp_path: Path, root: Path
) -> None:
    first = run_set_up(tmp_path, root, relay.new_key("One"))
    file = tmp_path / "agent.yaml"
    file.write_text("# the owner's own words\n" + file.read_text())
    file.chmod(0o640)
    second = run_set_up(tmp_path, root, relay.new_key("Two"), name="Mine", shareable=True)
    assert (second.endpoint_id, second.node_id) == (first.endpoint_id, first.node_id)
    assert [c.name for c in load_config(file).collections] == ["One", "Mine"]
    assert file.read_text().startswith("# the owner's own words\n")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    identity = load_identity(load_config(file).state_dir)
    assert identity is not None
    assert len(identity.redeemed) == 2


def test_a_relay_with_another_authority_gets_nothing(relay: SmallRelay, tmp_path: Path, root: Path) -> None:
    with pytest.raises(SetupFailed, match="Nothing was sent"):
        run_set_up(tmp_path, root, relay.new_key(fingerprint="00" * 32))
    assert relay.requests == []
    assert not (tmp_path / "agent.yaml").exists()


def test_showing_the_right_authority_is_not_having_its_certificate(
    relay: SmallRelay, tmp_path: Path, root: Path
) -> None:
    """Somebody in between shows the relay's true CA, but cannot answer with a certificate signed by it."""
    genuine = trustme.CA().cert_pem.bytes().decode()
    relay.shown_ca = relay.ca_pem = genuine
    with pytest.raises(RelayUnreachable, match="certificate cannot be trusted"):
        run_set_up(tmp_path, root, relay.new_key())
    assert relay.requests == []


def test_without_a_fingerprint_the_system_decides(relay: SmallRelay, tmp_path: Path, root: Path) -> None:
    with pytest.raises(RelayUnreachable, match="certificate cannot be trusted"):
        run_set_up(tmp_path, root, relay.new_key(fingerprint=None))
    assert relay.requests == []


def test_an_agent_keeps_to_its_relay(relay: SmallRelay, tmp_path: Path, root: Path) -> None:
    run_set_up(tmp_path, root, relay.new_key())
    with small_relay() as other, pytest.raises(SetupFailed, match="has one relay"):
        run_set_up(tmp_path, root, other.new_key())
    assert other.requests == []


def test_a_refusal_says_why_and_the_key_can_be_replaced(relay: SmallRelay, tmp_path: Path, root: Path) -> None:
    key = relay.new_key()
    relay.used[key] = "somebody else's certificate"
    with pytest.raises(SetupRefused, match="already used") as caught:
        run_set_up(tmp_path, root, key)
    assert caught.value.code == "SetupKeyInvalid"
    run_set_up(tmp_path, root, relay.new_key())


def test_the_root_is_checked_before_the_key_is_used(relay: SmallRelay, tmp_path: Path) -> None:
    with pytest.raises(SetupFailed, match="not a directory"):
        run_set_up(tmp_path, tmp_path / "missing", relay.new_key())
    with pytest.raises(SetupFailed, match="UTF-8"):
        run_set_up(tmp_path, tmp_path / os.fsdecode(b"\xff"), relay.new_key())
    assert relay.requests == []


def test_a_lost_node_key_is_not_quietly_replaced(relay: SmallRelay, tmp_path: Path, root: Path) -> None:
    outcome = run_set_up(tmp_path, root, relay.new_key())
    (outcome.state_dir / "node.key").unlink()
    with pytest.raises(NotSetUp, match="backup"):
        run_set_up(tmp_path, root, relay.new_key())
    with pytest.raises(NotSetUp):
        require(outcome.state_dir)


def test_a_node_key_that_others_can_read_is_refused(relay: SmallRelay, tmp_path: Path, root: Path) -> None:
    outcome = run_set_up(tmp_path, root, relay.new_key())
    (outcome.state_dir / "node.key").chmod(0o644)
    with pytest.raises(NotSetUp, match="0644"):
        require(outcome.state_dir)


def test_a_configuration_that_was_there_before_stays_as_it_was_and_is_completed_beside(
    relay: SmallRelay, tmp_path: Path, root: Path
) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text("{relay: {}} # mine\n")
    key = relay.new_key()
    outcome = run_set_up(tmp_path, root, key)
    assert file.read_text() == "{relay: {}} # mine\n"
    config = load_config(file)
    assert config.relay.url == relay.url
    assert [collection.id for collection in config.collections] == [outcome.collection_id]
    assert run_set_up(tmp_path, root, key).already
    assert len(relay.requests) == 1


# --- the key ---------------------------------------------------------------------------------------------------


def test_the_key_comes_from_argument_file_or_environment(
    relay: SmallRelay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three = (relay.new_key() for _ in range(3))
    (tmp_path / "key").write_text(two + "\n")
    monkeypatch.setenv("TOWPATH_SETUP_KEY", three)
    assert find_setup_key(one, None).text == one
    assert find_setup_key(None, tmp_path / "key").text == two
    assert find_setup_key(None, None).text == three
    with pytest.raises(SetupFailed, match="not both"):
        find_setup_key(one, tmp_path / "key")
    monkeypatch.delenv("TOWPATH_SETUP_KEY")
    with pytest.raises(SetupFailed, match="No setup key"):
        find_setup_key(None, None)
    with pytest.raises(SetupFailed, match="cannot be read"):
        find_setup_key(None, tmp_path / "missing")


def encoded(document: object) -> str:
    return "twp-" + base64.urlsafe_b64encode(json.dumps(document).encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "twp-",
        "twp-!!!!",
        "other",
        "twp-" + "A" * 5000,
        encoded([]),
        encoded(["http://plain.example", None, "s"]),
        encoded(["https://relay.example/path", None, "s"]),
        encoded(["https://relay.example", "short", "s"]),
        encoded(["https://relay.example", None, ""]),
        encoded(["https://relay.example", 5, "s"]),
        encoded({"url": "https://relay.example"}),
        "twp-ä",
    ],
)
def test_what_is_no_setup_key_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="not a setup key"):
        parse_setup_key_untrusted(text)


@given(st.text(max_size=200))
def test_any_text_is_a_key_or_a_protocol_error(text: str) -> None:
    for candidate in (text, "twp-" + text):
        try:
            parse_setup_key_untrusted(candidate)
        except ProtocolError as error:
            assert text[:20].strip() == "" or len(text) < 5 or text not in str(error)


# --- the command -----------------------------------------------------------------------------------------------


def test_the_command_never_shows_the_key(relay: SmallRelay, tmp_path: Path, root: Path) -> None:
    key = relay.new_key()
    secret = key[len("twp-") :]
    runner = CliRunner(env={"TOWPATH_SETUP_KEY": key})
    arguments = ["--root", str(root), "--config", str(tmp_path / "agent.yaml")]
    first = runner.invoke(setup, arguments)
    assert first.exit_code == 0, first.output
    assert "is set up" in first.output
    second = runner.invoke(setup, arguments)
    assert second.exit_code == 0
    assert "was set up before with this key" in second.output
    told = json.loads(runner.invoke(setup, [*arguments, "-F", "json"]).output)
    assert (told["was_set_up"], told["root"], told["served"]) == (True, str(root), False)
    assert told["collection_id"] in first.output
    relay.used[other := relay.new_key()] = "another"
    third = runner.invoke(setup, [*arguments, other])
    assert third.exit_code == 1
    everything = first.output + second.output + third.output
    assert secret not in everything
    assert other[len("twp-") :] not in everything
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret in path.read_text()]


def test_globus_files_are_written_only_when_asked_for(
    relay: SmallRelay, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    arguments = [relay.new_key(), "--root", str(root), "--config", str(tmp_path / "agent.yaml")]
    assert CliRunner().invoke(setup, arguments).exit_code == 0
    assert not any(home.iterdir())
    assert CliRunner().invoke(setup, [*arguments, "--globus-files"]).exit_code == 0
    written = (home / ".globusonline" / "lta" / "client-id.txt").read_text().strip()
    assert written == load_config(tmp_path / "agent.yaml").collections[0].id
