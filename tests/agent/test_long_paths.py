"""Files whose paths are so long that a thousand of them are more than one message holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import pytest

from agent.transfer.asking.fetch import Fetcher
from agent.transfer.basis.jobs import FileJob
from agent.transfer.planning.items import ITEMS_AT_ONCE
from protocol import session
from protocol.errors import MAX_SENTENCE, ItemFailed
from protocol.names import MAX_COMPONENT, MAX_PATH
from tests.agent.engine_inside import Engine, quick_path

__all__ = ["quick_path"]


def fill(top: Path, depth: int, folders: int, files: int) -> None:
    """Empty files in folders beside one another, so deep that their paths could not be opened at once."""
    here = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d" * MAX_COMPONENT, dir_fd=here)
        below = os.open("d" * MAX_COMPONENT, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    for number in range(folders):
        os.mkdir(str(number), dir_fd=here)
        folder = os.open(str(number), os.O_RDONLY, dir_fd=here)
        for name in range(files):
            os.close(os.open(f"{name:0100}", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
        os.close(folder)
    os.close(here)


@pytest.mark.parametrize("processes", [0, 1])
async def test_many_files_with_long_paths_are_asked_for_in_several_requests(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    hungry, submit = cast(property, Fetcher.hungry), Fetcher.submit_pack
    asked: list[int] = []

    def submitting(fetcher: Fetcher, jobs: list[FileJob]) -> None:
        asked.append(len(jobs))
        submit(fetcher, jobs)

    # As when lanes have enough to do: files are collected over many folders until a pack is full.
    monkeypatch.setattr(Fetcher, "hungry", property(lambda fetcher: bool(asked) and hungry.__get__(fetcher)))
    monkeypatch.setattr(Fetcher, "submit_pack", submitting)
    engine = Engine(quick_path, processes=processes)
    fill(engine.source, 45, 21, 50)
    observed = await engine.run(20)
    assert (observed.state, observed.counters.files_transferred) == ("SUCCEEDED", 1050), observed
    assert engine.sessions == 1
    assert max(asked) * 45 * MAX_COMPONENT < session.MAX_MESSAGE / 4


def test_no_other_request_for_many_paths_is_larger_than_allowed() -> None:
    """Nor an answer that says of each path why it cannot be looked at."""
    version = (2**63, 2**63, 2**63 - 1, 2**63 - 1, 2**63 - 1)
    named = [b"n" * MAX_PATH] * ITEMS_AT_ONCE
    listed = [session.AttributesOf(b"n" * session.MAX_PATH, version)] * session.MAX_ATTRIBUTE_FILES
    # Four bytes a character, as many as an error may have.
    long = "\U0001f40c" * 2 * MAX_SENTENCE
    reason = ItemFailed(long, code="PERMISSION_DENIED", who="source owner", subject=long).to_document()
    room = session.ATTRIBUTE_BYTES
    for message in (
        session.StatPaths(1, named),
        session.TakePaths(1, named, 1, 2, 64, 1 << 20, 1 << 20),
        session.ReadAttributes(1, listed),
        session.Stats(1, [session.StatResult(None, reason)] * ITEMS_AT_ONCE),
        session.Attributes(1, [session.FileAttributes([], error=reason)] * session.MAX_ATTRIBUTE_FILES),
    ):
        assert len(session.encode(message)) < session.MAX_MESSAGE - room, type(message)
