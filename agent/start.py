"""Starts the agent: what moves data first, and everything else while it moves already.

Loading Python modules is most of a start. So what moves data is loaded first, once for the data side, with which tasks
go on, and for the fork server, which is forked from this process and forks the workers. Where the system has not what
that needs, a first worker is forked; and where that cannot be, it is started before anything is loaded, so that both
load at the same time. The rest of the daemon, for the relay and the owner, is loaded
when data moves, or when there is nothing to go on with.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from agent import logs, process
from agent.config.exposure import own_places
from agent.config.layers import load_config
from agent.identity_file import make_state_dir, require
from agent.lock import InstanceLock, held
from agent.sdnotify import Notifier
from agent.transfer.processes.spawn import FORK_SERVER, FORKS, Spawned, session_processes, spawn

if TYPE_CHECKING:
    from agent.daemon import Daemon


def run(config_file: Path, flags: Mapping[str, str] | None = None, log_file: Path | None = None) -> None:
    """Run the agent of a configuration in the foreground; ``flags`` are settings for this run only.

    Raises `TowpathError` or OSError when it cannot start.
    """
    # Nothing of what is loaded now is ever garbage; looking for some in it takes a tenth of the time.
    gc.disable()
    config_file = config_file.absolute()
    flags = flags or {}
    config = load_config(config_file, flags=flags)
    logs.configure(config.log, log_file)
    make_state_dir(config.state_dir)
    process.raise_file_limit()
    if config.profile == "login-node":
        process.step_back()
    # Out of the environment before any other process is started, which might speak for this one.
    notifier = Notifier.from_environment()
    processes = session_processes(config.limits.workers_per_session)
    with held(config.state_dir) as lock:
        first = spawn(processes) if config.limits.spare_worker and not FORKS else None

        import trio

        from agent.data_side import DataSide
        from protocol.threads import wait_for_threads

        if config.limits.spare_worker and first is None:
            # Where no process is to be had now, a task that needs one waits for it.
            with suppress(OSError):
                first = _forked(processes, lock)
        # Only now: workers read what strangers send, and have no need of this agent's key in their memory.
        try:
            identity, key = require(config.state_dir)
        except BaseException:
            if first is not None:
                first.sock.close()
            raise
        data = DataSide(config, identity, key, first, own_places(config, config_file))

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                await nursery.start(data.run)
                await data.tasks.first_moves()
                daemon = await trio.to_thread.run_sync(_daemon)
                await daemon(config_file, data, identity, lock, flags, log_file).run(notifier)
                nursery.cancel_scope.cancel()

        wait_for_threads()
        try:
            trio.run(main)
        except BaseExceptionGroup as group:
            # What keeps an agent from starting is for its user to read.
            raise _sole(group) from None


def _sole(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error of a group that holds no other, else the group."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup) and len(found.exceptions) == 1:
        found = found.exceptions[0]
    return group if isinstance(found, BaseExceptionGroup) else found


def _forked(processes: int, lock: InstanceLock) -> Spawned:
    """A fork server, or else a worker, that shares what is loaded by now."""
    from agent.transfer.fork_server import fork_fork_server
    from agent.transfer.worker import fork_worker

    gc.freeze()
    return (fork_fork_server if FORK_SERVER else fork_worker)(processes, lock.forget)


def _daemon() -> type[Daemon]:
    """Load the rest."""
    from agent.daemon import Daemon

    gc.freeze()
    gc.enable()
    return Daemon
