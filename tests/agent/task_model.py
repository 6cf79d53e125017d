"""What a recursive transfer of one folder must leave at its destination, said once more and plainly: a walk over two
trees that rest, which knows nothing of the engine. Tests hold the engine against it."""

from __future__ import annotations

import fnmatch
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from protocol.control import TaskOptions


@dataclass
class Expected:
    """What a walk has found. Paths are relative to the folder that is transferred."""

    # Everything that is to be there in the end: content, target of a link, or "folder".
    there: dict[str, bytes | str] = field(default_factory=dict)
    # Of these the content comes from the source, with its time where times are kept.
    times: dict[str, int] = field(default_factory=dict)
    # What cannot be done, or is left out, with the code that says why.
    failed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    deleted: int = 0


def expected(source: Path, destination: Path, options: TaskOptions) -> Expected:
    """Neither tree is changed."""
    found = Expected()
    _folder(source, destination, "", options, found)
    return found


def is_included(options: TaskOptions, name: str, *, folder: bool) -> bool:
    for rule in options.filter_rules:
        if rule.type in (None, "dir" if folder else "file") and fnmatch.fnmatchcase(name, rule.name):
            return rule.method == "include"
    return True


def _folder(source: Path, destination: Path, below: str, options: TaskOptions, found: Expected) -> None:
    names = sorted(os.listdir(source))
    if below:
        found.there[below] = "folder"
        found.times[below] = source.stat().st_mtime_ns
    for name in names:
        _entry(source / name, destination / name, f"{below}/{name}" if below else name, options, found)
    if not destination.is_dir():
        return
    for name in sorted(set(os.listdir(destination)) - set(names)):
        path, there = destination / name, f"{below}/{name}" if below else name
        if options.delete_destination_extra:
            _delete(path, there, options, found)
        else:
            _keep(path, there, found)


def _entry(source: Path, existing: Path, path: str, options: TaskOptions, found: Expected) -> None:
    link = source.is_symlink()
    followed = link and options.recursive_symlinks == "copy" and source.exists()
    kind = _kind(source.stat() if followed else source.lstat())
    if not is_included(options, source.name, folder=kind == "folder"):
        _keep(existing, path, found)
        return
    there = None if not os.path.lexists(existing) else _kind(existing.lstat())
    if kind == "folder":
        if there in (None, "folder"):
            _folder(source, existing, path, options, found)
        else:
            found.failed[path] = "NOT_A_DIRECTORY"
            _keep(existing, path, found)
    elif kind == "link":
        if options.recursive_symlinks != "keep":
            _keep(existing, path, found)
        elif there == "folder":
            found.failed[path] = "IS_A_DIRECTORY"
            _keep(existing, path, found)
        elif there is not None and options.sync_level == 0:
            _keep(existing, path, found)
        else:
            found.there[path] = f"link to {source.readlink()}"
    elif kind == "file":
        if there == "folder":
            found.failed[path] = "IS_A_DIRECTORY"
            _keep(existing, path, found)
        elif there is not None and _stays(source, existing, there, options):
            _keep(existing, path, found)
        else:
            found.there[path] = source.read_bytes()
            found.times[path] = source.stat().st_mtime_ns
    else:
        found.left_out[path] = "UNSUPPORTED_TYPE"
        _keep(existing, path, found)


def _stays(source: Path, existing: Path, there: str, options: TaskOptions) -> bool:
    level = options.sync_level
    if level == 0:
        return True
    if level is None or there != "file":
        return False
    new, old = source.stat(), existing.stat()
    if new.st_size != old.st_size:
        return False
    if level == 1:
        return True
    if level == 2:
        return new.st_mtime_ns // 10**9 <= old.st_mtime_ns // 10**9
    return source.read_bytes() == existing.read_bytes()


def _delete(path: Path, there: str, options: TaskOptions, found: Expected) -> bool:
    """Note what of an extra goes; whether all of it does. What a filter leaves out stays, and what it lies in."""
    folder = not path.is_symlink() and path.is_dir()
    if not is_included(options, path.name, folder=folder):
        _keep(path, there, found)
        return False
    goes = True
    if folder:
        for name in sorted(os.listdir(path)):
            goes = _delete(path / name, f"{there}/{name}", options, found) and goes
    if goes:
        found.deleted += 1
    else:
        found.there[there] = "folder"
    return goes


def _keep(path: Path, there: str, found: Expected) -> None:
    if not os.path.lexists(path):
        return
    kind = _kind(path.lstat())
    if kind == "link":
        found.there[there] = f"link to {path.readlink()}"
    elif kind == "folder":
        found.there[there] = "folder"
        for name in sorted(os.listdir(path)):
            _keep(path / name, f"{there}/{name}", found)
    else:
        found.there[there] = path.read_bytes() if kind == "file" else kind


def _kind(status: os.stat_result) -> str:
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISLNK(mode):
        return "link"
    return "file" if stat.S_ISREG(mode) else "special"


def seen(root: Path) -> dict[str, bytes | str]:
    """A tree as `Expected.there` has it."""
    found = Expected()
    for name in sorted(os.listdir(root)):
        _keep(root / name, name, found)
    return found.there
