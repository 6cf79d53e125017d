"""The doctor finds what is wrong, says what to do, and survives its own checks."""

from __future__ import annotations

import dataclasses
import datetime
import json
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent.cli import doctor as command
from agent.cli.config import warnings_of
from agent.cli.main import cli
from agent.collections import MARKS_FILE, Collections, Marks, _Known
from agent.config.keys import AgentConfig, CollectionConfig
from agent.config.layers import load_config
from agent.doctor.machine import check_collections
from agent.doctor.network import _authority, _same_relay, _what_to_do, check_paths
from agent.doctor.registry import CHECKS, Entry, Examination
from agent.identity_file import IDENTITY_FILE, KEY_FILE, Identity, save_identity
from agent.storage.disks import Disk
from agent.storage.mounts import Mark
from protocol.findings import Finding
from protocol.identity import NodeKey

ID = "6c54cade-bde5-45c1-bdea-f4bd71dba2cc"


def breaks(_: Examination) -> list[Finding]:
    raise ZeroDivisionError("by design")


RELEASE = threading.Event()


def hangs(_: Examination) -> list[Finding]:
    RELEASE.wait(30)
    return []


def examination(tmp_path: Path) -> Examination:
    return Examination(config_file=tmp_path / "agent.yaml", config=None, status=None, now=time.time())


def test_every_check_of_the_table_can_be_loaded_and_names_are_unique() -> None:
    assert all(callable(entry.load()) for entry in CHECKS)
    assert len({entry.name for entry in CHECKS}) == len(CHECKS)


def test_a_check_that_breaks_or_hangs_is_a_finding(tmp_path: Path) -> None:
    (finding,) = command.run_check(Entry("x", "X", f"{__name__}:breaks"), examination(tmp_path))
    assert finding.level == "failure"
    assert "by design" in finding.sentence
    (finding,) = command.run_check(Entry("x", "X", f"{__name__}:hangs", seconds=0.05), examination(tmp_path))
    assert "did not come to an end" in finding.sentence
    RELEASE.set()


def test_a_check_without_a_thread_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    (finding,) = command.run_check(Entry("x", "X", f"{__name__}:breaks"), examination(tmp_path))
    assert "no more threads" in finding.sentence


@pytest.mark.parametrize(("marker", "notes"), [("", 2), ("uuid 1234-ABCD", 0)])
def test_disks_that_cannot_be_told_from_others_are_noted(tmp_path: Path, marker: str, notes: int) -> None:
    root = tmp_path / "root"
    root.mkdir()
    collection = CollectionConfig(id=ID, name="Sticks", root=str(root))
    mark = Mark("/data", "exfat", 0, marker)
    marks = Marks(tmp_path / MARKS_FILE)
    marks._change(ID, _Known(str(root), mark, (Disk((b"stick",), Mark("/data/stick", "fuseblk", 0, marker)),)))
    found = Examination(
        config_file=tmp_path / "agent.yaml",
        config=AgentConfig(state_dir=tmp_path, collections=(collection,)),
        status=None,
        now=time.time(),
    )
    told = [each.sentence for each in check_collections(found) if "would be taken for" in each.sentence]
    assert len(told) == notes


def run(config_file: Path, *arguments: str) -> tuple[int, dict[str, list[dict[str, str]]]]:
    result = CliRunner().invoke(
        cli, ["doctor", "--config", str(config_file), "-F", "json", *arguments], standalone_mode=False
    )
    document = json.loads(result.stdout)
    return result.return_value, {entry["name"]: entry["findings"] for entry in document["checks"]}


def terminal(_examination: Examination) -> Iterator[Finding]:
    yield Finding("warning", "Named \x1b[2J by a peer.", "Look at \x1b]0;x.")


def test_what_is_found_acts_on_no_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.doctor.registry.CHECKS", [Entry("x", "Title", f"{__name__}:terminal")])
    result = CliRunner().invoke(cli, ["doctor", "--config", str(tmp_path / "agent.yaml")], standalone_mode=False)
    said = result.stdout.splitlines()
    assert said == ["Title", "  WARNING Named ␛1B[2J by a peer.", "          → Look at ␛1B]0;x."]


MINE = ("configuration", "agent", "state", "collections")


def test_a_machine_that_was_never_set_up(tmp_path: Path) -> None:
    code, found = run(tmp_path / "agent.yaml", *MINE)
    assert code == 1
    assert "towpath setup" in found["configuration"][0]["sentence"]
    assert "line" not in found["configuration"][0]["advice"]


