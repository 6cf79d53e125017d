"""The processes of the demonstration: started, killed, started again, and in the end all gone.

Each child leads a process group of its own, so that a key press in the terminal does not reach it and its workers
can be ended with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import trio

GRACE_SECONDS = 10.0
LOG_TAIL = 30


class ChildFailed(Exception):
    """A process of the demonstration did not do what it had to; the text ends with its last log lines."""


def leaves(group: BaseExceptionGroup[Exception]) -> list[Exception]:
    """The exceptions in a group and in the groups inside it, in their order."""
    found: list[Exception] = []
    for one in group.exceptions:
        found += leaves(one) if isinstance(one, BaseExceptionGroup) else [one]
    return found


class Warden:
    """The process that ends our children should we be killed; see `agent.demo.warden`."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        self._lines = process.stdin
        self._turn = trio.Lock()

    async def guard(self, group: int) -> None:
        """Put a process group under guard."""
        async with self._turn:
            await self._lines.send_all(b"+%d\n" % group)

    async def release(self, group: int) -> None:
        """The group has ended; its number may soon be somebody else's."""
        async with self._turn:
            await self._lines.send_all(b"-%d\n" % group)


@asynccontextmanager
async def warden() -> AsyncIterator[Warden]:
    """A warden for the time of the block."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "agent.demo.warden"], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield Warden(process)
    finally:
        with trio.CancelScope(shield=True):
            if process.stdin is not None:
                await process.stdin.aclose()
            await process.wait()


@dataclass
class Child:
    """One long-running process. ``start`` may be called again after ``kill`` or ``stop``."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log_file: Path
    warden: Warden
    process: trio.Process | None = field(default=None, init=False)
    _groups: list[int] = field(default_factory=list, init=False)

    @property
    def pid(self) -> int:
        """The process id, or 0 when it does not run."""
        return self.process.pid if self.process is not None and self.process.returncode is None else 0

    async def start(self) -> None:
        """Start the process; its output is appended to the log file."""
        with self.log_file.open("ab") as log:
            self.process = await trio.lowlevel.open_process(
                list(self.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(self.environment),
                start_new_session=True,
            )
        self._groups.append(self.process.pid)
        await self.warden.guard(self.process.pid)

    async def kill(self) -> None:
        """SIGKILL to the process and all its workers at once, so that nobody settles anything."""
        if self.process is None:
            return
        # The head first, so that it starts no further worker in between.
        doomed = descendants_of(self.process.pid)
        self.process.kill()
        for pid in doomed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await self.process.wait()

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL to whatever is left after a while. Returns when nothing is left."""
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()
            with trio.move_on_after(GRACE_SECONDS):
                await self.process.wait()
        for group in self._groups:
            await self.warden.release(group)
            # The group's number is only ours as long as one of its members lives.
            if members_of(group):
                with suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
        if self.process is not None:
            await self.process.wait()
        self._groups.clear()

    def raise_if_ended(self) -> None:
        """Raise `ChildFailed` when the process has ended by itself."""
        if self.process is not None and self.process.returncode is not None:
            raise ChildFailed(f"{self.name} ended with {self.process.returncode}.\n{self.log_tail()}")

    def log_tail(self) -> str:
        """The last lines of its log."""
        try:
            lines = self.log_file.read_text("utf-8", "backslashreplace").splitlines()
        except FileNotFoundError:
            return ""
        return "\n".join(f"  {self.name}| {line}" for line in lines[-LOG_TAIL:])


def descendants_of(pid: int) -> list[int]:
    """All living processes below a process."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def members_of(group: int) -> list[int]:
    """The living processes of a process group (a session, as all children lead one)."""
    members = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
    return members


async def run_tool(command: Sequence[str], environment: Mapping[str, str], *, seconds: float = 60.0) -> str:
    """Run a short command and return what it printed. Raises `ChildFailed` with its complaint."""
    name = Path(command[0]).name
    with trio.move_on_after(seconds):
        result = await trio.run_process(
            list(command), capture_stdout=True, capture_stderr=True, check=False, env=dict(environment)
        )
        if result.returncode != 0:
            complaint = (result.stderr or result.stdout).decode("utf-8", "backslashreplace").strip()
            raise ChildFailed(f"{name} {command[1] if len(command) > 1 else ''} failed: {complaint}")
        return result.stdout.decode("utf-8", "backslashreplace")
    raise ChildFailed(f"{name} did not end within {seconds:.0f} s.")
