"""Support: the bundle holds what helps and no secret, the log and the live screen show what is there."""

from __future__ import annotations

import json
import sqlite3
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from agent.cli.logs import last_lines, new_lines
from agent.cli.main import cli
from agent.cli.service import _print_status, _print_task
from agent.cli.top import lines_of
from agent.redaction import MARK, Redactor
from protocol.identity import NodeKey

CANARY = "canary-4f1d2c"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user whose every secret holds the canary or is a real key."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("TOWPATH_SETUP_KEY", f"twp-{CANARY}-setup")
    monkeypatch.setenv("TOWPATH_CLIENT_SECRET", f"{CANARY}-client")
    monkeypatch.setenv("HTTPS_PROXY", f"http://ada:{CANARY}-proxy@proxy.example:3128")
    config, state = tmp_path / "config" / "towpath", tmp_path / "state" / "towpath" / "agent"
    (config / "profiles").mkdir(parents=True)
    (tmp_path / "cache" / "towpath" / "tokens").mkdir(parents=True)
    state.mkdir(parents=True, mode=0o700)
    (config / "agent.yaml").write_text("# my password: " + CANARY + "-comment\nlimits: {lanes: 3}\n")
    (config / "profiles" / "default.json").write_text(json.dumps({"client_secret": f"{CANARY}-profile"}))
    NodeKey.generate().save(state / "node.key")
    (state / "local.loopback").write_text(json.dumps({"port": 1, "token": f"{CANARY}-loopback"}))
    connection = sqlite3.connect(tmp_path / "cache" / "towpath" / "tokens" / "x.sqlite")
    connection.execute("CREATE TABLE t (j TEXT)")
    connection.execute("INSERT INTO t VALUES (?)", [json.dumps({"a": {"access_token": f"{CANARY}-access"}})])
    connection.commit()
    connection.close()
    body = (state / "node.key").read_text().splitlines()[1]
    (state / "agent.log").write_text(
        f"INFO began\nWARNING Authorization: Bearer {CANARY}-bearer\n"
        f"ERROR {CANARY}-access leaked, {CANARY}-profile too\n"
        f"ERROR key {body}\nERROR eyJhbGciOiJFZERTQSJ9.{CANARY.replace('-', '_')}.sig\n"
        f"ERROR password='{CANARY} with blanks' https://u:{CANARY}-url@x.example/\nINFO {CANARY}-loopback\n"
    )
    return tmp_path


def test_no_secret_is_in_the_bundle(home: Path) -> None:
    target = home / "bundle.zip"
    done = CliRunner().invoke(cli, ["support-bundle", "--output", str(target)])
    assert done.exit_code == 0, done.output
    assert target.stat().st_mode & 0o777 == 0o600
    body = (home / "state" / "towpath" / "agent" / "node.key").read_text().splitlines()[1]
    with zipfile.ZipFile(target) as bundle:
        names = bundle.namelist()
        texts = {name: bundle.read(name).decode() for name in names}
    assert {"facts.json", "status.json", "configuration.json", "doctor.json", "state.json", "agent.log"} <= set(names)
    for name, text in texts.items():
        assert CANARY not in text, name
        assert CANARY.replace("-", "_") not in text, name
        assert body not in text, name
    assert "INFO began" in texts["agent.log"]
    assert "lanes: 3" in texts["files/agent.yaml"]
    assert "proxy.example:3128" in texts["facts.json"]
    assert "node.key" in texts["state.json"]
    for name in names:
        if name.endswith(".json"):
            json.loads(texts[name])


def test_an_existing_file_is_not_overwritten(home: Path) -> None:
    (home / "there.zip").write_text("mine")
    assert CliRunner().invoke(cli, ["support-bundle", "--output", str(home / "there.zip")]).exit_code == 1
    assert (home / "there.zip").read_text() == "mine"


@given(st.text(alphabet="abcdef0123456789", min_size=6, max_size=40), st.text(max_size=50), st.text(max_size=50))
def test_a_known_secret_never_stays(secret: str, before: str, after: str) -> None:
    assert secret not in Redactor([secret]).clean(before + secret + after).replace(MARK, "")


@pytest.mark.parametrize("text", ["lanes: 3", "the token bucket", "/data/secretary/file", "INFO towpath.link: Linked."])
def test_ordinary_text_stays(text: str) -> None:
    assert Redactor(["s3cr3t"]).clean(text) == text


# --- logs ----------------------------------------------------------------------------------------------------


def test_the_last_lines_reach_back_into_rotated_files(tmp_path: Path) -> None:
    (tmp_path / "agent.log.2").write_text("1\n2\n")
    (tmp_path / "agent.log.1").write_text("3\n4\n")
    (tmp_path / "agent.log").write_text("5\n")
    assert last_lines(tmp_path / "agent.log", 3) == ["3", "4", "5"]
    assert last_lines(tmp_path / "agent.log", 99) == ["1", "2", "3", "4", "5"]
    assert last_lines(tmp_path / "agent.log", 0) == []


