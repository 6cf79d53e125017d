"""Installed versions side by side, one of them current: unpack, check, switch at once, go back.

    PREFIX/versions/0.2.0/   a bundle with its own Python, never changed once its name is there
    PREFIX/current           a symlink to one of them; switching it is one rename
    PREFIX/update/           what updates need: metadata, downloads, `state.json`

Whatever is interrupted, ``current`` leads to a whole version.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from agent.system.file_lock import wait_for_lock
from agent.system.files import sync_directory
from agent.update.offer import UpdateRefused, version_key
from agent.update.unpack import unpack_untrusted
from protocol.errors import TowpathError
from protocol.private_file import write_private_file

BUNDLE_FILE = "bundle.json"
ROOT_FILE = "trust/root.json"
STATE_FILE = "state.json"
# How often the launcher has started a version that has not proved itself; see `installers/build_bundle.py`.
STARTS_FILE = "starts"
COMMAND = "bin/towpath"
SELF_TEST_TIMEOUT = 60.0


class NotInstalled(TowpathError):
    """This program was not installed from a bundle; whoever installed it (pip, a package manager) updates it."""

    default_code = "NOT_A_BUNDLE"


class BundleInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle says of itself."""

    version: str
    platform: str


class State(msgspec.Struct, kw_only=True):
    """What happened to updates here. ``pending`` is a version that has been switched to and has not proved itself."""

    pending: str = ""
    previous: str = ""
    failed: list[str] = []
    last_check: float = 0.0
    last_problem: str = ""
    available: str = ""


class Installation:
    """The versions below one prefix."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.versions = prefix / "versions"
        self.current = prefix / "current"
        self.directory = prefix / "update"

    @classmethod
    def here(cls) -> Installation:
        """The installation this process runs from. Raises `NotInstalled`."""
        own = Path(sys.prefix).resolve()
        if own.parent.name != "versions" or not (own / BUNDLE_FILE).is_file():
            raise NotInstalled(
                "This towpath was not installed by install.sh; update it the way it was installed.", who="you"
            )
        return cls(own.parent.parent)

    def running(self) -> str:
        """The version that ``current`` leads to. Raises OSError."""
        return os.path.basename(os.readlink(self.current))

    def command(self, version: str) -> Path:
        """The program of a version."""
        return self.versions / version / COMMAND

    def pinned_root(self) -> bytes:
        """The root of trust that came with the current version. Raises OSError."""
        return (self.current / ROOT_FILE).read_bytes()

    # --- what happened -----------------------------------------------------------------------------------

    def state(self) -> State:
        """What is remembered; nothing, if it cannot be read."""
        try:
            return msgspec.json.decode((self.directory / STATE_FILE).read_bytes(), type=State)
        except (OSError, msgspec.DecodeError):
            return State()

    @contextlib.contextmanager
    def amending(self) -> Iterator[State]:
        """What is remembered, to be changed and written at the end; one process at a time. Raises OSError."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.directory / "state.lock").open("a") as lock:
            # Without locks on this file system: what collides is at worst a line for people.
            with contextlib.suppress(OSError):
                wait_for_lock(lock.fileno())
            state = self.state()
            yield state
            self.remember(state)

    def remember(self, state: State) -> None:
        """Write it down, durable. Raises OSError."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private_file(self.directory / STATE_FILE, msgspec.json.encode(state) + b"\n")

    def settle(self, *, proved: bool) -> None:
        """After an update that nobody watched to its end: the version that runs now is the right one (``proved``: it
        has run for a while), or is the one before, taken again by the launcher. Raises OSError."""
        if not self.state().pending:
            return
        running = self.running()
        with self.amending() as state:
            if state.pending and state.pending != running:
                state.failed.append(state.pending)
                state.last_problem = f"Version {state.pending} did not start and is not tried again."
            elif not proved:
                return
            state.pending = ""
        (self.directory / STARTS_FILE).unlink(missing_ok=True)

    # --- versions ----------------------------------------------------------------------------------------

    def unpack(self, bundle: Path, version: str, platform: str) -> Path:
        """Unpack a verified bundle beside the others; its folder gets its name only when it is whole, durable and
        works. Raises `UpdateRefused` or OSError."""
        target = self.versions / version
        if target.exists():
            self._check(target, version, platform)
            return target
        self.versions.mkdir(parents=True, exist_ok=True)
        temporary = self.versions / f".unpacking-{version}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            unpack_untrusted(bundle, temporary)
            self._check(temporary, version, platform)
            _sync_tree(temporary)
            os.rename(temporary, target)
            sync_directory(self.versions)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return target

    def _check(self, folder: Path, version: str, platform: str) -> None:
        try:
            info = msgspec.json.decode((folder / BUNDLE_FILE).read_bytes(), type=BundleInfo)
        except (OSError, msgspec.DecodeError) as error:
            raise UpdateRefused(f"The bundle does not say what it is: {error}.") from error
        if (info.version, info.platform) != (version, platform):
            raise UpdateRefused(
                f"The bundle is {info.version} for {info.platform}, not {version} for {platform}.",
                code="WRONG_PLATFORM",
            )
        self._self_test(folder / COMMAND, version)

    @staticmethod
    def _self_test(command: Path, version: str) -> None:
        """A version that cannot even say its name is never switched to."""
        try:
            result = subprocess.run(
                [command, "--version"], capture_output=True, text=True, timeout=SELF_TEST_TIMEOUT, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UpdateRefused(f"The new version does not start here: {error}.", code="SELF_TEST_FAILED") from error
        if result.returncode != 0 or version not in result.stdout:
            said = (result.stderr or result.stdout).strip()[-300:]
            raise UpdateRefused(f"The new version does not work here: {said}", code="SELF_TEST_FAILED")

    def switch(self, version: str) -> None:
        """Make a version the current one: one rename, durable. Raises OSError."""
        if not (self.versions / version).is_dir():
            raise FileNotFoundError(2, "There is no such version", str(self.versions / version))
        fresh = self.prefix / f".current-{os.getpid()}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(Path("versions") / version)
        os.replace(fresh, self.current)
        sync_directory(self.prefix)

    def prune(self, keep: int = 2) -> list[str]:
        """Remove old versions except the current, the pending and the previous one, and a few newest."""
        state = self.state()
        wanted = {self.running(), state.pending, state.previous}
        names = sorted((path.name for path in self.versions.iterdir() if path.is_dir()), key=version_key, reverse=True)
        spare = [name for name in names if name not in wanted]
        removed = spare[max(0, keep - len(wanted)) :]
        for name in removed:
            shutil.rmtree(self.versions / name, ignore_errors=True)
        return removed


def _sync_tree(folder: Path) -> None:
    for path, _, names in os.walk(folder):
        for name in names:
            file = os.path.join(path, name)
            if not os.path.islink(file):
                sync_directory(Path(file))
        sync_directory(Path(path))


def describe(installation: Installation) -> str:
    """A document for people and programs."""
    state = installation.state()
    return json.dumps({"prefix": str(installation.prefix), **msgspec.to_builtins(state)}, indent=2)
