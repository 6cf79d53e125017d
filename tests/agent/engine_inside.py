"""The engine of one task, both ends in one process: real threads, sockets, files and journals, without TLS, processes,
daemon and relay. A run takes milliseconds, so that faults can be tried by the thousand.

A *crash* is played by a plan that raises `Crashed`: from then on every call of storage and journal raises it too, and
nothing is committed any more; a new engine on the same folders is what comes after.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from agent.limits.pace import Pace
from agent.storage.base import Root
from agent.storage.faulty import Call, FaultyRoot, Plan, no_faults
from agent.storage.posix import open_root
from agent.transfer import task_runner
from agent.transfer.asking.source_session import SourceSession
from agent.transfer.basis import patience
from agent.transfer.basis.compression import offered
from agent.transfer.basis.lane_keys import KEY_RECORDS, LAST_RECORD, RECORD
from agent.transfer.books.journal import Journal
from agent.transfer.books.manifest import ManifestWriter, SkippedRow, read_page
from agent.transfer.books.state_trouble import of_system
from agent.transfer.lane_processes.one_process import RemoteLane
from agent.transfer.lane_processes.pool import LaneProcesses
from agent.transfer.processes.channel import Common, Event, RunTask
from agent.transfer.source.serve import SourceSide, serve_lane
from agent.transfer.task_runner import TaskRunner
from protocol.control import Party, TaskItem, TaskObserved, TaskOptions, TaskOrder
from protocol.errors import TowpathError
from tests.agent.lane_player import LanePlayer, LaneProcessDied

TASK = "11111111-2222-4333-8444-555555555555"
WHOLE = [TaskItem(source_path="/", destination_path="/", recursive=True)]
CHECKED = TaskOptions(verify_checksum=True, preserve_timestamp=True, recursive_symlinks="keep")


class Crashed(LaneProcessDied):
    """All processes are dead. Nothing of the engine may catch this and go on."""


class OpenPolicy:
    """Lets everything pass: what a session may ask is tested elsewhere."""

    reach = None

    def accept(self, *_: Any) -> None:
        return

    def renew(self, *_: Any) -> None:
        return

    def check(self, *_: Any) -> None:
        return

    def covers(self, *_: Any) -> bool:
        return True


class InRecords(socket.socket):
    """No read brings more than a TLS record holds."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(fileno=sock.detach())
        self.records = 0

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        self.records += 1
        return super().recv_into(buffer, min(nbytes or len(buffer), RECORD), flags)


class Line:
    """The daemon of a task, as its runner sees it."""

    def __init__(self, engine: Engine, nursery: trio.Nursery) -> None:
        self.engine = engine
        self.nursery = nursery
        self.desired = "run"
        self.revision = 1
        self.ticket = ""
        self.pace = engine.pace
        self.limited_by = ""
        self.lanes, self.memory = engine.lanes_wanted, 48
        self.on_event_stored: Callable[[int], None] = lambda _seq: None
        self._scopes: set[trio.CancelScope] = set()
        self.side: SourceSide | None = None
        self.ended = trio.Event()
        self.lock: int | None = None
        self.players = [LanePlayer(engine._planned, engine.short) for _ in range(engine.processes)]
        self.processes = LaneProcesses(self.players, engine.pace) if self.players else None
        if self.processes is not None:
            nursery.start_soon(self.processes.run)

    def want(self, desired: str) -> None:
        self.desired = desired
        for scope in self._scopes:
            scope.cancel()

    @contextlib.contextmanager
    def while_desired(self) -> Iterator[trio.CancelScope]:
        with trio.CancelScope() as scope:
            if self.desired != "run":
                scope.cancel()
            self._scopes.add(scope)
            try:
                yield scope
            finally:
                self._scopes.discard(scope)

    @contextlib.asynccontextmanager
    async def session(self, _session_id: str) -> AsyncIterator[SourceSession]:
        self.engine.sessions += 1
        if self.engine.on_session is not None:
            self.engine.on_session(self.engine.sessions)
        ours, theirs = trio.testing.memory_stream_pair()
        with self.engine.source_root() as root:
            self.engine.controls.append(theirs)
            side = SourceSide(root, OpenPolicy(), None, **self.engine.at_source())  # type: ignore[arg-type]
            self.side = side
            scope = trio.CancelScope()
            self.nursery.start_soon(self._serve, side, theirs, scope)
            session = SourceSession(ours, b"i" * 16)
            if self.processes is not None:
                self.processes.begin_run(b"", "", self.lock)
            try:
                # Sources of before want to be greeted first, and answer, before they are asked.
                begin = session.greet if self.engine.ahead else session.hello
                await begin("", "", offered(self.engine.options.compression))
                yield session
            finally:
                self.side = None
                scope.cancel()
                with trio.CancelScope(shield=True):
                    await self.ended.wait()
                await trio.aclose_forcefully(ours)
                self.engine.cut_lanes()

    async def _serve(self, side: SourceSide, stream: trio.abc.Stream, scope: trio.CancelScope) -> None:
        self.ended = trio.Event()
        try:
            with scope:
                await side.serve_control(stream, "", ahead=self.engine.ahead)
        except TowpathError as error:
            self.engine.lane_errors.append(error)
        finally:
            self.ended.set()

    async def lane(self) -> socket.socket | RemoteLane:
        ours, theirs = socket.socketpair()
        side = self.side
        assert side is not None
        self.engine.lanes.append(theirs)
        self.engine.opened += 1
        thread = threading.Thread(target=self.engine.serve, args=(side, theirs), daemon=True)
        thread.start()
        self.engine.threads.append(thread)
        if self.processes is not None and self.processes.alive:
            return await self.processes.open(ours, "")
        return InRecords(ours)

    def post(self, event: Event) -> None:
        # As the real one: raises in any other thread than trio's.
        trio.lowlevel.current_task()
        self.engine.events.append(event)
        self.on_event_stored(event.seq)

    def report(self, observed: TaskObserved) -> None:
        trio.lowlevel.current_task()
        self.engine.reports.append(observed)
        if self.engine.on_report is not None:
            self.engine.on_report(self, observed)


