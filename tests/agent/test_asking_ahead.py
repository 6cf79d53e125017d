"""A destination asks in the flight of its greeting, and for a lane that has not greeted yet, where the source is known
to take that; other sources are asked one after the other, as ever."""

from __future__ import annotations

import itertools
import os
import queue
import socket
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from agent.limits.pace import Pace
from agent.meter.lane import LaneMeter
from agent.storage.posix import open_root
from agent.transfer.asking.fetch import UNSERVED_FOR, Fetcher
from agent.transfer.asking.source_session import SessionLost, SourceSession
from agent.transfer.asking.take_ahead import LANE, MOST_FILES, Awaited, takeable
from agent.transfer.basis.compare import SMALL_FILE
from agent.transfer.basis.jobs import FileJob, Group, PackRequest
from agent.transfer.receiving.receive import LaneReceiver
from agent.transfer.source import lane_queues, serve
from agent.transfer.source.send import Joined
from agent.transfer.source.serve import SourceSide
from protocol import session
from protocol.control import TaskItem, TaskOptions
from protocol.errors import ProtocolError, RetryLater, TaskFailed, TowpathError
from tests.agent.asked_of_source import asked
from tests.agent.engine_inside import Engine, OpenPolicy, contents, quick_path, tree

__all__ = ["asked", "quick_path"]

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
            joined.append(side.join(instance, 1, LaneMeter(None)).work)  # type: ignore[arg-type]
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
    most = lane_queues.MAX_EXPECTED
    for number in range(1, most + 2):
        await ours.send_all(session.encode(session.ReadPack(number, number, b"", pack)))
    refused = [session.answer_untrusted(body) for body in await _messages(ours, 1 if ahead else most + 1)]
    numbers = {answer.r for answer in refused if isinstance(answer, session.Failed)}
    assert numbers == ({most + 1} if ahead else set(range(1, most + 2)))
    if ahead:
        work = (await trio.to_thread.run_sync(side.join, INSTANCE, 1, LaneMeter(None))).work  # type: ignore[arg-type]
        found = work.get_nowait()
        assert found is not None
        assert found.request.r == 1
        # A lane of the same number that comes later begins with nothing, and ends the one before.
        other = (await trio.to_thread.run_sync(side.join, INSTANCE, 1, LaneMeter(None))).work  # type: ignore[arg-type]
        assert other is not work
        assert (other.qsize(), work.get_nowait()) == (0, None)
    nursery.cancel_scope.cancel()


