"""One world for all tests of real clients, which run one after the other."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.clients.lab import Lab, open_lab


@pytest.fixture(scope="session")
def calls() -> list[tuple[str, ...]]:
    """The words of every globus command that did in this run what its test expected."""
    return []


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, calls: list[tuple[str, ...]]) -> Iterator[Lab]:
    if not os.environ.get("GLOBUS_CLI"):
        pytest.skip("GLOBUS_CLI does not name the globus command; `make test` installs it and sets this")
    with open_lab(tmp_path_factory.mktemp("world"), calls) as opened:
        yield opened
