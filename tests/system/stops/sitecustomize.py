"""Stops a real process of the product at a named step, so that a test can kill it, or others, exactly there.

Python loads this by itself in every process whose ``PYTHONPATH`` names this folder (see the standard module `site`);
the product knows nothing of it. Without the variable ``STOPS_DIRECTORY`` nothing happens. With it the functions below
are wrapped: whoever has just done a step looks whether the file ``armed`` in that directory names the step, and the
actor it is. If so the process makes the file ``reached`` and stops (SIGSTOP) before the next instruction. A number in
the file ``slow`` makes sources slow.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

DIRECTORY = Path(os.environ.get("STOPS_DIRECTORY", "."))

# What each kind of process does, step by step: (name of the step, module, function). A step is reached when the
# function has returned; one that is there twice, when either has. A lane process counts as the worker it belongs to.
STEPS: dict[str, list[tuple[str, str, str]]] = {
    "worker": [
        # The destination's.
        ("session opened", "agent.transfer.asking.source_session", "SourceSession._welcome"),
        ("folders planned", "agent.transfer.books.journal", "Journal.add_directories"),
        ("folder made", "agent.storage.posix", "PosixDirectory.mkdir"),
        ("block received", "agent.transfer.receiving.receive", "LaneReceiver._block"),
        ("pack received", "agent.transfer.receiving.receive", "LaneReceiver._pack"),
        # The same where a lane process receives.
        ("block received", "agent.transfer.lane_processes.lane_writing", "Writing.block"),
        ("pack received", "agent.transfer.lane_processes.lane_writing", "PackWriting.write"),
        ("written", "agent.storage.handed", "Handed.pwrite"),
        ("pack written", "agent.transfer.lane_processes.lane_writing", "PackWriting.answer"),
        ("files read back", "agent.transfer.lane_processes.held_files", "HeldFiles.check"),
        ("temporary made", "agent.storage.posix", "PosixDirectory.create_temporary"),
        ("written", "agent.storage.base", "Root.pwrite"),
        ("pack written", "agent.transfer.settling.small_files", "SmallFiles.write"),
        ("synced", "agent.storage.posix", "PosixRoot.fsync"),
        ("all synced", "agent.storage.posix", "PosixDirectory.sync_disk"),
        ("block read back", "agent.transfer.settling.block_check", "BlockChecker._reads_back"),
        ("files read back", "agent.transfer.settling.small_files", "SmallFiles.read_back"),
        ("sealed", "agent.transfer.settling.block_check", "BlockChecker.seal"),
        ("renamed", "agent.storage.posix", "PosixDirectory.rename"),
        ("link made", "agent.storage.posix", "PosixDirectory.symlink"),
        ("folder synced", "agent.storage.posix", "PosixDirectory.sync"),
        ("manifest synced", "agent.transfer.books.manifest", "ManifestWriter.sync"),
        ("journal written", "agent.transfer.books.journal", "Journal.commit"),
        ("event told", "agent.transfer.daemon_line", "DaemonLine.post"),
        ("times set", "agent.storage.posix", "PosixDirectory.set_times"),
        ("end written", "agent.transfer.task_runner", "TaskRunner._final"),
        ("end told", "agent.transfer.daemon_line", "DaemonLine.finish"),
        # The source's.
        ("session accepted", "agent.transfer.source.source_policy", "SourcePolicy.accept"),
        ("lane joined", "agent.transfer.source.send", "LaneSender._introduction"),
        ("folder listed", "agent.transfer.source.serve", "Control._send_rows"),
        ("file read", "agent.transfer.source.send", "LaneSender._whole_file"),
        ("block read", "agent.transfer.source.send", "LaneSender._read_block"),
        ("pack sent", "agent.transfer.source.send", "LaneSender._send_pack"),
        ("range sent", "agent.transfer.source.send", "LaneSender._range"),
    ],
    "daemon": [
        ("order stored", "agent.transfer.tasks.task_store", "TaskStore.put_order"),
        ("path found", "agent.transfer.tasks.worker_connections", "_found"),
        ("event stored", "agent.transfer.tasks.task_store", "TaskStore.add_event"),
        ("end seen", "agent.transfer.tasks.running_task", "RunningTask._handle"),
        ("lines acknowledged", "agent.transfer.tasks.service", "TransferService.acknowledge"),
        ("session stored", "agent.transfer.tasks.task_store", "TaskStore.put_session"),
        ("connection handed over", "agent.transfer.tasks.served_session", "ServedSessions.deliver"),
    ],
    "relay": [
        ("submission written, not committed", "relay.transfer.task_turns", "accept"),
        ("submission stored", "relay.transfer.steward", "Steward.wake"),
        ("sending noted", "relay.transfer.delivery_notes", "mark_attempted"),
        ("source asked", "relay.transfer.delivery", "Courier._ask_source"),
        ("order sent", "relay.transfer.delivery", "Courier._send_order"),
        ("lines written, not committed", "relay.transfer.task_reports", "apply_lines"),
        ("lines stored", "relay.transfer.steward", "Steward._take_lines"),
        ("acknowledged", "relay.transfer.steward", "Steward._acknowledge"),
        ("end written, not committed", "relay.transfer.task_turns", "finish"),
    ],
}
# What shows that a task moves (again): content arrives, or, where nothing was missing, the end is told.
MOVES = {"block received", "pack received", "end told"}
SLOW_STEP = "block read"


class Stops:
    """The steps of this process."""

    def __init__(self, actor: str) -> None:
        self.actor = actor
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._pace = threading.Lock()

    def done(self, step: str) -> None:
        """A step is done: stop here, if that is wanted."""
        if step in MOVES:
            self._note(f"moved-{os.getpid()}")
        if step == SLOW_STEP:
            self._go_slowly()
        try:
            armed = json.loads((DIRECTORY / "armed").read_bytes())
        except (OSError, ValueError):
            return
        if (armed["actor"], armed["step"]) != (self.actor, step):
            return
        with self._lock:
            self._counts[armed["id"], step] += 1
            if self._counts[armed["id"], step] != armed["nth"]:
                return
        if self._note("reached"):
            # To this thread, which does nothing more then; all others stop with it.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

    def _go_slowly(self) -> None:
        """While the file ``slow`` says so, a source reads one block in so many seconds, on all its lanes together."""
        with contextlib.suppress(OSError, ValueError), self._pace:
            time.sleep(float((DIRECTORY / "slow").read_text()))

    def _note(self, name: str) -> bool:
        """Make a file, whole at once; whether it was not there before."""
        if (DIRECTORY / name).exists():
            return False
        draft = DIRECTORY / f".{name}.{os.getpid()}.{threading.get_ident()}"
        draft.write_text(json.dumps({"pid": os.getpid(), "actor": self.actor, "time": time.time()}))
        try:
            os.link(draft, DIRECTORY / name)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def wrap(self, step: str, module: str, function: str) -> None:
        """Have a function of the product say that its step is done."""
        owner: Any = importlib.import_module(module)
        *outer, name = function.split(".")
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, name, self._wrapped(step, getattr(owner, name)))

    def _wrapped(self, step: str, inner: Any) -> Any:
        if inspect.iscoroutinefunction(inner):

            @functools.wraps(inner)
            async def waited(*arguments: Any, **named: Any) -> Any:
                result = await inner(*arguments, **named)
                self.done(step)
                return result

            return waited

        @functools.wraps(inner)
        def called(*arguments: Any, **named: Any) -> Any:
            result = inner(*arguments, **named)
            self.done(step)
            return result

        return called


def _role() -> tuple[str, str]:
    """Kind of this process and whose it is: ``("worker", "beta's worker")``."""
    words = sys.orig_argv
    # What a fork server forks has its steps.
    if "agent.transfer.worker" in words or "agent.transfer.fork_server" in words:
        return "worker", os.environ.get("STOPS_AGENT", "") + "'s worker"
    if "--config" in words:
        config = Path(words[words.index("--config") + 1])
        if "run" in words and config.name == "agent.yaml":
            # The folder of an agent is named after it; its workers inherit the name.
            os.environ["STOPS_AGENT"] = config.parent.name
            return "daemon", config.parent.name
        if "serve" in words and config.name == "relay.yaml":
            return "relay", "relay"
    return "", ""


def _install() -> None:
    kind, actor = _role()
    if kind == "daemon":
        # Its fork server, or its first worker, is forked from it; what is forked from that has these steps then.
        daemon = os.getpid()
        os.register_at_fork(
            after_in_child=lambda: _wrap("worker", f"{actor}'s worker") if os.getppid() == daemon else None
        )
    _wrap(kind, actor)


def _wrap(kind: str, actor: str) -> None:
    stops = Stops(actor)
    for step, module, function in STEPS.get(kind, ()):
        stops.wrap(step, module, function)


if "STOPS_DIRECTORY" in os.environ:
    _install()
