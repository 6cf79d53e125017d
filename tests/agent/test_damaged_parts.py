"""Temporaries of large files that somebody changes between two runs: what the journal has as done of them is not there
any more, and must not count."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from agent.transfer.basis.jobs import count_done
from agent.transfer.books.journal import Journal
from agent.transfer.task_folder import JOURNAL
from tests.agent.died_with_parts import after_blocks
from tests.agent.engine_inside import Crashed, Engine, contents, quick_path

__all__ = ["quick_path"]

MIB = 1024 * 1024
SIZE = 40 * MIB


async def interrupted(base: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, Path]:
    """A task that died when the journal had some of its large file, and its temporary."""
    for attempt in range(10):
        engine = Engine(base / str(attempt), plan=after_blocks(monkeypatch, 2))
        piece = os.urandom(MIB - 1)
        (engine.source / "file").write_bytes(b"".join(piece + bytes([number]) for number in range(SIZE // MIB)))
        with suppress(Crashed):
            await engine.run()
            # All of it was checked at once.
            continue
        journal = Journal(engine.state / JOURNAL)
        row = journal.partial(1, b"file")
        journal.close()
        assert row is not None
        assert row.mark is not None
        assert row.mark[1] >= count_done(row.done) * MIB
        (temporary,) = engine.temporaries()
        return engine, Path(temporary)
    pytest.fail("no crash left a part behind")


def _replaced_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


CHANGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: os.truncate(path, 100),
    "cut off behind the first block": lambda path: os.truncate(path, MIB + 5),
    "empty": lambda path: os.truncate(path, 0),
    "too long": lambda path: os.truncate(path, 2 * SIZE),
    "a pipe": _replaced_by(os.mkfifo),
    "a folder": _replaced_by(Path.mkdir),
    "a link": _replaced_by(lambda path: path.symlink_to("/etc/passwd")),
    "another file": _replaced_by(lambda path: path.write_bytes(bytes(SIZE))),
    "linked": lambda path: os.link(path, path.with_name("name")),
}


ALWAYS = {"cut short", "too long", "another file", "a folder"}


@pytest.mark.parametrize("how", [pytest.param(how, marks=() if how in ALWAYS else pytest.mark.soak) for how in CHANGES])
async def test_a_part_that_was_changed_between_two_runs_does_not_count(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    engine, path = await interrupted(quick_path, monkeypatch)
    CHANGES[how](path)
    after = engine.revived()
    observed = await after.run()
    print(f"{how}: {after.codes()}")
    assert (after.destination / "file").read_bytes() == (after.source / "file").read_bytes()
    assert observed.state == "SUCCEEDED", observed
    left = set(contents(after.destination)) - {"file"}
    assert left == ({"name"} if how == "linked" else set()) or how == "a folder", left


async def test_what_lies_in_the_place_of_a_part_keeps_its_mode(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, temporary = await interrupted(quick_path, monkeypatch)
    monkeypatch.undo()
    other = engine.destination / "another"
    other.write_bytes(b"somebody's")
    other.chmod(0o400)
    temporary.unlink()
    os.link(other, temporary)
    after = engine.revived()
    assert (await after.run()).state == "SUCCEEDED"
    assert (other.stat().st_mode & 0o777, other.read_bytes()) == (0o400, b"somebody's")
