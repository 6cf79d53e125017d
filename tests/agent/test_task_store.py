"""The daemon's list of tasks, cut, filled with zeros, flipped, of a newer version, held or not writable: begun anew and
said so, or refused in words; never taken for an empty one in silence."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from random import Random

import msgspec
import pytest

from agent.transfer.books.state_trouble import StateTrouble
from agent.transfer.tasks.task_store import VERSION, TaskStore, open_or_begin
from protocol.control import AgentEvent, Party, SessionOrder, TaskItem, TaskObserved, TaskOptions, TaskOrder

SEED = 5


def filled(folder: Path) -> Path:
    """A list of three tasks with events, and their folders beside it."""
    path = folder / "tasks.sqlite"
    store = TaskStore(path)
    party = Party(endpoint_id="e", node_id="n", collection_id="c", certificate="")
    for number in range(3):
        name = f"task-{number}"
        (folder / name).mkdir()
        order = TaskOrder(
            task_id=name,
            revision=1,
            desired="run",
            type="TRANSFER",
            ticket="ticket",
            session_id="s",
            destination=party,
            source=party,
            options=TaskOptions(),
            items=[TaskItem(source_path=f"/{index}", destination_path=f"/{index}") for index in range(200)],
        )
        store.put_order(order, TaskObserved(task_id=name, revision=1, state="ACTIVE"), None)
        for _ in range(20):
            store.add_event(AgentEvent(n=0, kind="event", time="2020-01-01T00:00:00Z", task_id=name, code="STARTED"))
    store.close()
    return path


def test_the_list_is_its_owners_alone_also_one_of_a_version_before(tmp_path: Path) -> None:
    path = filled(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    store = TaskStore(path)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.glob("tasks.sqlite*")}
    store.close()
    assert set(modes.values()) == {0o600}
    assert len(modes) == 3, "SQLite's log and its index, too"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [cut, cut_to_nothing, zeros, gone])
def test_a_damaged_list_is_begun_anew_and_said_so(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = filled(tmp_path)
    damage(path)
    store, anew = open_or_begin(path)
    assert anew
    assert store.load() == []
    store.close()
    store, anew = open_or_begin(path)
    store.close()


def test_a_new_agent_begins_without_a_word(tmp_path: Path) -> None:
    store, anew = open_or_begin(tmp_path / "tasks.sqlite")
    assert not anew
    store.close()


def test_flipped_bytes_are_found_or_change_nothing_that_counts(tmp_path: Path) -> None:
    """Whatever byte changes, the list is opened or begun anew; the daemon never dies of it."""
    random, counts = Random(SEED), {"begun anew": 0, "opened": 0}
    path = filled(tmp_path)
    content = path.read_bytes()
    for _ in range(40):
        changed = bytearray(content)
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
        path.write_bytes(changed)
        store, anew = open_or_begin(path)
        assert len(store.load()) == (0 if anew else 3)
        store.events_after(0)
        store.close()
        counts["begun anew" if anew else "opened"] += 1
        for rest in tmp_path.glob("tasks.sqlite*"):
            rest.unlink()
    print(f"seed {SEED}, bits flipped in the list of tasks: {counts}")
    assert counts["begun anew"]


def test_a_list_of_a_newer_agent_is_left_alone(tmp_path: Path) -> None:
    path = filled(tmp_path)
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    connection.close()
    with pytest.raises(StateTrouble, match="newer version"):
        open_or_begin(path)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM tasks").fetchone() == (3,)
    connection.close()


def test_a_list_of_the_first_version_is_gone_on_with(tmp_path: Path) -> None:
    path = filled(tmp_path)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 0")
    connection.close()
    store, anew = open_or_begin(path)
    assert (len(store.load()), anew) == (3, False)
    store.close()


def steps(store: TaskStore, work: Callable[[], object]) -> int:
    """How many steps of SQLite's machine something takes; what looks at one row more takes four or more."""
    counted = 0

    def step() -> int:
        nonlocal counted
        counted += 1
        return 0

    store._connection.set_progress_handler(step, 1)
    work()
    store._connection.set_progress_handler(None, 1)
    return counted


def test_what_is_kept_of_other_tasks_and_sessions_is_not_looked_at(tmp_path: Path) -> None:
    """Also in the list of an agent of before, which had no index for that."""
    path = filled(tmp_path)
    line = AgentEvent(n=0, kind="event", time="2020-01-01T00:00:00Z", task_id="another", code="STARTED")
    party = Party(endpoint_id="e", node_id="n", collection_id="c", certificate="")
    order = SessionOrder(session_id="s", task_id="another", ticket="t", peer=party)
    sessions = [(f"s{number}", msgspec.msgpack.encode(order), 1e6) for number in range(1000)]
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "DROP INDEX events_of_task; DROP INDEX sessions_by_expiry; "
            "CREATE UNIQUE INDEX events_of_worker ON events (task, worker_seq) WHERE worker_seq IS NOT NULL"
        )
        lines = [(msgspec.msgpack.encode(line),)] * 1000
        connection.executemany("INSERT INTO events (task, body) VALUES ('another', ?)", lines)
        connection.executemany("INSERT INTO sessions VALUES (?, ?, ?)", sessions)
    connection.close()
    store = TaskStore(path)
    try:
        # Twenty lines of its own, each with its entry in the index.
        assert steps(store, lambda: store.remove("task-1")) < 1000
        assert len(store.events_after(0, 5000)) == 1040
        assert steps(store, lambda: store.put_session(order, expires=1e6, now=1e6)) < 200
        assert steps(store, lambda: store.serves_sessions(1e6)) < 200
        assert steps(store, lambda: store.last_worker_event("another")) < 200
        store.put_session(order, expires=1e6, now=2e6)
        assert store.session("s7") is None
    finally:
        store.close()


def test_a_list_that_is_no_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "tasks.sqlite").mkdir()
    (tmp_path / "tasks.sqlite" / "something").touch()
    with pytest.raises(StateTrouble, match="cannot be opened"):
        open_or_begin(tmp_path / "tasks.sqlite")


def test_the_last_number_is_known_without_waiting_for_whoever_writes(tmp_path: Path) -> None:
    """It is asked for whenever the agent links, where a slow disk must hold up nobody."""
    store = TaskStore(filled(tmp_path))
    try:
        assert store.last_event() == 60
        store.remove("task-2")
        event = AgentEvent(n=0, kind="event", time="2020-01-01T00:00:00Z", task_id="task-0", code="STARTED")
        assert store.add_event(event, worker_seq=7) and not store.add_event(event, worker_seq=7)
        with store._lock:
            assert store.last_event() == 61
        assert [line.n for line in store.events_after(60)] == [61]
    finally:
        store.close()