@dataclass
class Engine:
    """One task from ``base/source`` to ``base/destination``, with its state in ``base/state``."""

    base: Path
    options: TaskOptions = CHECKED
    items: list[TaskItem] = field(default_factory=lambda: list(WHOLE))
    type: str = "TRANSFER"
    plan: Plan = no_faults
    source_plan: Plan = no_faults
    short: int = 0
    read_twice: bool = False
    ahead: bool = True
    lanes_wanted: int = 1
    # The permission bits that new files are given, and whether access lists may name accounts by number.
    permitted: int = 0o755
    numbers: bool = False
    # Lane processes, each played by a thread of this one; with LANE_PROCESSES=1 in the environment all tests that play
    # an engine have one.
    processes: int = int(os.environ.get("LANE_PROCESSES", "0"))
    # After how many TLS records the destination has a lane followed by another; here a read, of at most 16 KiB, counts
    # as one. And after how many the source ends it.
    key_records: int = KEY_RECORDS
    last_record: int = LAST_RECORD
    wrap: Callable[[Root], Root] = lambda root: root
    on_session: Callable[[int], None] | None = None
    on_report: Callable[[Line, TaskObserved], None] | None = None

    def __post_init__(self) -> None:
        self.source, self.destination, self.state = (self.base / name for name in ("source", "destination", "state"))
        for folder in (self.source, self.destination, self.state):
            folder.mkdir(parents=True, exist_ok=True)
        self.events: list[Event] = []
        self.reports: list[TaskObserved] = []
        self.lanes: list[socket.socket] = []
        # The sources' ends of the control streams so far.
        self.controls: list[trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]] = []
        self.threads: list[threading.Thread] = []
        self.lane_errors: list[BaseException] = []
        self.calls: list[Call] = []
        self.sessions = 0
        # Of the latest run.
        self.line: Line | None = None
        # Lanes that were opened so far.
        self.opened = 0
        self.dead = False
        self.pace = Pace()
        self._counted = 0
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    # --- storage ---------------------------------------------------------------------------------------

    def _planned(self, call: Call) -> int | None:
        """One numbering over all runs of the task, and no life after a crash."""
        if self.dead:
            raise Crashed
        with self._lock:
            self._counted += 1
            nth = self._counts[call.operation] = self._counts.get(call.operation, 0) + 1
            call = Call(self._counted, call.operation, nth, call.name)
            self.calls.append(call)
        try:
            return self.plan(call)
        except Crashed:
            self.dead = True
            raise

    def open_destination(self) -> Root:
        if self.dead:
            raise Crashed
        return self.wrap(FaultyRoot(open_root(str(self.destination)), self._planned, short=self.short))

    def source_root(self) -> Root:
        return FaultyRoot(open_root(str(self.source)), self.source_plan, short=self.short)

    def at_source(self) -> dict[str, Any]:
        """What the source's owner chose, and what is made smaller for tests."""
        return {"read_twice": self.read_twice, "last_record": self.last_record}

    def serve(self, side: SourceSide, sock: socket.socket) -> None:
        try:
            serve_lane(side, sock, lambda secured: (secured, ""))
        except (OSError, TowpathError) as error:
            self.lane_errors.append(error)

    def cut_lanes(self) -> None:
        for sock in self.lanes:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self.lanes.clear()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        self.threads.clear()

    # --- runs ------------------------------------------------------------------------------------------

    def order(self) -> TaskOrder:
        party = Party(endpoint_id="e", node_id="n", collection_id="c", certificate="")
        return TaskOrder(
            task_id=TASK,
            revision=1,
            desired="run",
            type=self.type,  # type: ignore[arg-type]
            ticket="",
            session_id=str(uuid.uuid4()),
            destination=party,
            source=party,
            options=self.options,
            items=self.items,
        )

    async def run(self, seconds: float = 30) -> TaskObserved:
        """To the end of the task, or until it crashes (`Crashed`)."""
        common = Common(
            node_id="n", node_key=b"", relay_id="r", relay_root="", collections=[], key_records=self.key_records
        )
        last = self.events[-1].seq if self.events else 0
        start = RunTask(
            common=common, order=self.order(), state_dir=str(self.state), lanes=self.lanes_wanted, last_event=last
        )
        observed: TaskObserved | None = None
        try:
            with trio.fail_after(seconds), self._mortal():
                async with trio.open_nursery() as nursery:
                    line = self.line = Line(self, nursery)
                    runner = TaskRunner(start, line, self.permitted, self.open_destination, numbers=self.numbers)  # type: ignore[arg-type]
                    observed = await runner.run()
                    nursery.cancel_scope.cancel()
        except BaseException as error:
            if self.dead and _holds(error, Crashed):
                raise Crashed from None
            raise
        finally:
            self.cut_lanes()
        assert observed is not None
        return observed

    def _mortal(self) -> contextlib.AbstractContextManager[None]:
        return mortal(lambda _path: self)

    def _step(self, name: str) -> None:
        code = self._planned(Call(0, name, 0, b""))
        if code is not None:
            raise of_system(OSError(code, os.strerror(code)), self.state / name)

    # --- looks -----------------------------------------------------------------------------------------

    def codes(self) -> list[str]:
        return [event.code for event in self.events]

    def temporaries(self) -> list[str]:
        return sorted(str(path) for path in self.destination.rglob(".towpath.*"))

    def revived(self, plan: Plan = no_faults) -> Engine:
        """What comes after a crash: new processes on the same disks."""
        after = Engine(self.base, self.options, self.items, self.type, plan, short=self.short, processes=self.processes)
        after.events = list(self.events)
        return after


