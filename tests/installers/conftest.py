"""Fixtures of the tests that install real bundles."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from installers import build_bundle
from installers.repository import Keys, Repository
from tests.installers.release_world import PASSWORD, Account, Relay, World


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    (tmp_path / "relay").mkdir()
    made = Relay(tmp_path / "relay")
    yield made
    made.process.terminate()
    made.process.wait(30)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="towpath-account-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's bundle; one that was built before (TOWPATH_TEST_BUNDLE) saves the minutes of building one."""
    ready = os.environ.get("TOWPATH_TEST_BUNDLE")
    folder = tmp_path_factory.mktemp("bundle")
    return Path(ready) if ready else build_bundle.build(folder, build_bundle.project_version(), None)


@pytest.fixture
def world(relay: Relay, tmp_path: Path, public: Path, built: Path) -> Iterator[World]:
    keys = Keys.generate()
    repository = Repository.open(relay.releases, keys)
    repository.publish()
    relay.command("user", "add", "ada", "--password-file", "-", text=PASSWORD)
    ca_file = public / "ca.pem"
    shutil.copy(relay.ca_file, ca_file)
    ca_file.chmod(0o644)
    account = Account(public / "home")
    made = World(relay, keys, repository, built, tmp_path, account, ca_file, {})
    made.figures["bundle MiB"] = made.release("0.1.0").stat().st_size / 2**20
    yield made
    print({name: round(value, 2) for name, value in made.figures.items()})
