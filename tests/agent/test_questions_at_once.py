"""A destination that asks its source more than it waits for answers to: what is worked on there is bounded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
import trio.testing

from agent.storage.posix import open_root
from agent.transfer import serve
from agent.transfer.serve import QUESTIONS_AT_ONCE, Control, SourceSide
from protocol import session
from tests.agent.engine_inside import OpenPolicy

QUESTIONS = 500


async def test_questions_wait_where_they_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = most = answered = 0
    go_on = trio.Event()
    real = serve._QUESTIONS[session.StatPaths]

    async def slowly(control: Control, request: session.StatPaths) -> None:
        nonlocal now, most, answered
        now += 1
        most = max(most, now)
        await go_on.wait()
        await real(control, request)
        now -= 1
        answered += 1

    monkeypatch.setitem(serve._QUESTIONS, session.StatPaths, slowly)
    (tmp_path / "file").write_bytes(b"")
    ours, theirs = trio.testing.memory_stream_pair()
    with open_root(os.fspath(tmp_path)) as root:
        side = SourceSide(root, OpenPolicy(), None)  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: side.serve_control(theirs, "", ahead=True))
            greeting = session.Hello("", b"i" * 16)
            await ours.send_all(session.encode(greeting))
            for number in range(QUESTIONS):
                await ours.send_all(session.encode(session.StatPaths(number, [b"file"])))
            await trio.testing.wait_all_tasks_blocked()
            assert now == QUESTIONS_AT_ONCE
            go_on.set()
            while answered < QUESTIONS:
                await trio.sleep(0)
            assert most == QUESTIONS_AT_ONCE
            await ours.aclose()
