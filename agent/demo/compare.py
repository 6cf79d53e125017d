"""Whether two directory trees are equal, by a tool that is not ours where there is one."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import trio

MAX_DIFFERENCES = 20


@dataclass(frozen=True)
class Comparison:
    """What was found, and by which tool. ``differences`` holds the first few only."""

    tool: str
    equal: bool
    differences: tuple[str, ...] = ()


async def compare_trees(one: Path, other: Path) -> Comparison:
    """Compare names, types, contents and link targets. Uses ``diff`` where it can leave symlinks alone, otherwise
    a walk of our own over Python's `filecmp`. May be cancelled at any time."""
    diff = shutil.which("diff")
    if diff is not None and await _knows_no_dereference(diff):
        return await _with_diff(diff, one, other)
    return await trio.to_thread.run_sync(walk_and_compare, one, other, trio.from_thread.check_cancelled)


def walk_and_compare(one: Path, other: Path, checkpoint: Callable[[], None]) -> Comparison:
    """The comparison without ``diff``. Blocks; ``checkpoint`` is called now and then and may raise."""
    found = []
    for difference in differences_between(one, other, checkpoint):
        found.append(difference)
        if len(found) == MAX_DIFFERENCES:
            break
    return Comparison("filecmp of Python's standard library", not found, tuple(found))


async def _knows_no_dereference(diff: str) -> bool:
    # GNU diff has the option, others say that they do not know it.
    command = [diff, "--no-dereference", os.devnull, os.devnull]
    return (await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)).returncode == 0


async def _with_diff(diff: str, one: Path, other: Path) -> Comparison:
    command = [diff, "--recursive", "--no-dereference", "--brief", os.fspath(one), os.fspath(other)]
    # LC_ALL keeps the words of the answer the same everywhere.
    environment = {**os.environ, "LC_ALL": "C"}
    result = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False, env=environment)
    lines = (result.stdout + result.stderr).decode("utf-8", "backslashreplace").splitlines()
    tool = "diff --recursive --no-dereference"
    if result.returncode == 0:
        return Comparison(tool, True)
    return Comparison(tool, False, tuple(lines[:MAX_DIFFERENCES]) or (f"diff ended with {result.returncode}",))


def differences_between(one: Path, other: Path, checkpoint: Callable[[], None], below: str = "") -> Iterator[str]:
    """Every difference between two trees, a sentence each, following no symlink."""
    ours = {entry.name: entry for entry in os.scandir(one / below)}
    theirs = {entry.name: entry for entry in os.scandir(other / below)}
    for name in sorted(ours.keys() | theirs.keys()):
        checkpoint()
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
            yield from differences_between(one, other, checkpoint, path)
        elif not filecmp.cmp(left.path, right.path, shallow=False):
            yield f"The files {path} differ"


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return "symlink"
    return "directory" if entry.is_dir(follow_symlinks=False) else "file"
