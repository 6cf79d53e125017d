"""A restore that fails or is killed at any step: one relay is whole, or what was there is put back; nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from relay import backup
from relay.backup import BackupRefused, restore
from relay.cli.main import cli
from relay.lock import AlreadyRunning, exclusive
from relay.replacement import PLAN, Unfinished, check_finished, forget_finished
from tests.relay.test_backup import archive_with

# What changes names or content of files, or has them on the disk.
STEPS = ("rename", "replace", "unlink", "mkdir", "rmdir", "fsync", "open")
OLD = {"relay.sqlite": b"old", "relay.sqlite-wal": b"log", "relay.yaml": b"", "keys/root.pem": b"1", "tls/ca.pem": b"2"}
# What may happen with one disk may with two.
LAYOUTS = [pytest.param("one disk", marks=pytest.mark.soak), "two disks", "nothing before"]


class KilledHere(BaseException):
    """The process is gone."""


class Faults:
    """Lets steps fail: the ``at``-th one, or with ``forever`` all from there on; two folders may be on two disks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, disk: Path) -> None:
        self._disk = disk
        self.seen = 0
        self._at = -1
        self._forever = False
        self._error: Callable[[], BaseException] = KilledHere
        for name in STEPS:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **options)
            self.seen += 1
            if self.seen == self._at or (self._forever and 0 <= self._at < self.seen):
                raise self._error()
            if name in ("rename", "replace"):
                here, there = (Path(one).is_relative_to(self._disk) for one in arguments[:2])
                if here != there:
                    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            # Nothing is to outlive a power failure here.
            return None if name == "fsync" else real(*arguments, **options)

        return step

    @contextlib.contextmanager
    def failing(self, at: int, error: Callable[[], BaseException], *, forever: bool) -> Iterator[None]:
        self.seen, self._at, self._error, self._forever = 0, at, error, forever
        try:
            yield
        finally:
            self._at = -1


def fault() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


class Place:
    """A folder with a relay, or an empty one, and an archive of another."""

    def __init__(self, folder: Path, layout: str, archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.disk = folder / "home", folder / "disk"
        self.database = (self.disk if layout == "two disks" else self.home) / "relay.sqlite"
        self._text = f"database: {{file: {self.database}}}\n".encode() if layout == "two disks" else b""
        self.archive = folder / "backup.tgz"
        self.home.mkdir(parents=True)
        members = {"relay.yaml": self._text, "relay.sqlite": archive, "keys/root.pem": b"3", "tls/ca.pem": b"4"}
        archive_with(self.archive, members)
        self.new = members
        self.old = {} if layout == "nothing before" else OLD
        for name, content in self.old.items():
            self._path(name).parent.mkdir(parents=True, exist_ok=True)
            self._path(name).write_bytes(content)
        self.faults = Faults(monkeypatch, self.disk)

    def _path(self, name: str) -> Path:
        return self.database.parent / name if name.startswith("relay.sqlite") else self.home / name

    def restore(self) -> Path | None:
        return restore(self.archive, self.home, force=bool(self.old))

    def steps(self) -> int:
        """How many a restore takes that nothing goes wrong with."""
        with self.faults.failing(-1, fault, forever=False):
            self.restore()
            return self.faults.seen

    def contents(self) -> dict[str, bytes]:
        names = sorted({*OLD, *self.new})
        return {name: self._path(name).read_bytes() for name in names if self._path(name).exists()}

    def is_old(self) -> bool:
        return self.contents() == self.old

    def is_new(self) -> bool:
        return self.contents() == self.new

    def check_restored(self) -> None:
        """All is there as the archive has it, what was there before is in one folder, and nothing else is left."""
        assert self.is_new()
        kept = [
            {name: (aside / name).read_bytes() for name in OLD if (aside / name).exists()}
            for aside in self.home.glob("replaced-*")
        ]
        assert not self.old or self.old in kept
        left = {path.name for folder in (self.home, self.disk) if folder.exists() for path in folder.iterdir()}
        locks = {"relay.lock", "relay.sqlite.lock"}
        assert {name for name in left if not name.startswith("replaced-")} <= {*locks, "keys", "tls", *self.new}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("database") / "relay.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE of_the_backup (id)")
    return path.read_bytes()


Make = Callable[[str], Place]


@pytest.fixture
def make(tmp_path: Path, database: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    made = 0

    def place(layout: str) -> Place:
        nonlocal made
        made += 1
        monkeypatch.undo()
        return Place(tmp_path / str(made), layout, database, monkeypatch)

    yield place
    monkeypatch.undo()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_that_fails_leaves_one_relay_whole(make: Make, layout: str) -> None:
    for step in range(1, make(layout).steps() + 1):
        place = make(layout)
        with place.faults.failing(step, fault, forever=False), contextlib.suppress(OSError):
            place.restore()
        assert place.is_old() or place.is_new(), step
        forget_finished(place.home)
        if place.is_old():
            place.restore()
        assert place.is_new()
        assert not (place.home / PLAN).exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_process_that_is_killed_at_any_step_is_followed_by_another(make: Make, layout: str) -> None:
    half = 0
    for step in range(1, make(layout).steps() + 1):
        place = make(layout)
        with place.faults.failing(step, KilledHere, forever=True), pytest.raises(KilledHere):
            place.restore()
        if place.is_old() or place.is_new():
            check_finished(place.home)
        else:
            half += 1
            with pytest.raises(Unfinished, match="Neither the relay of before"):
                check_finished(place.home)
            assert not place.database.exists()
        if place.is_new():
            # It is there, and nothing of it is taken back.
            with pytest.raises(BackupRefused):
                restore(place.archive, place.home, force=False)
            assert place.is_new()
        else:
            place.restore()
            place.check_restored()
    assert half > 3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 300), marks=pytest.mark.soak)])
