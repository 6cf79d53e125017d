"""A destination asks in the flight of its greeting, and for a lane that has not greeted yet, where the source is known
to take that; other sources are asked one after the other, as ever."""

from __future__ import annotations

import queue
import socket
import threading
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from agent.limits.pace import Pace
from agent.meter.lane import LaneMeter
from agent.storage.posix import open_root
from agent.transfer import serve
from agent.transfer.receive import LaneReceiver
from agent.transfer.serve import SourceSide
from agent.transfer.source_session import SourceSession
from protocol import session
from protocol.errors import ProtocolError, RetryLater, TaskFailed, TowpathError
from tests.agent.engine_inside import Engine, OpenPolicy, contents, quick_path

__all__ = ["quick_path"]

INSTANCE = b"i" * 16
ROW = session.Row(b"file", session.FILE, 7, 1, 2, 3, 4, 0o644)


def _side(path: Path) -> SourceSide:
    return SourceSide(open_root(str(path), None), OpenPolicy(), None)  # type: ignore[arg-type]


async def _messages(stream: trio.abc.Stream, count: int) -> list[bytes]:
    reader, bodies = session.MessageReader(), list[bytes]()
    while len(bodies) < count:
        bodies += reader.feed_untrusted(await stream.receive_some(65536))
    return bodies


async def test_the_greeting_and_the_first_question_are_one_flight(nursery: trio.Nursery) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    subject = SourceSession(ours, INSTANCE)
    accepted: list[bool] = []
    await subject.greet("ticket", "1", ["zstd"])
    subject.when_accepted(lambda: accepted.append(True))
    nursery.start_soon(subject.run)
    results: list[list[session.StatResult]] = []

    async def ask() -> None:
        results.append(await subject.stat([b"file"], follow=True))

    nursery.start_soon(ask)
    await trio.testing.wait_all_tasks_blocked()
    # Nothing was answered yet.
    greeting, question = map(session.request_untrusted, await _messages(theirs, 2))
    assert isinstance(greeting, session.Hello)
    assert isinstance(question, session.StatPaths)
    assert not accepted
    welcome = session.encode(session.HelloAnswer(abilities=["extents"]))
    await theirs.send_all(welcome + session.encode(session.Stats(question.r, [session.StatResult(ROW)])))
    await trio.testing.wait_all_tasks_blocked()
    assert accepted == [True]
    assert results[0][0].row == ROW
    assert subject.abilities == {"extents"}
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (session.Failed(0, TaskFailed("No.", code="TICKET_REFUSED").to_document()), TaskFailed),
        (session.Pong(), ProtocolError),
    ],
)
async def test_a_source_that_does_not_accept_ends_the_session(
    nursery: trio.Nursery, answer: session.Message, error: type[TowpathError]
) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    subject = SourceSession(ours, INSTANCE)
    await subject.greet("ticket", "1")
    subject.when_accepted(lambda: pytest.fail("it was not accepted"))
    await theirs.send_all(session.encode(answer))
    with pytest.raises(error):
        await subject.run()


