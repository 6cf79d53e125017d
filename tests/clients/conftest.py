"""One world for all tests of real clients that a process runs, one after the other."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.clients.calls import Calls
from tests.clients.lab import Lab, open_lab


@pytest.fixture(scope="session")
def calls() -> Calls:
    """What this run calls of the globus command."""
    return Calls()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, calls: Calls) -> Iterator[Lab]:
    if not os.environ.get("GLOBUS_CLI"):
        pytest.skip("GLOBUS_CLI does not name the globus command; `make test` installs it and sets this")
    with open_lab(tmp_path_factory.mktemp("world"), calls) as opened:
        yield opened
