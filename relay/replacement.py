"""Puts a relay's files in the place of those of another: all of them or, after a failure or a kill, none.

What is to be moved is written down (`PLAN`, beside the configuration) before the first move. A failure is undone at
once; what was killed is undone by whoever comes next. Looking at both places tells whether a move was made, and nothing
that was there before is ever removed. The database goes first and comes last: without it nothing serves what is only
half there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import msgspec

from protocol.errors import NeedsPerson
from protocol.folder_sync import sync_names
from protocol.private_file import write_private_file
from relay.lock import AlreadyRunning, exclusive, holder_of

PLAN = "relay.restoring"


class Unfinished(NeedsPerson):
    """A relay was to be put in the place of another, and neither is whole there."""

    default_code = "RESTORE_UNFINISHED"


class Move(msgspec.Struct, frozen=True):
    """From where to where, absolute. ``inode`` tells what goes there from what was there; the number of the disk, which
    both have in common, may be another after a restart of the machine."""

    path: Path
    target: Path
    inode: int

    @property
    def is_made(self) -> bool:
        """Whether what was to be moved by a rename is at its target."""
        try:
            return self.target.lstat().st_ino == self.inode
        except OSError:
            return False


class Plan(msgspec.Struct, frozen=True):
    """What to move aside, the database first, and what to put in place then by renames, the database last.

    ``place`` is the relay's directory; ``aside`` and ``scratch`` are folders that are there for nothing else.
    """

    place: Path
    aside: Path
    scratch: Path
    old: list[Move]
    new: list[Move]

    @property
    def database(self) -> Path:
        return self.new[-1].target

    @property
    def done(self) -> bool:
        return self.new[-1].is_made

    @property
    def half_done(self) -> bool:
        return not self.done and (any(map(_is_away, self.old)) or any(one.is_made for one in self.new))


def moves(pairs: Iterable[tuple[Path, Path]]) -> list[Move]:
    """What is at these places now, and where it is to go. Raises OSError."""
    return [Move(path, target, path.lstat().st_ino) for path, target in pairs]


def replace(home: Path, plan: Plan) -> None:
    """Carry a plan out; ``home`` is the configuration's folder. The caller holds the relay's lock.

    Raises OSError, when all is as it was before (or, for a fault of the last step, done), and `Unfinished`.
    """
    # Of one that ended after we had looked for it, while we waited for the lock.
    _check(home, _plan_of(home))
    write_private_file(home / PLAN, msgspec.json.encode(plan, enc_hook=str))
    give_to_owner_of(plan.place, [home / PLAN])
    try:
        if plan.old:
            plan.aside.mkdir(mode=0o700)
        for one in plan.old:
            move(one.path, one.target)
        _sync_all(plan.old)
        for one in plan.new[:-1]:
            one.path.rename(one.target)
        _sync_all(plan.new)
        sync_names(plan.place)
        plan.new[-1].path.rename(plan.database)
        sync_names(plan.database.parent)
    except BaseException as error:
        try:
            if not plan.done:
                _put_back(plan)
        except OSError as again:
            if plan.half_done:
                sentence = f"Restoring failed ({error}), and so did putting back what was there ({again})."
                raise Unfinished(f"{sentence} {_advice(home, plan)}", who="relay operator") from error
        _forget(home)
        raise
    _forget(home)


def check_finished(home: Path) -> None:
    """Raises `Unfinished` where neither the relay of before nor the restored one is whole, `AlreadyRunning` while
    somebody sees to that."""
    plan = _plan_of(home)
    if plan is not None and plan.half_done and (holder := holder_of(plan.place)) is not None:
        who = holder or "unknown"
        raise AlreadyRunning(f"A backup is being restored in {plan.place} (process {who}); wait for it.", who="you")
    _check(home, plan)


def _check(home: Path, plan: Plan | None) -> None:
    if plan is not None and plan.half_done:
        raise Unfinished(f"A restore was interrupted. {_advice(home, plan)}", who="relay operator")


def forget_finished(home: Path) -> None:
    """The same, and what came to an end is not held against what becomes of these files later on."""
    check_finished(home)
    plan = _plan_of(home)
    if plan is None:
        return
    # Not everybody may remove that, and nobody while it is being carried out: it may not have moved anything yet.
    with contextlib.suppress(OSError, AlreadyRunning), exclusive(plan.place, plan.database):
        if not plan.half_done:
            _forget(home)


def put_back(home: Path) -> None:
    """Have all as it was before what was interrupted. Raises `AlreadyRunning`, `Unfinished`, OSError."""
    plan = _plan_of(home)
    if plan is None:
        return
    with exclusive(plan.place, plan.database):
        if plan.half_done:
            try:
                _put_back(plan)
            except OSError as error:
                sentence = f"A restore was interrupted, and putting back what was there fails ({error})."
                raise Unfinished(f"{sentence} {_advice(home, plan)}", who="relay operator") from error
        clear(plan.scratch, *(one.path for one in plan.new))
        for one in plan.old:
            clear_left_beside(one.path)
            clear_left_beside(one.target)
        _remove_empty(plan.aside)
        _forget(home)


def _plan_of(home: Path) -> Plan | None:
    try:
        text = (home / PLAN).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return msgspec.json.decode(text, type=Plan, dec_hook=lambda kind, value: kind(value))
    except msgspec.MsgspecError as error:
        raise Unfinished(
            f"{home / PLAN} of an interrupted restore cannot be read ({error}). Put back by hand what is in the newest "
            "folder replaced-*, if there is one, and remove that file.",
            who="relay operator",
        ) from error


def _advice(home: Path, plan: Plan) -> str:
    where = f" What was there before is partly in {plan.aside}; nothing of it is lost." if plan.old else ""
    return (
        f"Neither the relay of before nor the restored one is whole in {plan.place}.{where} Run `towpath-relay "
        f"restore` again: it first puts back what was there. Or do that by hand, and remove {home / PLAN}."
    )


def _put_back(plan: Plan) -> None:
    """Raises OSError, and may be begun again then."""
    for one in reversed(plan.new):
        if one.is_made:
            one.path.parent.mkdir(mode=0o700, exist_ok=True)
            one.target.rename(one.path)
    for one in reversed(plan.old):
        if _is_away(one):
            move(one.target, one.path)
    _sync_all([*plan.new, *plan.old])
    _remove_empty(plan.aside)


def _is_away(old: Move) -> bool:
    """Where both are there, one is a copy on another disk that was not done with, or somebody has put it back."""
    return os.path.lexists(old.target) and not os.path.lexists(old.path)


def _remove_empty(folder: Path) -> None:
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def _forget(home: Path) -> None:
    if (home / PLAN).exists():
        (home / PLAN).unlink()
        sync_names(home)


def _sync_all(moved: Sequence[Move]) -> None:
    for folder in sorted({one.path.parent for one in moved} | {one.target.parent for one in moved}):
        if folder.exists():
            sync_names(folder)


def move(path: Path, target: Path) -> None:
    """Rename a file or folder, or copy it where it goes to another file system: it is whole at its target then before
    it leaves its place, both at once. Raises OSError."""
    try:
        path.rename(target)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    _move_to_other_disk(path, target)


def _move_to_other_disk(path: Path, target: Path) -> None:
    """The same, by a copy. Raises OSError."""
    copy, gone = beside(target), beside(path)
    try:
        for source in [path, *path.rglob("*")]:
            _copy_one(source, copy / source.relative_to(path))
        copy.rename(target)
        sync_names(target.parent)
    finally:
        clear(copy)
    path.rename(gone)
    clear(gone)


def _copy_one(source: Path, target: Path) -> None:
    """Readable by the owner alone, whoever that is at the source."""
    status = source.stat()
    if source.is_dir():
        target.mkdir(mode=0o700)
    else:
        with source.open("rb") as content:
            write_private(content, target)
    if os.geteuid() == 0:
        os.chown(target, status.st_uid, status.st_gid)
    sync_names(target.parent)


def write_private(content: IO[bytes], path: Path) -> None:
    """Make a file that its owner alone can read, and have its content on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        shutil.copyfileobj(content, file)
        file.flush()
        os.fsync(file.fileno())


def give_to_owner_of(place: Path, files: Iterable[Path]) -> None:
    """What root makes belongs to whom the directory does: the service runs as that user."""
    status = place.stat()
    if os.geteuid() != 0 or status.st_uid == 0:
        return
    for top in files:
        for path in [top, *top.rglob("*")] if top.exists() else []:
            os.chown(path, status.st_uid, status.st_gid, follow_symlinks=False)


def beside(path: Path) -> Path:
    """A name that nothing has, in the same folder and so on the same disk."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def clear_left_beside(path: Path) -> None:
    """Remove what bears a name of `beside`, or one made of that, and was left by a process that was killed."""
    ours = re.compile(rf"\.+{re.escape(path.name)}(\.[0-9a-f]{{8}})+")
    if path.parent.is_dir():
        clear(*(other for other in path.parent.iterdir() if ours.fullmatch(other.name)))


def clear(*paths: Path) -> None:
    """Remove files and folders that may be there."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
