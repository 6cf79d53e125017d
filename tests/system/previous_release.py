"""The release before this one, built from the history of this repository and installed beside it."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Where no release is tagged yet: the state that the first users have.
FIRST = "ddf8cb5f0306d43fcb47d13a67fe5bc929d88a59"


def previous_commit() -> str:
    """The newest release tag before this commit, else the first state that was given out. Skips without a history."""
    if shutil.which("git") is None:
        pytest.skip("the previous release is built from the repository's history, and git is not installed")
    tag = _git("describe", "--tags", "--abbrev=0", "--match", "v*", "HEAD~1").stdout.decode().strip()
    commit = tag or FIRST
    if _git("cat-file", "-e", f"{commit}^{{commit}}").returncode:
        pytest.skip(
            f"the history of this checkout does not reach back to {commit}, of which the previous release is made"
        )
    return commit


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True)


def install(directory: Path) -> dict[str, Path]:
    """Build the previous release's wheel and install it below a directory; its programs by name. Skips where that
    needs something that cannot be had."""
    commit = previous_commit()
    source, packages, programs = directory / "source", directory / "packages", directory / "bin"
    with tarfile.open(fileobj=io.BytesIO(_git("archive", "--format=tar", commit).stdout)) as archive:
        archive.extractall(source, filter="data")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", directory, source], capture_output=True)
    if built.returncode:
        pytest.skip(f"the wheel of {commit} cannot be built here: {built.stderr.decode()[-500:]}")
    (wheel,) = directory.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", packages, wheel], check=True, capture_output=True)
    programs.mkdir()
    found = {}
    for name, module in (("towpath", "agent.cli.main"), ("towpath-relay", "relay.cli")):
        found[name] = programs / name
        # PYTHONSAFEPATH: the folder the tests run in, with this release in it, stays out of the search path.
        found[name].write_text(
            f'#!/bin/sh\nexec env PYTHONSAFEPATH=1 PYTHONPATH="{packages}" "{sys.executable}" -c '
            f"'from {module} import main; main()' \"$@\"\n"
        )
        found[name].chmod(0o755)
    where = subprocess.run(
        [
            "env",
            "PYTHONSAFEPATH=1",
            f"PYTHONPATH={packages}",
            sys.executable,
            "-c",
            "import agent; print(agent.__file__)",
        ],
        capture_output=True,
        check=True,
    )
    assert str(packages) in where.stdout.decode(), "the previous release is hidden by this one"
    return found