def test_new_lines_go_on_after_a_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "agent.log"
    file.write_text("old\n")

    def append(text: str) -> None:
        with file.open("a") as stream:
            stream.write(text)

    steps = iter(
        [
            lambda: append("first\nhal"),
            lambda: append("f\n"),
            lambda: (file.rename(tmp_path / "agent.log.1"), file.write_text("second\n")),
        ]
    )
    monkeypatch.setattr("agent.cli.logs.time.sleep", lambda _: next(steps)())
    lines = new_lines(file)
    assert [next(lines) for _ in range(3)] == ["first", "half", "second"]
    lines.close()


def test_logs_without_a_log_say_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.cli.logs.shutil.which", lambda _: None)
    (home / "state" / "towpath" / "agent" / "agent.log").unlink()
    result = CliRunner().invoke(cli, ["logs"], standalone_mode=False)
    assert "no log" in str(result.exception)


def test_logs_of_an_agent_that_never_ran_ask_no_journal(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.cli.logs.shutil.which", lambda _: "/bin/journalctl")
    monkeypatch.setattr("agent.cli.logs._journal", lambda *_: pytest.fail("nothing can be there"))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "nowhere"))
    result = CliRunner().invoke(cli, ["logs"], standalone_mode=False)
    assert "has not been started yet" in str(result.exception)


# --- top -----------------------------------------------------------------------------------------------------


def status(done: int, **task: Any) -> dict[str, Any]:
    counters = {"files": 10, "files_transferred": 3, "bytes_total": 1000 << 20, "bytes_transferred": done << 20}
    counters["deleted"] = 0
    row = {
        "task_id": "00000000-0000-4000-8000-0000000000b1",
        "state": "ACTIVE",
        "status_code": "OK",
        "status_sentence": "",
        "current": "a\x1b[2Jb",
        "counters": {**counters, "scan_complete": True},
        **task,
    }
    return {
        "version": "1",
        "paused": False,
        "link": {"connected": True, "last_error": ""},
        "transfer": {"sessions": 0, "sent": 0},
        "tasks": [row],
    }


def test_top_shows_rates_and_what_is_left_and_obeys_no_escape_sequence() -> None:
    text = "\n".join(lines_of(status(600), status(500), 10.0))
    assert "1 active of 1 task(s), 10.0 MiB/s arriving" in text
    assert "60 %" in text
    assert "40 s" in text
    assert "\x1b" not in text
    waiting = "\n".join(
        lines_of(status(1, status_code="NO_SPACE", status_sentence="The disk is full."), status(1), 1.0)
    )
    assert "NO_SPACE" in waiting
    assert "The disk is full." in waiting


def test_top_of_a_source_says_that_it_is_read_from_and_how_fast() -> None:
    idle: dict[str, Any] = {**status(0), "tasks": []}
    assert lines_of(idle, idle, 1.0)[-1] == "Nothing to do."
    later = {**idle, "transfer": {"sessions": 1, "sent": 20 << 20}}
    text = "\n".join(lines_of(later, idle, 2.0))
    assert "1 transfer to another machine reads from here. 10.0 MiB/s leaving" in text
    assert "Nothing to do" not in text


def test_top_names_what_holds_a_task_up_whole_and_shows_what_has_ended_last() -> None:
    missing = status(1, status_code="COLLECTION_UNAVAILABLE", status_sentence="The root is not there.")
    ended = {**missing["tasks"][0], "task_id": "00000000-0000-4000-8000-0000000000a1", "state": "CANCELED"}
    document = {**missing, "tasks": [ended, *missing["tasks"]]}
    rows = [line for line in lines_of(document, document, 1.0) if line.startswith("0000")]
    assert [row[34:36] for row in rows] == ["b1", "a1"]
    assert "COLLECTION_UNAVAILABLE" in rows[0]


def test_status_says_who_can_mend_what_and_that_others_read_from_here(capsys: pytest.CaptureFixture[str]) -> None:
    held = status(3, state="WAITING", status_code="NO_SPACE", status_sentence="The disk is full.", who="source owner")
    document = {
        **held,
        "pid": 1,
        "config_file": "c",
        "state_dir": "s",
        "config_problem": "",
        "collections": [],
        "link": {"connected": True, "relay_url": "https://relay.example"},
        "transfer": {"sessions": 2, "sent": 0},
    }
    document["tasks"][0]["path"] = ""
    _print_status(document)
    lines = capsys.readouterr().out.splitlines()
    assert "  2 transfers to other machines read from here." in lines
    at = lines.index("  task 00000000-0000-4000-8000-0000000000b1: WAITING, 3 of 10 file(s), 3.00 MiB")
    assert lines[at + 1] == "    The disk is full. (up to the source's owner)"


def test_status_says_what_was_deleted(capsys: pytest.CaptureFixture[str]) -> None:
    """A delete task that had done all it should was shown with 0 files and 0 bytes."""
    document = status(0, state="SUCCEEDED", path="")
    task = document["tasks"][0]
    task["counters"] |= {"files": 1, "files_transferred": 0, "bytes_transferred": 0, "deleted": 83}
    _print_task(task)
    task["counters"] |= {"files_transferred": 1, "bytes_transferred": 1024}
    _print_task(task)
    lines = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines() if "task" in line]
    assert lines == ["SUCCEEDED, 0 of 1 file(s), 83 deleted", "SUCCEEDED, 1 of 1 file(s), 1.00 KiB, 83 deleted"]