@contextlib.contextmanager
def mortal(engine_of: Callable[[Path], Engine]) -> Iterator[None]:
    """Journals and manifests die with the process: each durable step is a call of the plan of the engine whose file it
    is, and after a crash nothing is written any more. Pauses are short."""
    commit, close, sync = Journal.commit, Journal.close, ManifestWriter.sync

    def committing(journal: Journal) -> None:
        engine_of(journal.path)._step("journal_commit")
        commit(journal)

    def closing(journal: Journal) -> None:
        if engine_of(journal.path).dead:
            journal.abandon()
        else:
            close(journal)

    def syncing(manifest: ManifestWriter) -> None:
        engine_of(manifest._path)._step("manifest_sync")
        sync(manifest)

    changes: list[tuple[object, str, object]] = [
        (Journal, "commit", committing),
        (Journal, "close", closing),
        (ManifestWriter, "sync", syncing),
        (task_runner, "FIRST_PAUSE", 0.001),
        (task_runner, "LONGEST_PAUSE", 0.01),
        (task_runner, "LOOK_AGAIN", 0.01),
        (patience, "FIRST_PAUSE", 0.001),
        (patience, "LONGEST_PAUSE", 0.01),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for where, name, value in changes:
            patch.setattr(where, name, value)
        yield


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one, else on the disk: thousands of syncs cost nothing there."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="towpath-") as folder:
        yield Path(folder)


def _holds(error: BaseException, kind: type[BaseException]) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(_holds(inner, kind) for inner in error.exceptions)
    return isinstance(error, kind)


def open_files(below: Path) -> list[str]:
    """Files in a folder that this process has open, removed ones among them."""
    if not os.path.isdir("/proc/self/fd"):
        return []
    found = []
    for number in os.listdir("/proc/self/fd"):
        # The handle of the listing itself is gone by now.
        with contextlib.suppress(FileNotFoundError):
            place = os.readlink(f"/proc/self/fd/{number}")
            if place.startswith(f"{below}/") and not os.path.isdir(place):
                found.append(place)
    return found


def contents(root: Path, *, temporaries: bool = True) -> dict[str, bytes | str]:
    """Every name below a folder with its content, target or kind; times and modes apart. While a task runs, temporaries
    may go at any moment: then without them."""
    found: dict[str, bytes | str] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if not temporaries and ".towpath." in name:
            continue
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        else:
            found[name] = "folder" if path.is_dir() else path.read_bytes()
    return found


def received(engine: Engine) -> int:
    """Content bytes that came to a task in all its runs, those that came again among them."""
    return int.from_bytes((engine.state / "received").read_bytes()[:8], "little")


def sparse(path: Path, size: int, pieces: dict[int, bytes]) -> None:
    """A file of so many bytes that are holes, but for pieces at these offsets."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in pieces.items():
            file.seek(offset)
            file.write(data)


def when(code: str, action: Callable[[], None]) -> Callable[[Line, TaskObserved], None]:
    """Do something once, when the task says for the first time that this holds it up."""
    done: list[str] = []

    def look(_line: Line, observed: TaskObserved) -> None:
        if observed.status_code == code and not done:
            done.append(observed.status_sentence)
            assert observed.state == "WAITING"
            assert observed.who in ("destination owner", "source owner"), observed
            action()

    return look


def skipped(engine: Engine) -> dict[str, str]:
    """What the task of an engine left out, and the code that says why."""
    page = read_page(engine.state / "skipped.manifest", SkippedRow, None, 1000, complete=True)
    return {os.fsdecode(row.source): row.code for row in page.rows}


def tree(folder: Path, names: list[str]) -> None:
    """Files of these names, each with a content of its own."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")