@pytest.mark.parametrize("ahead", [False, True])
async def test_a_source_takes_questions_with_the_greeting_only_where_it_said_so(
    tmp_path: Path, nursery: trio.Nursery, ahead: bool
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    ours, theirs = trio.testing.memory_stream_pair()
    failed: list[TowpathError] = []

    async def serve_it() -> None:
        try:
            await _side(tmp_path).serve_control(theirs, "", ahead=ahead)
        except TowpathError as error:
            failed.append(error)

    nursery.start_soon(serve_it)
    flight = session.encode(session.Hello("", INSTANCE)) + session.encode(session.StatPaths(1, [b"file"]))
    await ours.send_all(flight)
    answers = list(map(session.answer_untrusted, await _messages(ours, 2 if ahead else 1)))
    if ahead:
        assert isinstance(answers[0], session.HelloAnswer)
        assert isinstance(answers[1], session.Stats)
        assert not failed
    else:
        assert isinstance(answers[0], session.Failed)
        await trio.testing.wait_all_tasks_blocked()
        assert "before it was accepted" in failed[0].sentence
    nursery.cancel_scope.cancel()


async def test_a_lane_waits_for_the_greeting_that_is_under_way_and_for_no_other(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = _side(tmp_path)
    joined: list[object] = []

    def join(instance: bytes) -> None:
        try:
            joined.append(side.join(instance, 1, LaneMeter(None)))  # type: ignore[arg-type]
        except ProtocolError as error:
            joined.append(error)

    early = threading.Thread(target=join, args=(INSTANCE,))
    early.start()
    ours, theirs = trio.testing.memory_stream_pair()
    nursery.start_soon(side.serve_control, theirs, "")
    await ours.send_all(session.encode(session.Hello("", INSTANCE)))
    await _messages(ours, 1)
    await trio.to_thread.run_sync(early.join)
    assert isinstance(joined[0], queue.SimpleQueue)
    monkeypatch.setattr(serve, "JOIN_PATIENCE", 0.01)
    await trio.to_thread.run_sync(join, b"x" * 16)
    assert isinstance(joined[1], ProtocolError)
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("ahead", [False, True])
async def test_work_for_a_lane_that_has_not_come_waits_for_it(
    tmp_path: Path, nursery: trio.Nursery, ahead: bool
) -> None:
    """Of a few lanes: more of them were never opened by an honest destination."""
    (tmp_path / "file").write_bytes(b"content")
    side = _side(tmp_path)
    ours, theirs = trio.testing.memory_stream_pair()
    nursery.start_soon(partial(side.serve_control, theirs, "", ahead=ahead))
    await ours.send_all(session.encode(session.Hello("", INSTANCE)))
    await _messages(ours, 1)
    pack = [session.PackFile(b"file", (0, 0, 7, 0, 0))]
    for number in range(1, serve.MAX_EXPECTED + 2):
        await ours.send_all(session.encode(session.ReadPack(number, number, b"", pack)))
    refused = [session.answer_untrusted(body) for body in await _messages(ours, 1 if ahead else serve.MAX_EXPECTED + 1)]
    numbers = {answer.r for answer in refused if isinstance(answer, session.Failed)}
    assert numbers == ({serve.MAX_EXPECTED + 1} if ahead else set(range(1, serve.MAX_EXPECTED + 2)))
    if ahead:
        work = await trio.to_thread.run_sync(side.join, INSTANCE, 1, LaneMeter(None))  # type: ignore[arg-type]
        found = work.get_nowait()
        assert found is not None
        assert found.request.r == 1
        # A lane of the same number that comes later begins with nothing, and ends the one before.
        other = await trio.to_thread.run_sync(side.join, INSTANCE, 1, LaneMeter(None))  # type: ignore[arg-type]
        assert other is not work
        assert (other.qsize(), work.get_nowait()) == (0, None)
    nursery.cancel_scope.cancel()


class _Nothing:
    """Reports of a lane on which nothing comes."""


def test_a_lane_reads_the_answer_to_its_greeting_when_it_comes() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(5)
        receiver = LaneReceiver(1, ours, None, {}, queue.SimpleQueue(), _Nothing(), Pace())  # type: ignore[arg-type]
        receiver.introduce(INSTANCE, wait=False)
        assert theirs.recv(1000)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(RetryLater):
            receiver.run()


@pytest.mark.parametrize("ahead", [False, True])
async def test_either_way_everything_arrives(quick_path: Path, ahead: bool) -> None:
    engine = Engine(quick_path, ahead=ahead)
    for number in range(20):
        (engine.source / str(number)).write_bytes(b"content" * number)
    (engine.source / "large").write_bytes(b"x" * 3_000_000)
    assert (await engine.run()).state == "SUCCEEDED"
    assert contents(engine.destination) == contents(engine.source)
