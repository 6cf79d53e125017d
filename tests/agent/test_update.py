"""Updates against a hostile mirror (the attacks of TUF's own list), and changing versions whatever goes wrong."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tuf.api.exceptions import DownloadError, SlowRetrievalError

from agent.update.change import change, go_back
from agent.update.install import State
from agent.update.mirror import HttpFetcher
from agent.update.offer import Offer, UpdateRefused, is_newer, parse_offer_untrusted, takes_part, version_key
from installers.build_bundle import LAUNCHER
from installers.repository import LIFE, Keys
from protocol.errors import ProtocolError, RetryLater, TowpathError
from tests.agent.update_world import PLATFORM, Clock, FakeAgent, World, bundle, changed


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def metadata(world: World, name: str) -> Path:
    return world.folder / "repository" / "metadata" / name


def test_a_release_is_found_fetched_and_installed(world: World) -> None:
    assert world.look() is None
    world.publish("0.2.0")
    assert world.fetch().version == "0.2.0"
    assert world.installation.running() == "0.1.0"
    assert changed(world, FakeAgent(world.installation)).startswith("Version 0.2.0 runs")
    assert world.installation.running() == "0.2.0"
    assert world.look() is None


# --- attacks ---------------------------------------------------------------------------------------------------


def test_rollback_to_older_metadata_is_refused(world: World) -> None:
    old = metadata(world, "timestamp.json").read_bytes()
    world.publish("0.2.0")
    world.look()
    metadata(world, "timestamp.json").write_bytes(old)
    with pytest.raises(UpdateRefused) as caught:
        world.look()
    assert caught.value.code == "UPDATE_ROLLBACK"


def test_rollback_to_an_older_version_by_signed_metadata_is_no_update(world: World) -> None:
    world.publish("0.2.0")
    world.fetch()
    changed(world, FakeAgent(world.installation))
    world.publish("0.1.0")
    assert world.look() is None


def test_freeze_is_noticed_when_the_timestamp_runs_out(world: World) -> None:
    world.repository.now -= timedelta(days=61)
    world.publish("0.2.0")
    with pytest.raises(UpdateRefused) as caught:
        world.look()
    assert caught.value.code == "UPDATE_EXPIRED"
    assert "clock" in world.installation.state().last_problem


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_no_role_is_believed_past_its_time(world: World, monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    monkeypatch.setitem(LIFE, role, -1)
    world.publish("0.2.0")
    with pytest.raises(UpdateRefused) as caught:
        world.look()
    assert caught.value.code == "UPDATE_EXPIRED"


def test_mix_and_match_is_refused(world: World) -> None:
    """Targets of one release under the snapshot of another."""
    world.publish("0.2.0")
    mixed = metadata(world, "2.targets.json").read_bytes()
    world.publish("0.3.0")
    metadata(world, "3.targets.json").write_bytes(mixed)
    with pytest.raises(UpdateRefused):
        world.look()


def endless(start: bytes = b"") -> Iterator[bytes]:
    yield start
    while True:
        yield b"x" * 65536


@pytest.mark.parametrize("name", ["timestamp.json", "2.root.json", "snapshot.json", "targets.json"])
def test_endless_metadata_is_cut(world: World, name: str) -> None:
    world.publish("0.2.0")
    world.web.twist = lambda asked: endless() if asked.endswith(name) else None
    with pytest.raises(UpdateRefused):
        world.look()


def test_endless_bundles_are_cut(world: World) -> None:
    world.publish("0.2.0")
    world.web.twist = lambda asked: (
        endless((world.folder / "0.2.0.tar.gz").read_bytes()) if "bundles" in asked else None
    )
    with pytest.raises(UpdateRefused):
        world.fetch()
    assert not (world.installation.versions / "0.2.0").exists()


def test_a_bundle_that_was_changed_is_refused(world: World) -> None:
    world.publish("0.2.0")
    evil = bundle(world.folder / "evil.tar.gz", "0.2.0", script='#!/bin/sh\necho "towpath 0.2.0"; touch /tmp/evil\n')
    world.web.twist = lambda asked: iter([evil.read_bytes()]) if "bundles" in asked else None
    with pytest.raises(UpdateRefused) as caught:
        world.fetch()
    assert caught.value.code == "UPDATE_MISMATCH"


def test_a_relay_with_keys_of_its_own_is_refused(world: World, tmp_path: Path) -> None:
    """A whole repository, correctly signed by somebody else."""
    (tmp_path / "other").mkdir()
    other = World(tmp_path / "other")
    other.publish("9.9.9")
    world.web.directory = other.web.directory
    with pytest.raises(UpdateRefused):
        world.look()


def test_a_threshold_that_is_not_met_is_refused(tmp_path: Path) -> None:
    keys = Keys.generate({"targets": 2})
    keys.threshold["targets"] = 2
    world = World(tmp_path, keys)
    world.publish("0.2.0")
    assert world.look() is not None
    one = Keys({**keys.signers, "targets": keys.signers["targets"][:1]}, keys.threshold)
    world.repository.keys = one
    world.publish("0.3.0")
    with pytest.raises(UpdateRefused) as caught:
        world.look()
    assert caught.value.code == "UPDATE_UNSIGNED"


def test_keys_are_rotated_by_the_old_ones_and_the_pinned_root_still_leads_there(world: World) -> None:
    old = world.keys.signers["root"]
    fresh = Keys.generate()
    world.repository.keys = fresh
    fresh.signers["root"] = [*fresh.signers["root"], *old]
    world.repository.use_keys()
    world.repository.root.roles["root"].keyids = [s.public_key.keyid for s in fresh.signers["root"][:1]]
    world.repository.publish(root=True)
    world.publish("0.2.0")
    assert world.fetch().version == "0.2.0"


def test_a_root_that_the_old_keys_did_not_sign_is_refused(world: World) -> None:
    world.repository.keys = Keys.generate()
    world.repository.use_keys()
    world.repository.publish(root=True)
    with pytest.raises(UpdateRefused):
        world.look()


def test_a_root_that_has_run_out_is_refused(world: World) -> None:
    world.repository.now -= timedelta(days=3651)
    world.repository.publish(root=True)
    world.repository.now += timedelta(days=3651)
    world.publish("0.2.0")
    with pytest.raises(UpdateRefused) as caught:
        world.look()
    assert caught.value.code == "UPDATE_EXPIRED"


def test_the_wrong_platform_is_refused(world: World) -> None:
    path = bundle(world.folder / "w.tar.gz", "0.2.0", platform="plan9-mips")
    world.repository.add_release(path, "0.2.0", "plan9-mips")
    stolen = json.dumps({"version": "0.2.0", "platform": "plan9-mips", "channel": "stable", "bundle": "b"}).encode()
    world.repository.add(f"channels/stable/{PLATFORM}.json", stolen)
    world.repository.publish()
    with pytest.raises(UpdateRefused) as caught:
        world.look()
    assert caught.value.code == "WRONG_PLATFORM"


def test_a_bundle_that_is_not_what_its_offer_says_is_refused(world: World) -> None:
    world.publish("0.2.0", platform="plan9-mips")
    with pytest.raises(UpdateRefused) as caught:
        world.fetch()
    assert caught.value.code == "WRONG_PLATFORM"
    assert os.listdir(world.installation.versions) == ["0.1.0"]


def test_a_mirror_that_is_away_is_asked_again_later(world: World) -> None:
    def away(asked: str) -> Iterator[bytes]:
        raise ConnectionRefusedError("no")

    world.web.twist = away
    with pytest.raises(RetryLater):
        world.look()


def test_a_slow_mirror_is_given_up() -> None:
    class Slow(io.BytesIO):
        def read1(self, size: int | None = -1) -> bytes:
            return b"x"

    times = iter(range(0, 10_000, 5))
    fetcher = HttpFetcher(clock=lambda: float(next(times)))
    with pytest.raises(SlowRetrievalError, match="slowly"):
        for _ in fetcher._chunks(Slow()):
            pass


def test_only_web_addresses_are_asked() -> None:
    with pytest.raises(DownloadError, match="no address"):
        HttpFetcher().fetch("file:///etc/passwd")


GOOD_OFFER = {"version": "1.0.0", "platform": "p", "channel": "stable", "bundle": "b"}


def test_offers_are_offers_or_protocol_errors() -> None:
    outcomes: Counter[str] = Counter()
    good = json.dumps(GOOD_OFFER).encode()

    @given(st.binary(max_size=200) | st.builds(changed_byte, st.just(good), st.integers(0), st.integers(0, 255)))
    @example(good)
    def parse(data: bytes) -> None:
        try:
            offer = parse_offer_untrusted(data)
        except ProtocolError:
            outcomes["refused"] += 1
        else:
            assert version_key(offer.version) > version_key("")
            outcomes["taken"] += 1

    parse()
    assert outcomes["refused"]
    assert outcomes["taken"]


def changed_byte(data: bytes, place: int, byte: int) -> bytes:
    place %= len(data)
    return data[:place] + bytes([byte]) + data[place + 1 :]


@pytest.mark.parametrize(
    "changes", [{"version": "../../x"}, {"bundle": "../x"}, {"bundle": "/x"}, {"share": 101}, {"version": "1" * 99}]
)
def test_offers_with_tricks_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        parse_offer_untrusted(json.dumps(GOOD_OFFER | changes).encode())


# --- versions and shares -----------------------------------------------------------------------------------------


def test_versions_are_ordered() -> None:
    ordered = ["nonsense", "0.1.0", "0.2.0a1", "0.2.0b1", "0.2.0rc1", "0.2.0rc2", "0.2.0", "0.10.0", "1.0.0"]
    assert sorted(set(ordered), key=version_key) == ordered
    assert is_newer("0.10.0", "0.9.9")
    assert not is_newer("0.1.0", "0.1.0")


def test_a_growing_share_keeps_those_it_had() -> None:
    offers = [Offer(version="1.0.0", platform="p", channel="c", bundle="b", share=share) for share in (0, 10, 50, 100)]
    nodes = [f"node-{number}" for number in range(2000)]
    groups = [{node for node in nodes if takes_part(node, offer)} for offer in offers]
    assert groups[0] == set()
    assert groups[0] <= groups[1] <= groups[2] <= groups[3] == set(nodes)
    assert 120 < len(groups[1]) < 280
    other = Offer(version="1.0.1", platform="p", channel="c", bundle="b", share=10)
    assert groups[1] != {node for node in nodes if takes_part(node, other)}


# --- changing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["dead", "mute", "wrong", "unlinked"])
def test_a_version_that_is_not_well_is_rolled_back_and_not_tried_again(world: World, how: str) -> None:
    world.publish("0.2.0")
    world.fetch()
    agent = FakeAgent(world.installation, v0_2_0=how)
    with pytest.raises(UpdateRefused) as caught:
        changed(world, agent)
    assert caught.value.code == "ROLLED_BACK"
    assert world.installation.running() == agent.version == "0.1.0"
    assert agent.journal[:3] == ["stop 0.1.0", "start 0.2.0", agent.journal[2]]
    assert world.installation.state().failed == ["0.2.0"]
    assert world.look() is None
    world.publish("0.3.0")
    offer = world.look()
    assert offer is not None
    assert offer.version == "0.3.0"


def test_the_agent_is_checkpointed_before_anything_is_switched(world: World) -> None:
    world.publish("0.2.0")
    world.fetch()
    agent = FakeAgent(world.installation, v0_1_0="stuck")
    with pytest.raises(TowpathError, match="hangs"):
        changed(world, agent)
    assert world.installation.running() == "0.1.0"


def test_a_stopped_agent_is_not_started_by_a_change(world: World) -> None:
    world.publish("0.2.0")
    world.fetch()
    agent = FakeAgent(world.installation)
    agent.version = None
    changed(world, agent)
    assert agent.journal == []
    assert world.installation.running() == "0.2.0"


def test_the_owner_can_go_back(world: World) -> None:
    world.publish("0.2.0")
    world.fetch()
    agent = FakeAgent(world.installation)
    changed(world, agent)
    assert go_back(world.installation, agent, running=True) == "0.1.0"
    assert agent.version == "0.1.0"
    with pytest.raises(UpdateRefused):
        go_back(world.installation, agent, running=True)


def test_a_version_that_does_not_start_here_is_never_switched_to(world: World) -> None:
    world.publish("0.2.0", script="#!/bin/sh\necho broken >&2; exit 1\n")
    with pytest.raises(UpdateRefused) as caught:
        world.fetch()
    assert caught.value.code == "SELF_TEST_FAILED"
    assert os.listdir(world.installation.versions) == ["0.1.0"]


def test_an_interrupted_unpacking_leaves_the_current_version_and_is_repeated(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.publish("0.2.0")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("agent.update.install._sync_tree", killed)
        patch.setattr("agent.update.install.shutil.rmtree", lambda *a, **k: None)
        with pytest.raises(KeyboardInterrupt):
            world.fetch()
    assert world.installation.running() == "0.1.0"
    assert not (world.installation.versions / "0.2.0").exists()
    world.fetch()
    assert sorted(os.listdir(world.installation.versions)) == ["0.1.0", "0.2.0"]


def test_old_versions_are_pruned_but_not_those_to_go_back_to(world: World) -> None:
    agent = FakeAgent(world.installation)
    for version in ("0.2.0", "0.3.0", "0.4.0"):
        world.publish(version)
        clock = Clock()
        change(world.installation, world.fetch().version, agent, sleep=clock.sleep, clock=clock)
    assert sorted(os.listdir(world.installation.versions)) == ["0.3.0", "0.4.0"]
    assert world.installation.state() == State(previous="0.3.0", last_check=1000.0)


def test_a_version_that_nobody_watched_is_left_by_the_launcher_when_it_does_not_start(world: World) -> None:
    """The machine lost power between switching and watching, and the new version is broken."""
    installation = world.installation
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for version, script in (("0.1.0", 'echo "fine $*"'), ("0.2.0", "exit 3")):
        folder = installation.versions / version / "bin"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / python).write_text(f"#!/bin/sh\n{script}\n")
        (folder / "towpath").write_text(LAUNCHER.format(python=python))
        for path in folder.iterdir():
            path.chmod(0o755)
    installation.remember(State(pending="0.2.0", previous="0.1.0"))
    installation.switch("0.2.0")
    codes = []
    for _ in range(6):
        program = installation.current / "bin" / "towpath"
        result = subprocess.run([program, "run", "x"], capture_output=True, text=True, check=False)
        codes.append(result.returncode)
    assert codes == [3] * 5 + [0]
    assert result.stdout == "fine -s -m agent run x\n"
    assert installation.running() == "0.1.0"
    installation.settle(proved=False)
    assert installation.state().failed == ["0.2.0"]
    assert installation.state().pending == ""


def test_a_version_that_nobody_watched_and_runs_is_the_right_one(world: World) -> None:
    world.installation.remember(State(pending="0.1.0", previous="0.0.9"))
    world.installation.settle(proved=False)
    assert world.installation.state().pending == "0.1.0"
    world.installation.settle(proved=True)
    assert world.installation.state() == State(previous="0.0.9")