async def test_what_a_lane_is_asked_for_before_it_is_expected_is_asked_for_again(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with more lanes at once than a source expects; nobody heard that it refused, and the task stood still."""
    monkeypatch.setattr(lane_queues, "MAX_EXPECTED", 0)
    join = SourceSide.join

    def slowly(side: SourceSide, instance: bytes, number: int, meter: LaneMeter) -> Joined:
        time.sleep(0.1)
        return join(side, instance, number, meter)

    monkeypatch.setattr(SourceSide, "join", slowly)
    engine = Engine(quick_path)
    tree(engine.source, ["a", "b", "folder/c"])
    (engine.source / "large").write_bytes(os.urandom(5 << 20))
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert contents(engine.destination) == contents(engine.source)


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


# --- content in the first flight --------------------------------------------------------------------------------------


def _single(*names: str, **more: Any) -> list[TaskItem]:
    return [TaskItem(source_path=f"/{name}", destination_path=f"/{name}", **more) for name in names]


async def test_small_files_are_asked_for_with_the_question_what_they_are(
    quick_path: Path, asked: list[session.Request]
) -> None:
    engine = Engine(quick_path, options=TaskOptions(verify_checksum=True), items=_single("b", "large", "a", "empty"))
    for name, size in (("b", 10), ("large", SMALL_FILE + 1), ("a", 20), ("empty", 0)):
        (engine.source / name).write_bytes(name[:1].encode() * size)
    observed = await engine.run()
    assert (observed.state, observed.counters.bytes_sent_again) == ("SUCCEEDED", 0)
    assert contents(engine.destination) == contents(engine.source)
    assert isinstance(asked[0], session.TakePaths)
    # Nothing of them was asked for again.
    assert not any(isinstance(request, session.StatPaths | session.ReadPack) for request in asked)


@pytest.mark.parametrize(
    "options", [TaskOptions(sync_level=0), TaskOptions(preserve_xattrs=True), TaskOptions(preserve_hard_links=True)]
)
async def test_they_are_not_where_they_may_not_be_wanted(
    quick_path: Path, asked: list[session.Request], options: TaskOptions
) -> None:
    engine = Engine(quick_path, options=options, items=_single("file"))
    (engine.source / "file").write_bytes(b"content")
    assert (await engine.run()).state == "SUCCEEDED"
    assert not any(isinstance(request, session.TakePaths) for request in asked)


async def test_what_cannot_be_placed_is_discarded_and_the_lane_goes_on(
    quick_path: Path, asked: list[session.Request]
) -> None:
    engine = Engine(quick_path, options=TaskOptions(), items=_single("file", "folder", "other", "gone"))
    for name in ("file", "folder", "other"):
        (engine.source / name).write_bytes(name.encode())
    # A folder is there where a file should go.
    (engine.destination / "folder").mkdir()
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 2)
    assert contents(engine.destination) == {"file": b"file", "folder": "folder", "other": b"other"}
    # The two that remain were not the very ones that came.
    assert [len(request.files) for request in asked if isinstance(request, session.ReadPack)] == [2]


async def test_the_same_names_in_several_folders_are_only_taken_from_the_first(
    quick_path: Path, asked: list[session.Request]
) -> None:
    items = [*_single("x/1", "x/2"), *_single("y/1"), *_single("x/3")]
    engine = Engine(quick_path, options=TaskOptions(), items=items)
    for name in ("x/1", "x/2", "y/1", "x/3"):
        (engine.source / name).parent.mkdir(exist_ok=True)
        (engine.source / name).write_bytes(name.encode())
    assert (await engine.run()).state == "SUCCEEDED"
    assert contents(engine.destination) == contents(engine.source)
    taken = [request for request in asked if isinstance(request, session.TakePaths)]
    assert [(request.count, len(request.paths)) for request in taken] == [(2, 4)]


def test_which_items_are_worth_it() -> None:
    options = TaskOptions()
    assert takeable(_single("a", "b"), options) == 2
    assert takeable(_single(*map(str, range(100))), options) == MOST_FILES
    assert takeable(_single("a", recursive=True), options) == 0
    assert takeable(_single("a", symlink=True), options) == 0
    assert takeable([*_single("a"), *_single("b", external_checksum="00")], options) == 1


@given(st.lists(st.one_of(st.none(), st.integers(0, 100)), max_size=20), st.integers(0, 100), st.integers(0, 300))
def test_what_fits_is_small_and_not_too_much(sizes: list[int | None], largest: int, most: int) -> None:
    rows = [None if size is None else session.Row(b"", session.FILE, size, 0, 0, 0, 0, 0) for size in sizes]
    chosen = session.fitting(rows, largest, most)
    taken = [row.size for index in chosen if (row := rows[index]) is not None]
    assert chosen == sorted(set(chosen))
    assert len(taken) == len(chosen)
    assert sum(taken) <= most
    assert all(size <= largest for size in taken)


def _job(name: bytes, size: int = 1) -> FileJob:
    group = Group(-1, b"", b"", None, [])  # type: ignore[arg-type]
    return FileJob(group, 0, session.Row(name, session.FILE, size, 0, 0, 0, 0, 0), name, name, True)


def test_content_waits_until_it_is_decided_about() -> None:
    awaited = Awaited(7, [b"a", b"b", b"c"])
    rows = [session.Row(name, session.FILE, 1, 0, 0, 0, 0, 0) for name in (b"a", b"b")]
    awaited.answered([*map(session.StatResult, rows), session.StatResult(None)])
    assert awaited.order([_job(b"b")]) is None
    assert awaited.order([_job(b"b"), _job(b"a"), _job(b"c")]) is None
    jobs = awaited.order([_job(b"b"), _job(b"a")])
    assert jobs is not None
    assert [job.name for job in jobs] == [b"a", b"b"]
    request = PackRequest(7, jobs, 2)
    threading.Timer(0.05, awaited.decide, [request]).start()
    assert awaited.wait(lambda: False) is request
    assert not awaited.decide(None)


def test_what_a_lane_has_discarded_becomes_no_work_of_it_however_close_the_decision_was() -> None:
    fetcher, line = _fetcher()
    fetcher.add_lane(LANE)
    awaited = fetcher.requests[7]
    assert isinstance(awaited, Awaited)
    # Nobody has decided, and the lane waits no longer; it is about to say that it is through with the request.
    assert awaited.wait(lambda: True) is None
    fetcher.submit_pack([_job(b"a")])
    fetcher.done(LANE, 7)
    assert [type(message) for message in line.posted] == [session.ReadPack]
    assert not fetcher.idle
    # What comes of it later is discarded like the rest.
    assert awaited.wait(lambda: False) is None


class _Session:
    """What a fetcher needs of one."""

    def __init__(self) -> None:
        self.numbers = itertools.count(100)
        self.posted: list[session.Message] = []

    def number(self) -> int:
        return next(self.numbers)

    def post(self, message: session.Message) -> None:
        self.posted.append(message)


def _fetcher() -> tuple[Fetcher, _Session]:
    line = _Session()
    never: Any = lambda *_: None  # noqa: E731
    fetcher = Fetcher(line, on_range_lost=never, on_file_idle=never, on_job_failed=never, on_hungry=never)  # type: ignore[arg-type]
    awaited = Awaited(7, [b"a"])
    awaited.answered([session.StatResult(session.Row(b"a", session.FILE, 1, 0, 0, 0, 0, 0))])
    fetcher.expect(awaited)
    return fetcher, line


def test_what_a_source_has_no_lane_for_is_asked_again_when_lanes_are_measured_and_not_for_ever() -> None:
    fetcher, line = _fetcher()
    fetcher.discard_awaited()
    fetcher.add_lane(2)
    fetcher.submit_pack([_job(b"a")])
    gone, now = RetryLater("The lane is gone.", code="CONNECTION_LOST"), 0.0
    with pytest.raises(SessionLost, match="does not have them"):
        for asked in range(1, 1000):
            request = line.posted[-1]
            assert isinstance(request, session.ReadPack)
            fetcher.unserved(request.r, gone)
            assert len(line.posted) == asked
            # Its answer takes longer than that sometimes.
            for _ in range(1 + asked % 3):
                now += 0.5
                fetcher.measure(now)
    assert UNSERVED_FOR < now < UNSERVED_FOR + 3


def test_what_was_asked_for_ahead_becomes_work_of_the_first_lane_before_or_after_it_is_there() -> None:
    for early in (False, True):
        fetcher, line = _fetcher()
        if early:
            fetcher.add_lane(LANE)
        fetcher.submit_pack([_job(b"a")])
        if not early:
            fetcher.add_lane(LANE)
        assert line.posted == []
        assert isinstance(fetcher.requests[7], PackRequest)
        assert not fetcher.idle
        # Lost with its lane, it is asked for like anything else.
        fetcher.drop_lane(LANE)
        fetcher.add_lane(2)
        assert [type(message) for message in line.posted] == [session.ReadPack]


def test_what_was_asked_for_ahead_is_asked_for_again_when_its_lane_never_comes_up() -> None:
    fetcher, line = _fetcher()
    fetcher.submit_pack([_job(b"a")])
    fetcher.drop_lane(LANE)
    assert 7 not in fetcher.requests
    fetcher.add_lane(2)
    (asked,) = line.posted
    assert isinstance(asked, session.ReadPack)
    assert [file.name for file in asked.files] == [b"a"]


def test_some_of_what_comes_ahead_is_not_handed_out_before_all_of_it_was_collected() -> None:
    fetcher, _ = _fetcher()
    fetcher.add_lane(LANE)
    # A lane that is up and has nothing to do gets what has been collected, and that may be a part of it.
    assert fetcher.awaits
    assert not fetcher.hungry
    awaited = fetcher.requests[7]
    assert isinstance(awaited, Awaited)
    # The lane waited for too long: from now on it is one like any other.
    awaited.decide(None)
    assert not fetcher.awaits
    assert fetcher.hungry


@pytest.mark.parametrize("how", ["refused", "lane lost", "others", "discarded"])
def test_what_does_not_come_ahead_is_asked_for_as_ever(how: str) -> None:
    fetcher, line = _fetcher()
    fetcher.add_lane(LANE)
    awaited = fetcher.requests[7]
    assert isinstance(awaited, Awaited)
    if how == "refused":
        fetcher.failed(LANE, 7, RetryLater("No."))
    elif how == "lane lost":
        fetcher.drop_lane(LANE)
        fetcher.add_lane(2)
    elif how == "discarded":
        fetcher.discard_awaited()
    fetcher.submit_pack([_job(b"b" if how == "others" else b"a")])
    assert [type(message) for message in line.posted] == [session.ReadPack]
    assert 7 not in fetcher.requests
    assert awaited.wait(lambda: False) is None