def test_a_file_of_metrics_that_nobody_reads_is_told(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text("metrics: {textfile: m.txt}\n")
    (warning,) = [sentence for sentence in warnings_of(load_config(file), file) if "metrics" in sentence]
    assert "does not end in .prom" in warning
    file.write_text("metrics: {textfile: m.prom}\n")
    assert not [sentence for sentence in warnings_of(load_config(file), file) if "metrics" in sentence]


def marked(tmp_path: Path) -> tuple[Path, CollectionConfig, Marks]:
    """A configuration with one collection, and what its agent has kept of the root when it first saw it."""
    root, state = tmp_path / "root", tmp_path / "agent.state"
    root.mkdir()
    state.mkdir(mode=0o700)
    config_file = tmp_path / "agent.yaml"
    config_file.write_text(f"collections:\n- {{id: {ID}, name: Data, root: {root}}}\n")
    (config,) = load_config(config_file).collections
    marks = Marks(state / MARKS_FILE)
    assert Collections(marks).report(config).available
    return config_file, config, marks


def test_a_mount_point_without_its_disk_is_not_called_well(tmp_path: Path) -> None:
    config_file, config, marks = marked(tmp_path)
    (finding,) = run(config_file, "collections")[1]["collections"]
    assert finding["level"] == "ok"
    seen = marks.expected(config)
    assert seen is not None
    marks.keep(config, dataclasses.replace(seen, mount_point="/mnt/disk", inode=2))
    code, found = run(config_file, "collections")
    assert code == 1
    assert "is not on the disk mounted at /mnt/disk" in found["collections"][0]["sentence"]


def test_a_disk_below_a_root_that_is_not_mounted_is_named(tmp_path: Path) -> None:
    config_file, config, marks = marked(tmp_path)
    Path(config.root, "disk").mkdir()

    class Mounted:
        def look_below(self, _known: object, *, place: bool) -> list[Disk]:
            return [Disk((name,), Mark(f"/mnt/{place}", "nfs4", 0)) for name in (b"disk", b"gone")]

    marks.keep_disks(config, Mounted())  # type: ignore[arg-type]
    (finding,) = run(config_file, "collections")[1]["collections"]
    assert finding["level"] == "warning"
    assert "/disk/, /gone/" in finding["sentence"]
    assert "accept-root" in finding["advice"]


def test_collections_are_looked_at_also_where_the_marks_of_their_roots_are_damaged(tmp_path: Path) -> None:
    config_file, _, _ = marked(tmp_path)
    (tmp_path / "agent.state" / MARKS_FILE).write_bytes(b"{")
    code, found = run(config_file, "state", "collections")
    assert code == 1
    assert [finding["level"] for finding in found["collections"]] == ["ok"]
    failures = [finding for finding in found["state"] if finding["level"] == "failure"]
    assert [MARKS_FILE in finding["sentence"] for finding in failures] == [True]
    assert "revoked" not in failures[0]["advice"], "it may be removed, and the agent stays"


def test_what_is_wrong_is_named_with_what_to_do(tmp_path: Path) -> None:
    config_file = tmp_path / "agent.yaml"
    (tmp_path / "agent.state").mkdir(mode=0o755)
    (tmp_path / "agent.state").chmod(0o755)
    config_file.write_text(
        f"relay: {{url: 'https://relay.example.org', ca_file: ca.pem}}\n"
        f"collections:\n- {{id: {ID}, name: Data, root: {tmp_path / 'gone'}}}\n"
    )
    code, found = run(config_file, *MINE)
    assert code == 1
    sentences = {name: " ".join(row["sentence"] for row in rows) for name, rows in found.items()}
    assert "ca.pem is missing" in sentences["configuration"]
    assert "does not run" in sentences["agent"]
    assert "Other users can look into" in sentences["state"]
    assert f"{tmp_path / 'gone'} of Data is not there" in sentences["collections"]
    failures = [row for rows in found.values() for row in rows if row["level"] == "failure"]
    assert failures
    assert all(row["advice"] for row in failures)
    (tmp_path / "gone").mkdir()
    assert run(config_file, "collections")[0] == 0


def enrolled(place: Path) -> Identity:
    """An agent that was set up, without having done anything."""
    key = NodeKey.generate()
    place.mkdir(mode=0o700)
    key.save(place / KEY_FILE)
    identity = Identity(
        endpoint_id=ID, node_id=ID, relay_id="mine", relay_root="", relay_url="", fingerprint=key.fingerprint
    )
    save_identity(place, identity)
    return identity


@pytest.mark.parametrize("name", [IDENTITY_FILE, KEY_FILE, MARKS_FILE])
def test_what_an_agent_cannot_start_without_is_looked_at(tmp_path: Path, name: str) -> None:
    config_file, state = tmp_path / "agent.yaml", tmp_path / "agent.state"
    config_file.write_text("relay: {url: 'https://relay.example.org'}\n")
    enrolled(state)
    (fine,) = run(config_file, "state")[1]["state"]
    assert fine["level"] == "ok"
    (state / name).write_bytes(b"\xa5damaged")
    code, found = run(config_file, "state")
    assert code == 1
    assert name in found["state"][0]["sentence"]
    assert found["state"][0]["advice"]


def test_another_relay_than_the_one_of_the_enrolment_is_told(tmp_path: Path) -> None:
    config_file = tmp_path / "agent.yaml"
    config_file.write_text("relay: {url: 'https://relay.example.org'}\n")
    looked = Examination(config_file=config_file, config=load_config(config_file), status=None, now=0.0)
    assert not list(_same_relay(looked, "https://relay.example.org", {"relay_id": "another"})), "not set up yet"
    enrolled(tmp_path / "agent.state")
    assert not list(_same_relay(looked, "https://relay.example.org", {"relay_id": "mine"}))
    (finding,) = _same_relay(looked, "https://relay.example.org", {"relay_id": "another"})
    assert (finding.level, "Another relay answers" in finding.sentence) == ("failure", True)
    assert "relay.url" in finding.advice


def authority(days: float) -> str:
    """A certificate that ends so many days from now."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Relay CA")])
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=9000)
    ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(start).not_valid_after(ends)
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.parametrize(
    ("code", "advice"),
    [(9, "clock, which seems to be behind"), (10, "clock; if it is right"), (62, "relay.url"), (64, "relay.url")],
)
def test_advice_for_https_goes_by_what_is_wrong_with_the_certificate(code: int, advice: str) -> None:
    """The codes are OpenSSL's; the library that asks wraps the error."""
    refused = ssl.SSLCertVerificationError()
    refused.verify_code = code
    error = httpx.ConnectError("no")
    error.__cause__ = OSError("wrapped")
    error.__cause__.__context__ = refused
    assert advice in _what_to_do(error)
    assert "opens encrypted connections" in _what_to_do(httpx.ConnectError("no"))


def test_an_authority_that_ends_is_told_and_whether_the_relay_has_a_newer_one(tmp_path: Path) -> None:
    file, now, old = tmp_path / "ca.pem", time.time(), authority(200)
    file.write_text(old)
    (finding,) = _authority(file, {"ca_certificate": old}, now)
    assert (finding.level, "towpath-relay authority renew" in finding.advice) == ("warning", True)
    (finding,) = _authority(file, {"ca_certificate": authority(3000)}, now)
    assert "has a newer one" in finding.advice
    assert not list(_authority(file, {"ca_certificate": None}, now)), "the relay shows a public authority's"
    file.write_text(old + authority(3000))
    assert not list(_authority(file, {"ca_certificate": old}, now))


def test_an_unknown_check_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["doctor", "--config", str(tmp_path / "a.yaml"), "weather"])
    assert result.exit_code == 2
    assert "known are" in result.output


