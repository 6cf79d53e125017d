"""One agent per state directory, with real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.lock import FOREIGN_LIFE, LOCK_FILE, AlreadyRunning, acquire, holder_of, process_start

HOLD = """
import sys
from pathlib import Path
from agent.lock import acquire
lock = acquire(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


def hold_elsewhere(state_dir: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(state_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    with process:
        process.kill()


def test_a_second_agent_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    process = hold_elsewhere(tmp_path)
    try:
        with pytest.raises(AlreadyRunning) as caught:
            acquire(tmp_path)
        assert f"process {process.pid} on host {socket.gethostname()}" in caught.value.sentence
        holder = holder_of(tmp_path)
        assert holder is not None
        assert holder.pid == process.pid
    finally:
        end(process)


def test_the_lock_dies_with_a_killed_holder(tmp_path: Path) -> None:
    process = hold_elsewhere(tmp_path)
    with process:
        process.send_signal(signal.SIGKILL)
    # The record of the dead holder is still there and counts for nothing.
    assert json.loads((tmp_path / LOCK_FILE).read_bytes())["pid"] == process.pid
    assert holder_of(tmp_path) is None
    lock = acquire(tmp_path)
    assert lock.holder.pid == os.getpid()
    lock.release()


def test_a_clean_end_leaves_no_name_behind(tmp_path: Path) -> None:
    lock = acquire(tmp_path)
    assert holder_of(tmp_path) == lock.holder
    lock.release()
    lock.release()
    assert (tmp_path / LOCK_FILE).read_bytes() == b""
    assert holder_of(tmp_path) is None


def write_record(state_dir: Path, **changes: object) -> None:
    record = {"host": socket.gethostname(), "pid": os.getpid(), "began": 1.0, "renewed": 1000.0} | changes
    (state_dir / LOCK_FILE).write_text(json.dumps(record))


def test_a_fresh_record_of_another_host_counts_where_its_lock_cannot_be_seen(tmp_path: Path) -> None:
    write_record(tmp_path, host="elsewhere", pid=77)
    with pytest.raises(AlreadyRunning, match="process 77 on host elsewhere"):
        acquire(tmp_path, clock=lambda: 1000.0 + FOREIGN_LIFE - 1)
    lock = acquire(tmp_path, clock=lambda: 1000.0 + FOREIGN_LIFE + 1)
    lock.release()


def test_a_renewed_record_keeps_another_host_out(tmp_path: Path) -> None:
    lock = acquire(tmp_path, clock=lambda: 1000.0, host="elsewhere")
    lock.renew(5000.0)
    record = (tmp_path / LOCK_FILE).read_bytes()
    lock.release()
    (tmp_path / LOCK_FILE).write_bytes(record)
    with pytest.raises(AlreadyRunning):
        acquire(tmp_path, clock=lambda: 5001.0)


def no_locks(_descriptor: int, _kind: int) -> None:
    raise OSError(37, "No locks available")


def test_without_kernel_locks_the_record_of_a_live_process_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", no_locks)
    parent = os.getppid()
    write_record(tmp_path, pid=parent, began=process_start(parent), renewed=time.time())
    with pytest.raises(AlreadyRunning):
        acquire(tmp_path)
    # The same number, but another process: it was started at another time.
    write_record(tmp_path, pid=parent, began=process_start(parent) - 1000)
    acquire(tmp_path).release()


@pytest.mark.parametrize("record", [b"", b"{", b"[]", b'{"host": 1}', b"\xff" * 5000])
def test_a_damaged_record_does_not_keep_the_agent_from_starting(tmp_path: Path, record: bytes) -> None:
    (tmp_path / LOCK_FILE).write_bytes(record)
    lock = acquire(tmp_path)
    holder = holder_of(tmp_path)
    assert holder is not None
    assert holder.pid == os.getpid()
    lock.release()


def test_a_symlink_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic"):
        acquire(tmp_path)
    assert (tmp_path / "victim").read_text() == "precious"
