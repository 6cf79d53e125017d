"""What tests of the agent share: workers that cost little to start (`workers_forked`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agent.transfer.processes import worker_process
from agent.transfer.processes.spawn import FORK_SERVER
from tests.agent.forked_workers import ForkServers


@pytest.fixture(scope="session")
def fork_servers() -> Iterator[ForkServers]:
    servers = ForkServers()
    yield servers
    servers.close()


@pytest.fixture
def workers_forked(monkeypatch: pytest.MonkeyPatch, fork_servers: ForkServers) -> None:
    """Workers of this test are forked from what is loaded, as an agent's are (see `tests.agent.forked_workers`)."""
    if FORK_SERVER:
        monkeypatch.setattr(worker_process, "spawn", fork_servers.spawn)
