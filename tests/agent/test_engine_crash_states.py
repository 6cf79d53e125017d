"""The power fails: what a disk may hold after any call of the real worker and its SQLite, and what comes then.

A real worker process moves a small tree to a destination under strace. From its calls come thousands of states of the
disk (`disk_trace` says which); on each of them the task is begun again. Nothing wrong ever has a final name, neither at
once nor later, and the task comes to its end with everything in place. Each kind of sync is then left out of the trace:
that must be noticed, or the test would prove nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace

import msgspec
import pytest
import trio

from agent.storage.base import Root
from agent.storage.posix import PosixRoot, open_root
from agent.transfer.books.manifest import TransferredRow, read_page
from agent.transfer.processes import spawn
from protocol.control import TaskOrder
from tests.agent.disk_trace import CALLS, Change, CrashState, Sync, Trace, before, crash_states, put, read_trace
from tests.agent.engine_inside import CHECKED, WHOLE, Engine, contents, quick_path
from tests.agent.engine_world import world
from tests.slices import part

__all__ = ["quick_path"]

MIB = 1024 * 1024
OLD = b"an older version"
SEED = 20260
# One process does all, or another one receives and writes (`agent.transfer.lane_processes.lane_process`).
PROCESSES = [1, 2]


def _strace_works() -> str:
    """Why there can be no trace here, or nothing."""
    if shutil.which("strace") is None:
        return "needs strace (Debian: apt-get install strace)"
    tried = subprocess.run(["strace", "-f", "-qq", "-o", "/dev/null", "true"], capture_output=True, text=True)
    return f"strace may not trace here: {tried.stderr.strip()}" if tried.returncode else ""


needs_strace = pytest.mark.skipif(bool(_strace_works()), reason=_strace_works() or "strace works")


@dataclass
class Recording:
    """What a real worker did for one task."""

    trace: Trace
    source: Path
    task_id: str
    wanted: dict[str, bytes | str]


def small_tree(root: Path) -> None:
    """A little of everything."""
    (root / "folder" / "inner").mkdir(parents=True)
    (root / "folder" / "one").write_bytes(b"1")
    (root / "folder" / "inner" / "two").write_bytes(b"two" * 1000)
    (root / "empty").write_bytes(b"")
    (root / "replaced").write_bytes(b"a newer version, which is longer")
    (root / "large").write_bytes(os.urandom(2 * MIB + 17))
    (root / "link").symlink_to("large")


def many_files(root: Path) -> None:
    """So many that one syncfs serves for all."""
    small_tree(root)
    for number in range(60):
        (root / "folder" / f"file-{number}").write_bytes(os.urandom(50))


async def record(
    place: Path, monkeypatch: pytest.MonkeyPatch, fill: Callable[[Path], None], processes: int
) -> Recording:
    """One transfer by real workers under strace, with so many processes for the session."""
    (place / "traces").mkdir()
    traced = place / "traced"
    # No limit to what is shown of a call's data.
    options = f"-f -qq -y -xx -s {64 * MIB} -e signal=none -e trace={CALLS} -o {place}/traces/$$"
    traced.write_text(f'#!/bin/sh\nexec strace {options} {sys.executable} "$@"\n')
    traced.chmod(0o755)
    monkeypatch.setattr(spawn, "sys", SimpleNamespace(executable=str(traced)))
    async with world(place / "world", processes) as made:
        fill(made.alpha.root)
        (made.beta.root / "replaced").write_bytes(OLD)
        assert made.beta.service is not None
        trees = {"root": made.beta.root, "state": made.beta.state / "tasks"}
        reader = before(trees.values())
        task_id = await made.submit(WHOLE, CHECKED)
        observed = await made.wait(task_id, seconds=150)
        assert observed.state == "SUCCEEDED", observed
        while made.beta.service._tasks[task_id].running:
            # The worker closes its books, and strace its file.
            await trio.sleep(0.05)
        wanted = contents(made.alpha.root)
        assert contents(made.beta.root) == wanted
        source = made.alpha.root
    # The source's worker has one, too, in which nothing concerns the destination.
    for trace in sorted((place / "traces").iterdir()):
        read = read_trace(trace, reader, trees)
    assert read.syncs, "nothing was recorded"
    # Small files were written where they were received.
    names = {name for one in read.operations if isinstance(one, Change) for name in one.names}
    temporaries = [name.rpartition(b".towpath.")[2] for name in names if b".towpath." in name]
    assert any(b"r" in name for name in temporaries) == (processes > 1)
    # What is begun again elsewhere stands for the same disk.
    with closing(open_root(str(made.beta.root))) as root:
        token = root.token()
    monkeypatch.setattr(PosixRoot, "token", lambda _root: token)
    # And its files for the same files, as long as they are.
    monkeypatch.setattr(PosixRoot, "part_mark", Root.part_mark)
    return Recording(read, source, task_id, wanted)


class Revived(Engine):
    """The task of a recording, begun again on what a disk holds."""

    def __init__(self, recording: Recording, base: Path) -> None:
        super().__init__(base, CHECKED)
        self.source = recording.source
        self.state = base / "tasks" / recording.task_id
        self._task_id = recording.task_id

    def order(self) -> TaskOrder:
        return msgspec.structs.replace(super().order(), task_id=self._task_id)


def wrong_names(tree: dict[str, bytes | str], wanted: dict[str, bytes | str]) -> list[str]:
    """Final names with content that is neither the new one nor what was there before."""
    return [
        name
        for name, content in tree.items()
        if ".towpath." not in name and content != wanted.get(name) and (name, content) != ("replaced", OLD)
    ]


async def look(recording: Recording, state: CrashState, base: Path, seen: Counter[str]) -> str:
    """Begin again on one state. What is wrong, in words; empty if nothing is."""
    put(state.trees["root"], base / "destination")
    put({path: row for path, row in state.trees["state"].items() if not path.endswith(b"-shm")}, base / "tasks")
    try:
        wrong = wrong_names(contents(base / "destination"), recording.wanted)
        if wrong:
            return f"wrong content under {wrong}"
        engine = Revived(recording, base)
        observed = await engine.run()
        seen.update(set(engine.codes()) - {"STARTED", "SUCCEEDED"})
        if observed.state != "SUCCEEDED":
            return f"it ended as {observed.state}: {observed.status_sentence}"
        if (found := contents(engine.destination)) != recording.wanted:
            names = found.keys() | recording.wanted.keys()
            differ = sorted(name for name in names if found.get(name) != recording.wanted.get(name))
            return f"it says SUCCEEDED, but {differ} differ"
        if engine.temporaries():
            return f"temporaries stay: {engine.temporaries()}"
        rows = read_page(engine.state / "transferred.manifest", TransferredRow, None, 1000).rows
        listed = {row.destination.decode() for row in rows}
        files = {name for name, content in recording.wanted.items() if content != "folder"}
        if listed != files:
            return f"the list of what was transferred lacks {sorted(files - listed)}"
        return ""
    finally:
        shutil.rmtree(base)


async def look_at_all(
    recording: Recording, states: Iterator[CrashState], base: Path, *, stop_at_first: bool = False
) -> tuple[int, Counter[str], list[str]]:
    """How many different states, what the tasks told, and what was wrong."""
    known: set[bytes] = set()
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    for state in states:
        if (digest := state.digest()) in known:
            continue
        known.add(digest)
        problem = await look(recording, state, base / str(len(known)), seen)
        if problem:
            wrong.append(f"{state.how}: {problem}")
            if stop_at_first:
                break
    return len(known), seen, wrong


@needs_strace
@pytest.mark.timeout(170)
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.soak)])
async def test_states_after_a_power_failure(
    tmp_path: Path, quick_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    recording = await record(tmp_path, monkeypatch, small_tree, processes)
    states = crash_states(recording.trace, Random(SEED), at_random=0, every=7)
    count, seen, wrong = await look_at_all(recording, states, quick_path)
    calls = len(recording.trace.operations)
    print(f"calls: {calls}, syncs: {len(recording.trace.syncs)}, different states: {count}, events: {dict(seen)}")
    assert not wrong, "\n".join(wrong)


@needs_strace
@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("fill", [small_tree, many_files])
async def test_all_states_after_a_power_failure(
    tmp_path: Path, quick_path: Path, monkeypatch: pytest.MonkeyPatch, fill: Callable[[Path], None], processes: int
) -> None:
    recording = await record(tmp_path, monkeypatch, fill, processes)
    states = part(crash_states(recording.trace, Random(SEED), at_random=8))
    count, seen, wrong = await look_at_all(recording, states, quick_path)
    calls = len(recording.trace.operations)
    print(f"calls: {calls}, syncs: {len(recording.trace.syncs)}, different states: {count}, events: {dict(seen)}")
    assert not wrong, "\n".join(wrong)


def of_files(recording: Recording) -> list[Sync]:
    """Syncs of temporaries."""
    return [sync for sync in _of_root(recording) if sync.call == "sync of a file"]


def of_folders(recording: Recording) -> list[Sync]:
    """Syncs of the destination's folders."""
    return [sync for sync in _of_root(recording) if sync.call == "sync of a folder"]


def of_the_state(recording: Recording) -> list[Sync]:
    """Syncs of journal and manifests."""
    inside = {id(sync) for sync in _of_root(recording)}
    return [sync for sync in recording.trace.syncs if id(sync) not in inside]


def _of_root(recording: Recording) -> list[Sync]:
    return [sync for sync in recording.trace.syncs if recording.trace.is_below(sync.inode, "root")]


@needs_strace
@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("forgotten", [of_files, of_folders, of_the_state])
async def test_a_forgotten_sync_is_noticed(
    tmp_path: Path,
    quick_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forgotten: Callable[[Recording], list[Sync]],
    processes: int,
) -> None:
    recording = await record(tmp_path, monkeypatch, small_tree, processes)
    syncs = forgotten(recording)
    assert syncs
    mutant = Recording(recording.trace.without(syncs), recording.source, recording.task_id, recording.wanted)
    states = crash_states(mutant.trace, Random(SEED), at_random=8)
    count, _, wrong = await look_at_all(mutant, states, quick_path, stop_at_first=True)
    assert wrong, f"{len(syncs)} syncs were forgotten, and {count} states did not show it"
    print(f"{forgotten.__doc__} {len(syncs)} forgotten; noticed at state {count}: {wrong[0]}")
