"""Folders are listed in one flight with the question what they are; what turns out to be none is not listed."""

from __future__ import annotations

from pathlib import Path

from protocol import session
from protocol.control import TaskItem
from tests.agent.asked_of_source import asked
from tests.agent.engine_inside import Engine, contents, quick_path

__all__ = ["asked", "quick_path"]


def _listed(requests: list[session.Request]) -> list[bytes]:
    return [request.path for request in requests if isinstance(request, session.ListDirectory)]


async def test_a_folder_is_listed_before_it_is_known_to_be_one(quick_path: Path, asked: list[session.Request]) -> None:
    engine = Engine(quick_path)
    (engine.source / "inner").mkdir()
    (engine.source / "inner" / "file").write_bytes(b"content")
    assert (await engine.run()).state == "SUCCEEDED"
    assert contents(engine.destination) == contents(engine.source)
    assert [type(request) for request in asked[:2]] == [session.ListDirectory, session.StatPaths]
    # Each once.
    assert _listed(asked) == [b"", b"inner"]
    assert not any(isinstance(request, session.Abandon) for request in asked)


async def test_what_is_no_folder_fails_as_before_and_its_listing_is_forgotten(
    quick_path: Path, asked: list[session.Request]
) -> None:
    names = ["a file", "nothing", "folder"]
    engine = Engine(
        quick_path,
        items=[TaskItem(source_path=f"/{name}", destination_path=f"/{name}", recursive=True) for name in names],
    )
    (engine.source / "a file").write_bytes(b"content")
    (engine.source / "folder").mkdir()
    (engine.source / "folder" / "file").write_bytes(b"content")
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 2)
    assert contents(engine.destination) == {"folder": "folder", "folder/file": b"content"}
    assert _listed(asked) == [b"a file", b"nothing", b"folder"]


async def test_only_a_few_are_listed_ahead(quick_path: Path, asked: list[session.Request]) -> None:
    names = [f"{number}" for number in range(30)]
    engine = Engine(
        quick_path,
        items=[TaskItem(source_path=f"/{name}", destination_path=f"/{name}", recursive=True) for name in names],
    )
    for name in names:
        (engine.source / name).mkdir()
        (engine.source / name / "file").write_bytes(name.encode())
    assert (await engine.run()).state == "SUCCEEDED"
    assert contents(engine.destination) == contents(engine.source)
    first = next(index for index, request in enumerate(asked) if isinstance(request, session.StatPaths))
    assert first == 4
    assert sorted(_listed(asked)) == sorted(name.encode() for name in names)