def test_killed_again_and_again(make: Make, layout: str, seeds: range) -> None:
    steps = make(layout).steps()
    for seed in seeds:
        chance, place = random.Random(seed), make(layout)
        killed: list[int] = []
        while not place.is_new() and len(killed) < 6:
            killed.append(chance.randrange(1, steps + steps // 2))
            with place.faults.failing(killed[-1], KilledHere, forever=True), contextlib.suppress(KilledHere):
                place.restore()
            # Without a database nothing serves what is only half there.
            assert place.is_old() or place.is_new() or not place.database.exists(), (seed, killed)
        if not place.is_new():
            place.restore()
        assert place.is_new(), (seed, killed)
        kept = [path for path in place.home.glob("replaced-*") if (path / "keys").exists()]
        assert len(kept) == bool(place.old), (seed, killed)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_cannot_be_put_back_is_said_and_gone_on_with(make: Make, layout: str) -> None:
    told = 0
    for step in range(1, make(layout).steps() + 1):
        place = make(layout)
        with place.faults.failing(step, fault, forever=True):
            try:
                place.restore()
            except Unfinished as error:
                told += 1
                assert str(place.home) in error.sentence
                assert ("replaced-" in error.sentence) is bool(place.old)
                assert not place.is_old()
            except OSError:
                pass
        if not place.is_new():
            place.restore()
            place.check_restored()
    assert told > 3


@pytest.mark.parametrize("words", [["serve"], ["doctor"], ["user", "list"], ["init"]], ids=" ".join)
def test_half_a_relay_is_not_used_and_not_made_whole_by_another(make: Make, words: list[str]) -> None:
    """What `init` would make has other keys: no agent would know the relay again."""
    step, place = 0, make("one disk")
    while (place.home / "relay.yaml").exists() or not (place.home / PLAN).exists():
        step, place = step + 1, make("one disk")
        with place.faults.failing(step, KilledHere, forever=True), pytest.raises(KilledHere):
            place.restore()

    def names() -> dict[Path, tuple[int, int]]:
        found = {path: path.lstat() for path in place.home.rglob("*")}
        return {path: (status.st_ino, status.st_mtime_ns) for path, status in found.items()}

    before = names()
    more = ["--directory", str(place.home)] if words == ["init"] else []
    run = CliRunner()
    done = run.invoke(cli, ["--config", str(place.home / "relay.yaml"), *words, *more])
    said = done.exception.sentence if isinstance(done.exception, Unfinished) else done.output
    assert "Neither the relay of before nor the restored one is whole" in said
    assert done.exit_code == 1
    assert names() == before
    done = run.invoke(cli, ["--config", str(place.home / "relay.yaml"), "restore", str(place.archive), "--force"])
    assert done.exit_code == 0, done.output
    assert place.old in [{name: (aside / name).read_bytes() for name in OLD} for aside in place.home.glob("replaced-*")]


def test_a_plan_that_came_to_its_end_is_not_held_against_the_relay_later(make: Make) -> None:
    step = make("one disk").steps() + 1
    place = make("one disk")
    while not (place.is_new() and (place.home / PLAN).exists()):
        step, place = step - 1, make("one disk")
        with place.faults.failing(step, KilledHere, forever=True), pytest.raises(KilledHere):
            place.restore()
    forget_finished(place.home)
    # By hand, another copy: a file of its own.
    other = place.database.with_name("other")
    other.write_bytes(b"another")
    other.replace(place.database)
    check_finished(place.home)


def killed(make: Make, *, half: bool) -> Place:
    """A restore that was killed with its plan written down: half way, or before it moved anything."""
    step = 0
    while True:
        step, place = step + 1, make("one disk")
        with place.faults.failing(step, KilledHere, forever=True), pytest.raises(KilledHere):
            place.restore()
        if (place.home / PLAN).exists() and place.is_old() is not half:
            return place


def test_the_number_of_a_disk_may_be_another_after_a_restart_of_the_machine(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of Btrfs, NFS or the device mapper is given at each mount."""
    real, moved = Path.lstat, 0

    def lstat(path: Path) -> os.stat_result:
        found = real(path)
        return os.stat_result((found.st_mode, found.st_ino, found.st_dev + moved, *found[3:]))

    steps = make("one disk").steps()
    for step in range(steps // 2, steps + 1):
        place = make("one disk")
        monkeypatch.setattr(Path, "lstat", lstat)
        moved = 0
        with place.faults.failing(step, KilledHere, forever=True), pytest.raises(KilledHere):
            place.restore()
        moved = 1
        if not place.is_new():
            place.restore()
        else:
            check_finished(place.home)
        assert place.is_new(), step
        kept = {name for aside in place.home.glob("replaced-*") for name in OLD if (aside / name).exists()}
        assert kept == set(OLD), step


def test_a_restore_that_goes_on_is_left_alone_by_other_commands(make: Make) -> None:
    """Its plan is what undoes it when it is killed, also while it copies the first file to another disk."""
    place = killed(make, half=False)
    with exclusive(place.home):
        forget_finished(place.home)
        assert (place.home / PLAN).exists()
    forget_finished(place.home)
    assert not (place.home / PLAN).exists()
    place = killed(make, half=True)
    with exclusive(place.home), pytest.raises(AlreadyRunning, match="is being restored"):
        forget_finished(place.home)
    assert (place.home / PLAN).exists()


def test_one_that_was_killed_while_another_waited_for_it_is_not_built_upon(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = killed(make, half=True)
    with monkeypatch.context() as patch:
        # It had looked before.
        patch.setattr(backup, "put_back", lambda _home: None)
        with pytest.raises(Unfinished):
            place.restore()
    place.restore()
    place.check_restored()
