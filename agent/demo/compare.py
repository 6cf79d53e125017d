"""Whether two directory trees are equal, by a tool that is not ours where there is one. Blocks."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_DIFFERENCES = 20


@dataclass(frozen=True)
class Comparison:
    """What was found, and by which tool. ``differences`` holds the first few only."""

    tool: str
    equal: bool
    differences: tuple[str, ...] = ()


def compare_trees(one: Path, other: Path) -> Comparison:
    """Compare names, types, contents and link targets. Uses ``diff`` where it can leave symlinks alone, otherwise
    a walk of our own over Python's `filecmp`."""
    diff = shutil.which("diff")
    if diff is not None and _knows_no_dereference(diff):
        return _with_diff(diff, one, other)
    differences = tuple(line for line, _ in zip(differences_between(one, other), range(MAX_DIFFERENCES), strict=False))
    return Comparison("filecmp of Python's standard library", not differences, differences)


def _knows_no_dereference(diff: str) -> bool:
    # GNU diff has the option, others say that they do not know it.
    return (
        subprocess.run([diff, "--no-dereference", os.devnull, os.devnull], capture_output=True, check=False).returncode
        == 0
    )


def _with_diff(diff: str, one: Path, other: Path) -> Comparison:
    command = [diff, "--recursive", "--no-dereference", "--brief", os.fspath(one), os.fspath(other)]
    # LC_ALL keeps the words of the answer the same everywhere.
    result = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "LC_ALL": "C"})
    lines = (result.stdout + result.stderr).decode("utf-8", "backslashreplace").splitlines()
    tool = "diff --recursive --no-dereference"
    if result.returncode == 0:
        return Comparison(tool, True)
    return Comparison(tool, False, tuple(lines[:MAX_DIFFERENCES]) or (f"diff ended with {result.returncode}",))


def differences_between(one: Path, other: Path, below: str = "") -> Iterator[str]:
    """Every difference between two trees, a sentence each, following no symlink."""
    ours = {entry.name: entry for entry in os.scandir(one / below)}
    theirs = {entry.name: entry for entry in os.scandir(other / below)}
    for name in sorted(ours.keys() | theirs.keys()):
        path = os.path.join(below, name)
        if name not in theirs or name not in ours:
            yield f"Only in {one if name in ours else other}: {path}"
            continue
        left, right = ours[name], theirs[name]
        if _kind(left) != _kind(right):
            yield f"{path} is a {_kind(left)} on one side and a {_kind(right)} on the other"
        elif left.is_symlink():
            if os.readlink(left.path) != os.readlink(right.path):
                yield f"The symlinks {path} lead to different places"
        elif left.is_dir():
            yield from differences_between(one, other, path)
        elif not filecmp.cmp(left.path, right.path, shallow=False):
            yield f"The files {path} differ"


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return "symlink"
    return "directory" if entry.is_dir(follow_symlinks=False) else "file"
