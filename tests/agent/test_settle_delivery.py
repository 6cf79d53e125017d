"""Packs of small files that lanes deliver in their own threads: before, while and after the settler runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.storage.base import Root
from agent.storage.faulty import FaultyRoot
from agent.storage.memory import MemoryRoot
from agent.transfer.jobs import FileJob, Group, GroupListed, LargeFile, PackArrived
from agent.transfer.journal import Journal
from agent.transfer.manifest import ManifestWriter
from agent.transfer.settle import Settler
from agent.transfer.state_trouble import StateTrouble
from protocol.errors import TowpathError
from protocol.lane import digest
from protocol.session import FILE, Row


class Reports:
    """Writes down what the settler says."""

    def __init__(self) -> None:
        self.jobs: list[FileJob] = []
        self.failed: list[FileJob] = []
        self.done: list[Group] = []
        self.all_done = threading.Event()

    def settled(self, jobs: list[FileJob], released: int) -> None:
        self.jobs += jobs

    def blocks_settled(self, size: int) -> None: ...

    def job_failed(self, job: FileJob, error: TowpathError) -> None:
        self.failed.append(job)

    def file_failed(self, file: LargeFile, error: TowpathError) -> None: ...

    def refetch(self, file: LargeFile, index: int) -> None: ...

    def abandoned(self, file: LargeFile, error: TowpathError) -> None: ...

    def group_done(self, group: Group) -> None:
        self.done.append(group)
        self.all_done.set()


class World:
    """A settler, its thread, and what it writes to."""

    def __init__(self, directory: Path, root: Root) -> None:
        self.root = root
        self.reports = Reports()
        self.journal = Journal(directory / "journal")
        self.manifests = (ManifestWriter(directory / "done", 0), ManifestWriter(directory / "skipped", 0))
        self._serial = 0
        self.settler = Settler(
            root,
            self.journal,
            self.manifests,
            verify=True,
            preserve_timestamp=True,
            mode_mask=0o777,
            reports=self.reports,
            temporary_name=self._name,
            now=lambda: "",
        )
        self.group = Group(1, b"", b"", root.open_directory(()), [])
        self.ended_by: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _name(self) -> bytes:
        self._serial += 1
        return b".towpath.test.%d" % self._serial

    def _run(self) -> None:
        try:
            self.settler.run()
        except BaseException as error:
            self.ended_by = error

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.ident is None:
            return
        self.settler.stop()
        self._thread.join()

    def pack(self, *names: bytes) -> PackArrived:
        jobs = []
        for name in names:
            self.group.planned += 1
            row = Row(name, FILE, len(name), 10**18, 10**18, 1, 1, 0o644)
            jobs.append(FileJob(self.group, 0, row, name, name, False))
        return PackArrived(jobs, [memoryview(name) for name in names], [digest(name) for name in names])

    def names(self) -> list[bytes]:
        return sorted(node.name for node in self.group.handle.scan(reserved=True))

    def close(self) -> None:
        self.stop()
        self.group.handle.close()
        for manifest in self.manifests:
            manifest.close()
        self.journal.close()


@contextmanager
def world(directory: Path, root: Root | None = None) -> Iterator[World]:
    with root or MemoryRoot() as opened:
        made = World(directory, opened)
        try:
            yield made
        finally:
            made.close()


def test_what_is_delivered_before_the_settler_runs_is_settled(tmp_path: Path) -> None:
    with world(tmp_path) as made:
        made.settler.deliver(made.pack(b"a", b"b"))
        made.settler.queue.put(GroupListed(made.group))
        made.start()
        assert made.reports.all_done.wait(30)
        assert made.names() == [b"a", b"b"]
        assert len(made.reports.jobs) == 2


def test_lanes_that_deliver_together_lose_nothing(tmp_path: Path) -> None:
    with world(tmp_path) as made:
        made.start()
        packs = [made.pack(*[b"%d-%d" % (lane, number) for number in range(50)]) for lane in range(8)]
        lanes = [threading.Thread(target=made.settler.deliver, args=[pack]) for pack in packs]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
        made.settler.queue.put(GroupListed(made.group))
        assert made.reports.all_done.wait(30)
        assert made.names() == sorted(job.name for pack in packs for job in pack.jobs)
        assert made.settler.record.counters.files_transferred == 400


def test_stopping_settles_what_was_delivered_and_takes_nothing_after(tmp_path: Path) -> None:
    with world(tmp_path) as made:
        made.start()
        made.settler.deliver(made.pack(b"before"))
        made.stop()
        made.settler.deliver(made.pack(b"after"))
        assert made.names() == [b"before"]
        assert made.ended_by is None


def test_a_file_that_cannot_be_written_fails_alone(tmp_path: Path) -> None:
    def plan(call: Any) -> int | None:
        # The second temporary meets a name that is too long (ENAMETOOLONG).
        return 36 if call.operation == "create_temporary" and call.nth == 2 else None

    with world(tmp_path, FaultyRoot(MemoryRoot(), plan)) as made:
        made.start()
        made.settler.deliver(made.pack(b"a", b"b", b"c"))
        made.stop()
        assert made.names() == [b"a", b"c"]
        assert [job.name for job in made.reports.failed] == [b"b"]


def test_trouble_with_the_journal_ends_the_settler_and_not_the_lane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with world(tmp_path) as made:
        trouble = StateTrouble("The journal cannot be written.", code="STATE_TROUBLE", who="destination owner")

        def refuse(*_: Any) -> int:
            raise trouble

        monkeypatch.setattr(made.settler._small, "write", refuse)
        made.start()
        made.settler.deliver(made.pack(b"a"))
        made.stop()
        assert made.ended_by is trouble
        assert made.names() == []
