"""What the agent tells the service manager, how it behaves on shared machines, and what its log looks like."""

from __future__ import annotations

import json
import logging
import os
import resource
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent import local_socket, state_files
from agent.cli.main import cli
from agent.config.keys import LogConfig
from agent.log_lines import formatter
from agent.process import batch_job, raise_file_limit
from agent.sdnotify import Notifier
from agent.state_files import is_shared, pragmas
from agent.transfer.books.journal import Journal
from agent.transfer.tasks.task_store import TaskStore

UNITS = Path(__file__).parents[2] / "systemd"


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder is on NFS."""
    monkeypatch.setattr(state_files, "file_system_of", lambda directory: "nfs4")


def test_the_watchdog_interval_is_taken_out_of_the_environment(tmp_path: Path) -> None:
    environment = {"NOTIFY_SOCKET": str(tmp_path / "n"), "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}
    notifier = Notifier.from_environment(environment)
    assert notifier.watchdog == 30.0
    assert environment == {}
    assert Notifier.from_environment({"WATCHDOG_USEC": "5", "WATCHDOG_PID": "1"}).watchdog is None
    assert Notifier.from_environment({"WATCHDOG_USEC": "x"}).watchdog is None


def test_signs_of_life_reach_the_service_manager(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "n"))
        channel.settimeout(5)
        notifier = Notifier(str(tmp_path / "n"))
        notifier.alive()
        notifier.status("two\nlines")
        assert channel.recv(100) == b"WATCHDOG=1"
        assert channel.recv(100) == b"STATUS=two lines"


def test_on_a_shared_file_system_there_is_no_write_ahead_log(tmp_path: Path, shared: None) -> None:
    assert is_shared(tmp_path)
    assert "PRAGMA journal_mode = TRUNCATE" in pragmas(tmp_path)
    TaskStore(tmp_path / "tasks.sqlite").close()
    Journal(tmp_path / "journal.sqlite").close()
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(("-wal", "-shm"))]


def test_a_database_with_a_write_ahead_log_moves_to_a_shared_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TaskStore(tmp_path / "tasks.sqlite")
    store.put("port", "5")
    store.close()
    monkeypatch.setattr(state_files, "file_system_of", lambda directory: "lustre")
    store = TaskStore(tmp_path / "tasks.sqlite")
    assert store.get("port") == "5"
    store.close()
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(("-wal", "-shm"))]


def test_the_socket_of_a_shared_state_directory_lies_in_the_runtime_directory(
    tmp_path: Path, shared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").mkdir()
    monkeypatch.setattr(local_socket, "is_shared", lambda directory: True)
    # pytest's own directories may be too deep for the address of a socket.
    with tempfile.TemporaryDirectory(prefix="t") as run:
        monkeypatch.setenv("XDG_RUNTIME_DIR", run)
        listener, path = local_socket.listen(tmp_path / "state")
        listener.close()
        assert path.is_relative_to(run)
        assert local_socket.address(tmp_path / "state") == path


def test_a_path_too_long_for_a_socket_is_gone_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state_dir = tmp_path / ("x" * 120)
    state_dir.mkdir()
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    listener, path = local_socket.listen(state_dir)
    listener.close()
    assert len(os.fsencode(path)) <= 103
    local_socket.forget(state_dir, path)


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({"SLURM_JOB_ID": "4711"}, "Slurm job 4711"),
        ({"PBS_JOBID": "12.head"}, "PBS job 12.head"),
        ({"JOB_ID": "undefined"}, ""),
        ({}, ""),
    ],
)
def test_batch_jobs_are_recognised(environment: dict[str, str], job: str) -> None:
    assert batch_job(environment) == job


def test_the_limit_of_open_files_is_raised_as_far_as_allowed() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 512));"
        "from agent.process import raise_file_limit; print(raise_file_limit())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "512\n"
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert raise_file_limit() >= before[0]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_login_node_agent_steps_back() -> None:
    code = (
        "from agent.process import step_back; import os; before = os.nice(0); step_back(); print(os.nice(0) - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(result.stdout) <= 10


# --- log -----------------------------------------------------------------------------------------------------


def line_of(form: str, sentence: str, *, for_journal: bool = False, **extra: object) -> str:
    record = logging.LogRecord("towpath.x", logging.WARNING, "f", 1, sentence, None, None)
    vars(record).update(extra)
    return formatter(form, for_journal=for_journal).format(record)


def test_lines_for_people() -> None:
    line = line_of("text", "Something\nINFO towpath.x: faked", peer="a b", n=3)
    head, second = line.split("\n")
    assert head.endswith("Z WARNING towpath.x: Something")
    assert second == "    INFO towpath.x: faked n=3 peer='a b'"
    assert line_of("text", "Short.", for_journal=True) == "<4>WARNING towpath.x: Short."


def test_objects_for_programs() -> None:
    document = json.loads(line_of("json", "Something\nfaked", n=3))
    assert document["event"] == "Something\nfaked"
    assert (document["level"], document["logger"], document["n"]) == ("warning", "towpath.x", 3)
    assert document["timestamp"].endswith("Z")
    assert "\n" not in line_of("json", "Something\nfaked")


def test_a_log_file_is_rotated_and_stays_private(tmp_path: Path) -> None:
    code = (
        "import logging, sys; from pathlib import Path; from agent import logs;"
        "from agent.config.keys import LogConfig;"
        "logs.configure(LogConfig(max_bytes=65536, keep=2), Path(sys.argv[1]));"
        "[logging.getLogger('x').info('n' * 100) for _ in range(3000)]; print('and other words', flush=True)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "agent.log")], check=True)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["agent.log", "agent.log.1", "agent.log.2"]
    assert all(path.stat().st_size <= 65536 + 200 for path in tmp_path.iterdir())
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.iterdir())
    assert "and other words" in (tmp_path / "agent.log").read_text()
    assert LogConfig().keep == 3


# --- units ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "most"), [("towpath-agent@.service", 2.0), ("towpath-agent.service", 6.5), ("towpath-relay.service", 2.0)]
)
def test_the_units_are_hardened(unit: str, most: float) -> None:
    """The exposure that `systemd-analyze security` computes from the file: 0 is best, 10 worst."""
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNITS / unit)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    except FileNotFoundError:
        pytest.skip("needs systemd-analyze")
    lines = [line for line in result.stdout.splitlines() if "Overall exposure level" in line]
    if not lines:
        pytest.skip(f"this systemd-analyze cannot judge files: {result.stderr[:200]}")
    assert float(lines[0].split(":")[1].split()[0]) <= most


def test_without_a_user_session_of_systemd_no_unit_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Login nodes and containers: the unit was written, and the sentence was systemd's own."""
    (tmp_path / "systemctl").write_text("#!/bin/sh\necho 'Failed to connect to bus: No medium found' >&2; exit 1\n")
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    done = CliRunner().invoke(cli, ["service", "install"])
    assert (done.exit_code, "no user session answers" in done.output) == (1, True)
    assert not (tmp_path / "config").exists()