@pytest.mark.parametrize("form", ["text", "json"])
def test_both_formats(tmp_path: Path, form: str) -> None:
    result = CliRunner().invoke(
        cli, ["doctor", "--config", str(tmp_path / "agent.yaml"), "-F", form, *MINE], standalone_mode=False
    )
    assert "agent.yaml: There is no configuration here yet" in result.stdout


def test_a_collection_with_the_agents_own_files_in_it_is_found(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(f"collections:\n- id: {ID}\n  name: Home\n  root: {tmp_path}\n")
    found = dataclasses.replace(examination(tmp_path), config=load_config(file))
    notes = [each for each in check_collections(found) if each.level == "note"]
    assert len(notes) == 2
    assert "the agent's key" in notes[0].sentence
    assert all("It is not offered" in each.sentence for each in notes)


def test_paths_are_told_of_tasks_under_way_and_of_few_that_are_over(tmp_path: Path) -> None:
    """Tasks that are over stay for days: the doctor wrote a line for each of thousands."""
    states = ["SUCCEEDED"] * 40 + ["ACTIVE", "QUEUED"] + ["FAILED"] * 40
    tasks = [
        {"task_id": f"t{number}", "state": state, "path": "" if state == "QUEUED" else "direct tcp"}
        for number, state in enumerate(states)
    ]
    status = {"network": {"relay": "allow"}, "tasks": tasks}
    looked = Examination(config_file=tmp_path / "agent.yaml", config=None, status=status, now=0.0)
    assert [finding.details["task"] for finding in check_paths(looked)] == ["t40", "t79", "t80", "t81"]
