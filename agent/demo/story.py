"""The demonstration's transfer: real data, three crashes, proof that nothing was lost, repeated much or shown half."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from agent.cli.profile import Profile
from agent.cli.relay_client import Relay
from agent.demo.children import Child, ChildFailed
from agent.demo.compare import Comparison, compare_trees
from agent.demo.sample import MIB, contents_of, make_tree, standard_library
from agent.demo.world import World, status_of

LARGE_FILE = 1024 * MIB
AGAIN_FOR_EACH_KILL = 64 * MIB
TIME_LIMIT = 300.0
TREE, COPY = "demo-tree", "demo-copy"
# Who is killed when the transfer has come so far (share of all bytes).
KILLS = ((0.15, "beta"), (0.40, "alpha"), (0.65, "relay"))


@dataclass
class Outcome:
    """What came of it. ``problems`` is empty when everything is as it should be."""

    seconds: float = 0.0
    bytes: int = 0
    files: int = 0
    sent_again: int = 0
    kills: list[str] = field(default_factory=list)
    looks: int = 0
    comparison: Comparison | None = None
    problems: list[str] = field(default_factory=list)


class Story:
    """One run. ``say`` prints a line, ``show`` gets bytes done and bytes in all, often."""

    def __init__(self, world: World, say: Callable[[str], None], show: Callable[[int, int], None]) -> None:
        self._world = world
        self._say = say
        self._show = show
        self._outcome = Outcome()

    async def run(self) -> Outcome:
        """Raises `ChildFailed` when the world breaks; everything else is in the outcome."""
        source, destination = self._world.alpha.root / TREE, self._world.beta.root / COPY
        if not source.exists():
            self._say("Making the data: Python's standard library, some symlinks, one file of 1 GiB …")
            await trio.to_thread.run_sync(make_tree, source, standard_library(), LARGE_FILE)
        contents = await trio.to_thread.run_sync(contents_of, source)
        self._outcome.bytes, self._outcome.files = contents.bytes, contents.files
        destination.mkdir(exist_ok=True)
        async with _watching(source, destination) as report:
            started = trio.current_time()
            task = await trio.to_thread.run_sync(self._submit)
            self._say(f"Task {task}: {contents.files} files, {contents.bytes / MIB:.0f} MiB, alpha → beta.")
            await self._follow(task, contents.bytes)
            self._outcome.seconds = trio.current_time() - started
        self._take_report(report)
        self._say("Comparing both trees …")
        comparison = await trio.to_thread.run_sync(compare_trees, source, destination)
        self._outcome.comparison = comparison
        self._outcome.problems += comparison.differences
        allowed = len(self._outcome.kills) * AGAIN_FOR_EACH_KILL
        if self._outcome.sent_again > allowed:
            self._outcome.problems.append(f"{self._outcome.sent_again} bytes were sent again, more than {allowed}.")
        return self._outcome

    def _relay(self) -> Relay:
        world = self._world
        return Relay(
            Profile(
                relay_url=world.relay_url,
                ca_file=str(world.ca_file),
                client_id=world.client_id,
                client_secret=world.client_secret,
            ),
            http_timeout=10,
        )

    def _submit(self) -> str:
        from globus_sdk import TransferData

        world = self._world
        data = TransferData(
            source_endpoint=world.alpha.collection_id,
            destination_endpoint=world.beta.collection_id,
            label="towpath demo",
            verify_checksum=True,
            preserve_timestamp=True,
            additional_fields={"recursive_symlinks": "keep"},
        )
        data.add_item(f"/{TREE}", f"/{COPY}", recursive=True)
        with self._relay() as relay:
            return str(relay.transfer.submit_transfer(data)["task_id"])

    # --- watching and killing --------------------------------------------------------------------------

    async def _follow(self, task: str, total: int) -> None:
        kills = list(KILLS)
        with trio.move_on_after(TIME_LIMIT) as scope:
            while True:
                row = await self._row(task)
                if row is not None:
                    done = row["counters"]["bytes_transferred"]
                    self._show(done, total)
                    self._outcome.sent_again = row["counters"]["bytes_sent_again"]
                    if kills and done >= kills[0][0] * total:
                        await self._kill(kills.pop(0)[1])
                    if row["state"] in ("SUCCEEDED", "FAILED", "CANCELED"):
                        break
                await trio.sleep(0.05)
            await self._settled_at_relay(task)
        if scope.cancelled_caught:
            self._outcome.problems.append(f"The task did not finish within {TIME_LIMIT:.0f} s.")
        for _, name in kills:
            self._outcome.problems.append(f"The transfer was over before {name} could be killed.")

    async def _row(self, task: str) -> dict[str, Any] | None:
        status = await status_of(self._world.beta)
        rows = [] if status is None else [row for row in status["tasks"] if row["task_id"] == task]
        return rows[0] if rows else None

    async def _kill(self, name: str) -> None:
        world = self._world
        child: Child = {"beta": world.beta.child, "alpha": world.alpha.child, "relay": world.relay}[name]
        self._say(f"SIGKILL to {name} (process {child.pid}), and starting it again.")
        await child.kill()
        await trio.sleep(0.3)
        await child.start()
        self._outcome.kills.append(name)

    async def _settled_at_relay(self, task: str) -> None:
        """Wait until the relay says that the task succeeded: that is what its user sees."""
        while True:
            document = await trio.to_thread.run_sync(self._task_document, task)
            if document is not None and document["status"] not in ("ACTIVE", "INACTIVE"):
                break
            await trio.sleep(0.2)
        if document["status"] != "SUCCEEDED":
            self._outcome.problems.append(f"The task ended as {document['status']}: {document.get('fatal_error')}")

    def _task_document(self, task: str) -> dict[str, Any] | None:
        from globus_sdk import GlobusError

        try:
            with self._relay() as relay:
                return dict(relay.transfer.get_task(task).data)
        except GlobusError:
            # The relay is just coming back.
            return None

    def _take_report(self, report: dict[str, Any]) -> None:
        self._outcome.looks = report["looks"]
        self._outcome.problems += report["wrong"]


@asynccontextmanager
async def _watching(source: Path, destination: Path) -> AsyncIterator[dict[str, Any]]:
    """A process that looks at the destination all the time; its report is filled in at the end of the block."""
    report: dict[str, Any] = {}
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "agent.demo.watcher", str(source), str(destination)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield report
        await process.stdin.aclose()
        text = b""
        async for chunk in process.stdout:
            text += chunk
        if await process.wait() != 0:
            raise ChildFailed("The watcher failed.")
        report.update(json.loads(text))
    finally:
        with trio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
                await process.wait()
