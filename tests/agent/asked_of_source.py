"""What a destination asks its source in a test."""

from __future__ import annotations

import pytest
import trio

from agent.transfer.source.serve import Control
from protocol import session


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[session.Request]:
    """Everything the source is asked, in order."""
    requests: list[session.Request] = []
    handle = Control._handle

    async def noting(self: Control, request: session.Request, nursery: trio.Nursery) -> None:
        requests.append(request)
        await handle(self, request, nursery)

    monkeypatch.setattr(Control, "_handle", noting)
    return requests
