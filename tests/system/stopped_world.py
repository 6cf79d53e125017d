"""A relay and two agents as real processes, any of which can be killed when one of them is at a named step.

`stops/sitecustomize.py` halts a process at a step; here is the other end: arm a step, wait until somebody stands there,
kill whom the test names, let the others go on, start again what was killed, and look at everything.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from globus_sdk import GlobusError, TransferData

from agent import local_socket
from agent.cli.relay_client import Relay, document_of
from agent.demo.children import Child, warden
from agent.demo.world import AGENTS, World, open_world
from agent.transfer.processes.spawn import usable_processors
from tests.agent.engine_inside import contents

STOPS = Path(__file__).with_name("stops")
MIB = 1024 * 1024
# What one kill may cost, as promised.
MOST_AGAIN = 64 * MIB
# Nobody waits longer than this for anything (seconds); a machine under load is slow.
PATIENCE = 60.0
# How long after the end of its task an event may arrive (seconds).
EVENTS_LATE = 10.0
# Lane processes of a session at the destination that is sent a tree: as agents have it by themselves, unless the
# environment says another number.
LANE_PROCESSES = int(os.environ.get("LANE_PROCESSES", "1" if usable_processors() > 1 else "0"))


def fill(root: Path, large: int) -> dict[str, bytes | str]:
    """Small files in folders, a link, and one large file of so many bytes."""
    for folder in ("a", "b/c"):
        (root / folder).mkdir(parents=True)
        for number in range(20):
            (root / folder / f"file-{number}").write_bytes(os.urandom(number * 1500))
    (root / "b" / "link").symlink_to("c/file-3")
    with (root / "large").open("wb") as file:
        for start in range(0, large, MIB):
            file.write(os.urandom(min(MIB, large - start)))
    return contents(root)


@dataclass(frozen=True)
class Step:
    """Who is to stop where, and at which time it comes there."""

    actor: str
    name: str
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.actor} at “{self.name}” ({self.nth})"


@dataclass
class Outcome:
    """What a kill did."""

    step: Step
    victims: str
    reached: bool
    killed: int = 0
    again: int = 0
    # Seconds from the restart of what was killed to the first byte or name; None where nothing was left to do.
    resumed: float | None = None
    codes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        resumed = "nothing left to do" if self.resumed is None else f"resumed after {self.resumed:.2f} s"
        return f"{self.step}, killed {self.victims}: {self.again} bytes again, {resumed}, {self.codes}"


class StoppedWorld:
    """See the module."""

    def __init__(self, world: World, stops: Path) -> None:
        self.world = world
        self.stops = stops
        self.source = world.sites["alpha"].root
        self.destination = world.sites["beta"].root

    def clear(self) -> None:
        """Make room: remove what was transferred."""
        for path in self.destination.iterdir():
            shutil.rmtree(path)

    # --- processes -------------------------------------------------------------------------------------

    def child(self, name: str) -> Child:
        return self.world.relay if name == "relay" else self.world.sites[name].child

    def workers(self, agent: str) -> list[int]:
        """Workers of an agent, one that waits for work as well: its own children and those of its fork server."""
        return _named("agent.transfer.worker", [self.child(agent).pid, *self.fork_servers(agent)])

    def fork_servers(self, agent: str) -> list[int]:
        """The process that forks an agent's workers, if there is one."""
        return _named("agent.transfer.fork_server", [self.child(agent).pid])

    def lane_processes(self, agent: str) -> list[int]:
        """Those of the workers that have some; a spare worker has none."""
        found = []
        for worker in self.workers(agent):
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(worker).children()
                found += [child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE]
        return found

    async def kill(self, victims: str) -> tuple[int, list[Child]]:
        """SIGKILL; how many processes, and what must be started again. ``victims``: an agent's name or "relay" (that
        process alone, those below it end by themselves), "alpha's workers", "beta's workers", "beta's lane processes",
        "alpha's fork server", "beta's fork server", or "all"."""
        if victims == "all":
            doomed: list[int] = []
            for child in self.world.children:
                below = psutil.Process(child.pid).children(recursive=True)
                doomed += [child.pid, *(process.pid for process in below)]
            for pid in doomed:
                _kill(pid)
            return len(doomed), list(self.world.children)
        agent, _, kind = victims.partition("'s ")
        if kind:
            below = {"workers": self.workers, "lane processes": self.lane_processes, "fork server": self.fork_servers}
            pids = below[kind](agent)
            for pid in pids:
                _kill(pid)
            return len(pids), []
        child = self.child(victims)
        _kill(child.pid)
        return 1, [child]

    # --- one kill --------------------------------------------------------------------------------------

    async def cell(self, step: Step, victims: str, tree: str, expected: dict[str, bytes | str]) -> Outcome:
        """Transfer ``tree``, kill ``victims`` at the step, start them again, and see the task to its end."""
        place = f"{tree}-{uuid.uuid4().hex[:8]}"
        outcome = Outcome(step, victims, reached=False)
        self._forget_moves()
        for name in ("armed", "reached"):
            (self.stops / name).unlink(missing_ok=True)
        armed = {"id": uuid.uuid4().hex, "actor": step.actor, "step": step.name, "nth": step.nth}
        (self.stops / "draft").write_text(json.dumps(armed))
        (self.stops / "draft").rename(self.stops / "armed")
        async with trio.open_nursery() as nursery:
            submitted: list[str] = []
            nursery.start_soon(self._submit_into, tree, place, submitted)
            with trio.fail_after(PATIENCE):
                while not (stopped := self._stopped()) and not (submitted and await self._ended(submitted[0])):
                    await trio.sleep(0.02)
            (self.stops / "armed").unlink()
            if stopped:
                outcome.reached = True
                self.check_names(place, expected)
                outcome.killed, again = await self.kill(victims)
                self.check_names(place, expected)
                before = self._moves()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(stopped["pid"], signal.SIGCONT)
                for child in again:
                    assert child.process is not None
                    await child.process.wait()
                restarted = time.time()
                if victims in ("alpha", "alpha's workers"):
                    # The destination's worker lives; what comes to it from now on counts.
                    self._forget_moves()
                    before = {}
                for child in again:
                    await child.start()
        (task_id,) = submitted
        document = await self.until_ended(task_id)
        assert document["status"] == "SUCCEEDED", (str(outcome), document)
        assert contents(self.destination / place) == expected, str(outcome)
        if stopped and victims != "relay":
            # Workers that lost their daemon may go on for a moment; what counts is what follows them.
            moves = [moment for pid, moment in self._moves().items() if pid not in before]
            outcome.resumed = min(moves) - restarted if moves else None
        outcome.again = self._sent_again(task_id, document)
        assert outcome.again <= MOST_AGAIN, str(outcome)
        with trio.move_on_after(EVENTS_LATE):
            # A relay that was away may hear of the end from the agent before it has read the lines about the rest.
            while not {"STARTED", "SUCCEEDED"} <= set(outcome.codes):
                outcome.codes = await self.codes(task_id)
        for once in ("STARTED", "SUCCEEDED"):
            assert outcome.codes.count(once) == 1, str(outcome)
        return outcome

    def _stopped(self) -> dict[str, Any] | None:
        try:
            noted: dict[str, Any] = json.loads((self.stops / "reached").read_text())
        except (OSError, ValueError):
            return None
        # It has said so; now it stops.
        return noted if psutil.Process(noted["pid"]).status() == psutil.STATUS_STOPPED else None

    def _moves(self) -> dict[int, float]:
        """When the first content came to each process."""
        notes = [json.loads(path.read_text()) for path in self.stops.glob("moved-*")]
        return {note["pid"]: note["time"] for note in notes}

    def _forget_moves(self) -> None:
        for path in self.stops.glob("moved-*"):
            path.unlink()

    def check_names(self, place: str, expected: dict[str, bytes | str]) -> None:
        """Whatever has a final name now is whole and right."""
        for name, content in contents(self.destination / place, temporaries=False).items():
            assert content == expected[name], name

    def _sent_again(self, task_id: str, document: dict[str, Any]) -> int:
        """Bytes that came over the lanes more than once: what the workers counted as they took it from the network
        (it survives kills), less what there is to transfer."""
        counted = (self.world.sites["beta"].state_dir / "tasks" / task_id / "received").read_bytes()
        return max(0, int.from_bytes(counted, "little") - int(document["bytes_transferred"]))

    def slow(self, seconds: float) -> None:
        """Let sources need this long for each block from now on."""
        (self.stops / "slow.draft").write_text(str(seconds))
        (self.stops / "slow.draft").rename(self.stops / "slow")

    async def begin_slowly(self, size: int) -> tuple[str, dict[str, bytes | str]]:
        """Begin to move a tree with a large file of ``size`` bytes, so slowly that it is under way for long: the
        task, something of which has arrived, and what ``place`` is to hold in the end."""
        (self.source / "tree").mkdir()
        expected = fill(self.source / "tree", size)
        self.slow(0.3)
        task_id = await self.submit("tree", "place")
        with trio.fail_after(60):
            while not await self.known_to_beta(task_id):
                await trio.sleep(0.05)
        return task_id, expected

    async def end_well(self, task_id: str, expected: dict[str, bytes | str]) -> list[str]:
        """Let it go on quickly; the codes of the events of a task that was one to its end, with all its content."""
        self.slow(0.0)
        assert (await self.until_ended(task_id))["status"] == "SUCCEEDED"
        codes = await self.codes(task_id)
        assert contents(self.destination / "place") == expected
        assert (codes.count("STARTED"), codes.count("SUCCEEDED")) == (1, 1)
        return codes

    async def known_to_beta(self, task_id: str) -> int:
        """Bytes done by beta's own account, whether or not there is a relay."""
        state_dir = self.world.sites["beta"].state_dir
        status = await trio.to_thread.run_sync(local_socket.ask, state_dir, "GET", "/status")
        return max(
            (int(row["counters"]["bytes_transferred"]) for row in status["tasks"] if row["task_id"] == task_id),
            default=0,
        )

    # --- the relay -------------------------------------------------------------------------------------

    async def _submit_into(self, tree: str, place: str, submitted: list[str]) -> None:
        submitted.append(await self.submit(tree, place))

    async def submit(self, tree: str, place: str) -> str:
        """Have a folder of alpha's transferred to beta; the task's id."""
        data = TransferData(
            *(self.world.sites[name].collection_id for name in AGENTS),
            verify_checksum=True,
            preserve_timestamp=True,
            additional_fields={"recursive_symlinks": "keep", "submission_id": str(uuid.uuid4())},
        )
        data.add_item(f"/{tree}/", f"/{place}/", recursive=True)
        answer = await self.ask(lambda relay: document_of(relay.transfer.submit_transfer(data)))
        return str(answer["task_id"])

    async def show(self, task_id: str) -> dict[str, Any]:
        """The task's document."""
        document: dict[str, Any] = await self.ask(lambda relay: document_of(relay.transfer.get_task(task_id)))
        return document

    async def ask(self, question: Any) -> Any:
        """The relay's answer; one that is away or stands still is asked again."""
        with trio.fail_after(PATIENCE):
            while True:
                try:
                    return await self.world.call(question)
                except GlobusError:
                    await trio.sleep(0.1)

    async def _ended(self, task_id: str) -> bool:
        # While the relay stands still nobody waits for its answer here.
        with trio.move_on_after(1.0):
            return bool((await self.show(task_id))["status"] != "ACTIVE")
        return False

    async def until_ended(self, task_id: str) -> dict[str, Any]:
        """The task's document at its end."""
        with trio.fail_after(2 * PATIENCE):
            while True:
                document = await self.show(task_id)
                if document["status"] != "ACTIVE":
                    return document
                await trio.sleep(0.05)

    async def codes(self, task_id: str) -> list[str]:
        """Codes of the task's events, oldest first."""

        def question(relay: Relay) -> list[str]:
            return [str(event["code"]) for event in relay.transfer.task_event_list(task_id, limit=1000)]

        codes: list[str] = await self.ask(question)
        return codes[::-1]


def _named(module: str, parents: list[int]) -> list[int]:
    """Those children that run a module and have not ended."""
    found = []
    for parent in parents:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(parent).children():
                with contextlib.suppress(psutil.Error):
                    if module in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                        found.append(child.pid)
    return found


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@asynccontextmanager
async def stopped_world(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    lane_processes: int | None = LANE_PROCESSES if "LANE_PROCESSES" in os.environ else None,
) -> AsyncIterator[StoppedWorld]:
    """A world whose processes know the steps. With LANE_PROCESSES=2 (or 0) in the environment, or
    ``lane_processes``, its destination receives with so many lane processes."""
    stops = directory / "stops"
    stops.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(STOPS), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("STOPS_DIRECTORY", str(stops))
    roots = {name: directory / "roots" / name for name in AGENTS}
    for root in roots.values():
        root.mkdir(parents=True)
    async with warden() as guard, open_world(directory, roots, guard, print) as world:
        if lane_processes is not None:
            beta = world.sites["beta"]
            with beta.config_file.open("a", encoding="utf-8") as file:
                file.write(f"limits:\n  workers_per_session: {1 + lane_processes}\n")
            await beta.child.stop()
            await beta.child.start()
            await world.until_connected("beta")
        yield StoppedWorld(world, stops)
