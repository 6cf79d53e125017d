"""The agent's daemon: puts the parts together and runs them until told to end. Composition only."""

from __future__ import annotations

import logging
import os
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import msgspec
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext

from agent import local_socket
from agent.collections import Collections, Marks, report_of
from agent.config import AgentConfig, ConfigError, load_config
from agent.identity_file import Identity, make_state_dir, require
from agent.link import Link
from agent.link_app import LinkApp
from agent.local_app import LocalApplication, local_app
from agent.lock import RENEW_EVERY, InstanceLock, held
from agent.policy import Policy
from agent.sdnotify import Notifier
from agent.transfer.service import TransferService
from protocol.control import CollectionReport, TaskObserved
from protocol.errors import RetryLater
from protocol.identity import NodeKey
from protocol.link import HelloFields
from protocol.ticket import TicketVerifier

logger = logging.getLogger("towpath.agent")

CONFIG_LOOK_EVERY = 1.0


class Daemon:
    """One running agent. `run` returns after a clean end."""

    def __init__(
        self, config_file: Path, config: AgentConfig, identity: Identity, key: NodeKey, lock: InstanceLock
    ) -> None:
        self._config_file = config_file
        self._config = config
        self._identity = identity
        self._lock = lock
        self._boot = str(uuid.uuid4())
        self._started = time.time()
        self._paused = False
        self._stop = trio.Event()
        self._policy = Policy(config.collections)
        self._collections = Collections(Marks(config.state_dir / "roots.json"))
        verifier = TicketVerifier(identity.relay_id, identity.relay_root)
        self._tasks = TransferService(
            config.state_dir,
            config,
            key,
            identity.node_id,
            identity.endpoint_id,
            verifier,
            self._policy,
            identity.relay_root,
        )
        ca = config.relay.ca_file
        self._link = Link(
            config.relay.url or identity.relay_url,
            ca.read_text() if ca is not None else None,
            key,
            identity.node_id,
            identity.endpoint_id,
            identity.relay_id,
            identity.relay_root,
            LinkApp(self._policy, self._collections, self._tasks).application(),
            self._hello,
        )

    def _hello(self) -> HelloFields:
        return HelloFields(
            version=version("towpath"),
            collections=tuple(report_of(config) for config in self._policy.collections),
            boot_id=self._boot,
            paused=self._paused,
            last_event=self._tasks.last_event(),
        )

    # --- running ---------------------------------------------------------------------------------------

    async def run(self, notifier: Notifier) -> None:
        """Serve until `stop`, SIGTERM or SIGINT; running tasks are settled before this returns."""
        listener, path = local_socket.listen(self._config.state_dir)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_signals)
                nursery.start_soon(self._serve_local, listener)
                await nursery.start(self._tasks.run)
                nursery.start_soon(self._link.run)
                nursery.start_soon(self._upkeep)
                sentence = f"Serving {len(self._policy.collections)} collection(s) from port {self._tasks.port}."
                logger.info(sentence)
                notifier.ready(sentence)
                await self._stop.wait()
                notifier.stopping()
                logger.info("Stopping: running tasks are settled first.")
                await self._tasks.checkpoint()
                nursery.cancel_scope.cancel()
        finally:
            local_socket.forget(self._config.state_dir, path)
            self._collections.close()

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                self._stop.set()

    async def _serve_local(self, listener: Any) -> None:
        application = LocalApplication(self, self._tasks, self._policy, self._reports)
        app = ASGIWrapper(cast("Any", local_app(application)))
        config = Config()
        config.errorlog = logger
        context = WorkerContext(None)
        listener.setblocking(False)

        async def serve(stream: trio.SocketStream) -> None:
            if not local_socket.is_allowed(local_socket.peer_user(cast("Any", stream.socket))):
                await stream.aclose()
                return
            await TCPServer(app, config, context, {}, cast("Any", stream)).run()

        await trio.serve_listeners(serve, [trio.SocketListener(trio.socket.from_stdlib_socket(listener))])

    async def _upkeep(self) -> None:
        """Keep the lock's record fresh and take changes of the configuration."""
        renewed = trio.current_time()
        seen = _stamp(self._config_file)
        while True:
            await trio.sleep(CONFIG_LOOK_EVERY)
            if trio.current_time() - renewed >= RENEW_EVERY:
                renewed = trio.current_time()
                self._lock.renew(time.time())
            stamp = _stamp(self._config_file)
            if stamp != seen:
                seen = stamp
                try:
                    logger.info(await self.reload())
                except ConfigError as error:
                    logger.error("The changed configuration is not used: %s", error.sentence)  # noqa: TRY400

    # --- for the owner ---------------------------------------------------------------------------------

    def _reports(self) -> list[CollectionReport]:
        return [self._collections.report(row) for row in self._policy.collections]

    def status(self) -> dict[str, Any]:
        """The document of `towpath status --format json`."""
        link = asdict(self._link.statistics())
        return {
            "pid": os.getpid(),
            "version": version("towpath"),
            "started": self._started,
            "config_file": str(self._config_file),
            "state_dir": str(self._config.state_dir),
            "endpoint_id": self._identity.endpoint_id,
            "node_id": self._identity.node_id,
            "paused": self._paused,
            "data_port": self._tasks.port,
            "link": link,
            "collections": msgspec.to_builtins(self._reports()),
            "tasks": [_task_row(task) for task in self._tasks.tasks()],
        }

    async def reload(self) -> str:
        """Read the configuration again; collections change at once, the rest later. Raises `ConfigError`."""
        config = await trio.to_thread.run_sync(load_config, self._config_file)
        self._policy.replace(config.collections)
        self._tasks.announce_collections([report_of(row) for row in config.collections])
        # The relay learns of new collections with the next hello.
        self._link.kick()
        return f"The configuration was read again: {len(config.collections)} collection(s)."

    async def set_paused(self, paused: bool) -> None:
        """Hold up all transfers, or let them go on."""
        self._paused = paused
        for task in self._tasks.tasks():
            await (self._tasks.pause_task(task.task_id) if paused else self._tasks.resume_task(task.task_id))

    async def accept_root(self, collection_id: str) -> None:
        """Take a collection's root as it is now."""
        config = self._policy.collection(collection_id)
        try:
            await trio.to_thread.run_sync(self._collections.accept, config)
        except OSError as error:
            raise RetryLater(f"The new root could not be remembered: {error}.") from error

    def reconnect(self) -> None:
        """Connect to the relay at once."""
        self._link.kick()

    def stop(self) -> None:
        """End the agent."""
        self._stop.set()


def _task_row(task: TaskObserved) -> dict[str, Any]:
    return cast("dict[str, Any]", msgspec.to_builtins(task))


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)


def run(config_file: Path, *, on_config: Callable[[AgentConfig], None] | None = None) -> None:
    """Run the agent of a configuration in the foreground. Raises `TowpathError` when it cannot start."""
    config_file = config_file.absolute()
    config = load_config(config_file)
    make_state_dir(config.state_dir)
    notifier = Notifier.from_environment()
    with held(config.state_dir) as lock:
        identity, key = require(config.state_dir)
        if on_config is not None:
            on_config(config)
        trio.run(Daemon(config_file, config, identity, key, lock).run, notifier)
