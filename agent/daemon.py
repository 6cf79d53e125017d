"""The agent's daemon: puts what relay and owner speak to beside the part that moves data, and runs it until told to
end. Composition only."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import msgspec
import trio

from agent import local_socket, logs, process
from agent.availability import Availability
from agent.config.keys import ConfigError
from agent.config.layers import load_config, overlay_file, waiting_for_start
from agent.config.watch import changes
from agent.connect.portmap import PortMapping
from agent.data_side import DRAINS, PAUSED_FILE, DataSide
from agent.identity_file import Identity
from agent.link import Link
from agent.link_app import LinkApp
from agent.local_app import LocalApplication, local_app
from agent.local_gate import LOOPBACK_FILE, Loopback, listen_on_loopback
from agent.local_server import serve_local
from agent.lock import RENEW_EVERY, InstanceLock
from agent.manners import Manners
from agent.meter.exposition import AgentNumbers, exposition
from agent.meter.publish import Publisher
from agent.policy import Pause
from agent.sdnotify import Notifier
from agent.system.processes import ENDING, RELOADING
from agent.update.service import UpdateService
from agent.watch.service import WatchService
from agent.watch.submitter import CommandSubmitter
from protocol.control import ARRANGED, MEETS, TUNNELLED, RelayHello
from protocol.errors import RetryLater
from protocol.link import HelloFields
from protocol.private_file import write_private_file

logger = logging.getLogger("towpath.agent")

# Seconds after the wish to stop: tasks have had their time; the process ends whatever still hangs. All that was
# promised to anybody is on disk at any moment.
SETTLE_TIME = 3.5
LAST_RESORT = 4.8
# Seconds between two words to the service manager.
STATUS_EVERY = 10.0
# Seconds that `status` gives the collections to show themselves; after that it tells what was seen last.
STATUS_PATIENCE = 2.0


class Daemon:
    """One running agent. `run` returns after a clean end."""

    def __init__(
        self,
        config_file: Path,
        data: DataSide,
        identity: Identity,
        lock: InstanceLock,
        flags: Mapping[str, str],
        log_file: Path | None,
    ) -> None:
        self._config_file = config_file
        self._flags = flags
        self._log_file = log_file
        # What runs now, and what was read last; they differ in what waits for the next start.
        self._config = data.config
        self._read = data.config
        self._config_problem = ""
        self._identity = identity
        self._lock = lock
        self._boot = str(uuid.uuid4())
        self._started = time.time()
        self._stop = trio.Event()
        self._data = data
        self._policy = data.policy
        self._tasks = data.tasks
        self._network = data.network
        self._port_mapping = PortMapping(data.network)
        self._availability = Availability(data.policy, data.collections, data.tasks.announce_collections)
        config = data.config
        self._watch = WatchService(config.state_dir, config.watch, data.policy, data.collections, CommandSubmitter())
        self._update = UpdateService(config, config_file, identity.node_id, data.relay_url, data.moves_data)
        self._publisher = Publisher(lambda: self._read.metrics, self._metrics)
        self._manners = Manners(lambda: self._read.manners, self._hold_back)
        self._link = Link(
            data.relay_url,
            data.authority,
            data.key,
            identity.node_id,
            identity.endpoint_id,
            identity.relay_id,
            identity.relay_root,
            LinkApp(
                data.policy, data.collections, data.tasks, self._availability.look, self._availability.relay_lacks
            ).application(),
            self._hello,
            dial=data.dialer.dial,
            way=data.way,
            is_proxied=lambda: data.network.relay is None,
            on_hello=self._take_hello,
            on_silence=data.network.announce_change,
        )
        data.network.relay_up = lambda: self._link.statistics().connected

    def _take_hello(self, hello: RelayHello) -> None:
        self._network.take_hello(hello)
        self._availability.is_linked_anew()
        if self._data.way.known == "websocket":
            # A tunnel will want it, and then without waiting for a process to start.
            self._data.carrier.want()

    def _hello(self) -> HelloFields:
        return HelloFields(
            version=version("towpath"),
            collections=tuple(self._availability.reports()),
            boot_id=self._boot,
            paused=self._policy.paused,
            last_event=self._tasks.last_event(),
            tasks=len(self._tasks.tasks()),
            abilities=self._abilities(),
            candidates=tuple(self._network.standing_candidates()),
        )

    def _abilities(self) -> tuple[str, ...]:
        tunnelled = (TUNNELLED,) if self._network.relay_policy != "never" else ()
        # Behind a proxy the relay cannot be shown a port.
        meets = (MEETS,) if self._network.relay is not None else ()
        return ARRANGED, *tunnelled, *meets

    # --- running ---------------------------------------------------------------------------------------

    async def run(self, notifier: Notifier) -> None:
        """Serve until `stop`, SIGTERM or SIGINT; running tasks are settled before this returns.

        Data moves already: `tasks.run` of the data side is running.
        """
        listener, path, loopback = await trio.to_thread.run_sync(self._listen_locally)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._watch_signals)
                nursery.start_soon(self._serve_local, listener, loopback)
                await self._availability.look()
                nursery.start_soon(self._availability.run)
                nursery.start_soon(self._link.run)
                if self._config.data.port_mapping and not self._is_local_only():
                    nursery.start_soon(self._port_mapping.run)
                nursery.start_soon(self._upkeep)
                nursery.start_soon(self._tell_service_manager, notifier)
                nursery.start_soon(self._watch_config)
                nursery.start_soon(self._watch.run)
                nursery.start_soon(self._update.run)
                nursery.start_soon(self._manners.run)
                nursery.start_soon(self._publisher.run)
                sentence = f"Serving {len(self._policy.collections)} collection(s) from port {self._tasks.port}."
                logger.info(sentence)
                notifier.ready(sentence)
                await self._stop.wait()
                notifier.stopping()
                await self._settle()
                nursery.cancel_scope.cancel()
        finally:
            local_socket.forget(self._config.state_dir, path)

    def _is_local_only(self) -> bool:
        """Whether the data port is meant for this machine alone."""
        data = self._config.data
        return data.allow_loopback or ipaddress.ip_address(data.listen).is_loopback

    async def _settle(self) -> None:
        logger.info("Stopping: running tasks are settled first.")
        last_resort = threading.Timer(LAST_RESORT, _end_now)
        last_resort.daemon = True
        last_resort.start()
        with trio.move_on_after(SETTLE_TIME):
            await self._tasks.checkpoint()

    async def _watch_signals(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.open_signal_receiver(*ENDING, *RELOADING) as signals:
            task_status.started()
            async for number in signals:
                if number in RELOADING:
                    await self._reload_if_good(asked=True)
                else:
                    self._stop.set()

    def _listen_locally(self) -> tuple[socket.socket, Path, Loopback | None]:
        state_dir = self._config.state_dir
        # Left by an agent that was killed on a system without Unix sockets.
        (state_dir / LOOPBACK_FILE).unlink(missing_ok=True)
        if hasattr(socket, "AF_UNIX"):
            return *local_socket.listen(state_dir), None
        listener, loopback = listen_on_loopback(state_dir)
        return listener, state_dir / LOOPBACK_FILE, loopback

    async def _serve_local(self, listener: socket.socket, loopback: Loopback | None) -> None:
        application = LocalApplication(self, self._tasks, self._policy, self._availability.owners_reports)
        await serve_local(listener, local_app(application), loopback)

    async def _upkeep(self) -> None:
        """Keep the lock's record fresh."""
        while True:
            await trio.sleep(RENEW_EVERY)
            try:
                await trio.to_thread.run_sync(self._lock.renew, time.time())
            except OSError as error:
                # The kernel's lock holds all the same.
                logger.warning("The lock's record could not be renewed: %s", error)

    async def _tell_service_manager(self, notifier: Notifier) -> None:
        """Say what the agent is doing, and that its loop turns: a loop that hangs is ended and started again."""
        interval = min(STATUS_EVERY, notifier.watchdog / 3) if notifier.watchdog else STATUS_EVERY
        said = ""
        while True:
            await trio.sleep(interval)
            notifier.alive()
            sentence = self._in_one_sentence()
            if sentence != said:
                notifier.status(sentence)
                said = sentence

    def _in_one_sentence(self) -> str:
        link = self._link.statistics()
        where = f"Linked to {link.relay_url}" if link.connected else f"Not linked ({link.last_error or 'connecting'})"
        active = sum(task.state == "ACTIVE" for task in self._tasks.tasks())
        paused = ", paused by its owner" if self._policy.paused else ""
        if self._policy.draining:
            paused = ", takes nothing new"
        return f"{where}{paused}; {active} of {len(self._tasks.tasks())} task(s) active."

    async def _watch_config(self) -> None:
        """Take changes of the configuration without being told."""
        async with contextlib.aclosing(changes([self._config_file, overlay_file(self._config_file)])) as changed:
            async for _ in changed:
                await self._reload_if_good()

    async def _reload_if_good(self, *, asked: bool = False) -> None:
        """``asked``: somebody waits for it to be told in the log, also when nothing has changed."""
        before = self._read
        try:
            told = await self.reload()
        except ConfigError as error:
            logger.error("The changed configuration is not used: %s", error.sentence)
            return
        if asked and self._read is before:
            logger.info(told)

    # --- for the owner ---------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """The document of `towpath status --format json`."""
        with trio.move_on_after(STATUS_PATIENCE):
            await self._availability.look()
        document: dict[str, Any] = {
            "running": True,
            "pid": os.getpid(),
            "version": version("towpath"),
            "started": self._started,
            "config_file": str(self._config_file),
            "config_problem": self._config_problem,
            "state_dir": str(self._config.state_dir),
            "endpoint_id": self._identity.endpoint_id,
            "node_id": self._identity.node_id,
            "owner": self._identity.owner,
            "held_back": self._policy.held_back,
            "update_available": self._update.available,
            "host": socket.gethostname(),
            "batch_job": process.batch_job(),
            "paused": self._policy.paused,
            "draining": self._policy.draining,
            "idle": self._tasks.idle,
            "drained": self._tasks.drained,
            "data_port": self._tasks.port,
            "link": asdict(self._link.statistics()),
            "network": {**self._network.statistics(), "port_mapping": self._port_mapping.sentence},
            "transfer": asdict(self._tasks.statistics()),
            "collections": self._availability.owners_reports(),
            "tasks": self._tasks.tasks(),
        }
        return cast("dict[str, Any]", msgspec.to_builtins(document))

    def _metrics(self) -> str:
        transfer, limits = self._tasks.statistics(), self._data.node.allotment.in_force()
        numbers = AgentNumbers(
            version=version("towpath"),
            linked=self._link.statistics().connected,
            paused=self._policy.paused,
            running=transfer.running,
            sessions=transfer.sessions,
            refused=transfer.refused,
            received=transfer.received,
            sent=transfer.sent,
            receive_limit=limits.receive,
            send_limit=limits.send,
        )
        return exposition(numbers, self._tasks.tasks())

    async def reload(self) -> str:
        """Read the configuration again; a sentence on what changed, which the log tells as well. Transfers go on.

        Raises `ConfigError`, and goes on with what it had.
        """
        load = functools.partial(load_config, self._config_file, flags=self._flags)
        try:
            config = await trio.to_thread.run_sync(load)
        except ConfigError as error:
            self._config_problem = error.sentence
            raise
        self._config_problem = ""
        later = waiting_for_start(self._config, config)
        rest = f" {', '.join(later)} will count from the next start on." if later else ""
        if config == self._read:
            # Whoever asks may have been overtaken by the watch of the files.
            return f"The configuration was read again: nothing has changed.{rest}"
        before, after = set(self._policy.collections), set(config.collections)
        if config.log != self._read.log:
            try:
                await trio.to_thread.run_sync(logs.configure, config.log, self._log_file)
            except OSError as error:
                # What was logged to before is logged to still.
                logger.warning("The log cannot be written as configured now: %s.", error.strerror or error)
        self._data.node.config = self._read = config
        self._data.node.allotment.changed()
        self._policy.replace(config.collections)
        self._watch.replace(config.watch)
        self._update.config = config
        await self._tasks.owner_changed({collection.id for collection in before ^ after})
        self._tasks.announce_collections(await self._availability.look())
        told = f"The configuration was read again: {len(config.collections)} collection(s).{rest}"
        logger.info(told)
        return told

    async def set_pause(self, pause: Pause) -> None:
        """Hold up all transfers, or those that have not begun, or let them go on; remembered over restarts. Raises
        `RetryLater`, with nothing changed, when that cannot be written down."""
        mark = self._config.state_dir / PAUSED_FILE
        change = (
            functools.partial(mark.unlink, missing_ok=True)
            if pause == "none"
            else functools.partial(write_private_file, mark, DRAINS if pause == "new" else b"")
        )
        try:
            await trio.to_thread.run_sync(change)
        except OSError as error:
            raise RetryLater(f"The pause could not be remembered: {error}.") from error
        self._policy.pause = pause
        await self._tasks.pause_changed()
        if self._policy.paused:
            # Sessions that others have with this machine as their source end; new ones are refused by the policy.
            await self._tasks.owner_changed({collection.id for collection in self._policy.collections})
        # The relay learns of it with the next hello.
        self._link.kick()

    async def _hold_back(self, reason: str) -> None:
        """Have everything on this machine wait for a reason of its own, or go on (empty)."""
        self._policy.held_back = reason
        await self._tasks.suspend(suspended=bool(reason))
        if reason:
            await self._tasks.owner_changed({collection.id for collection in self._policy.collections})

    async def accept_root(self, collection_id: str) -> None:
        """Take a collection's root, and what is mounted below it, as they are now. Raises `UnknownCollection`, or
        `RetryLater` when that cannot be written down."""
        config = self._policy.collection(collection_id)
        try:
            await trio.to_thread.run_sync(self._data.collections.accept, config, abandon_on_cancel=True)
        except OSError as error:
            raise RetryLater(f"The new root could not be remembered: {error}.") from error
        # What waits for the old one was told at its start what to wait for.
        await self._tasks.owner_changed({collection_id})
        self._tasks.announce_collections(await self._availability.look())

    def watch_status(self) -> list[dict[str, Any]]:
        """The watch rules and what they did."""
        return self._watch.status()

    def watch_now(self, name: str, *, retry: bool) -> bool:
        """Run a rule at once; False if there is no such rule."""
        return self._watch.look_now(name, retry=retry)

    def reconnect(self) -> None:
        """Connect to the relay at once."""
        self._link.kick()

    def stop(self) -> None:
        """End the agent."""
        self._stop.set()


def _end_now() -> None:
    logger.error("Something did not end in time; ending anyway. Nothing is lost, tasks go on at the next start.")
    os._exit(0)
