"""Hands out the agent's numbers to Prometheus: a file for its node exporter, or a port on this machine. Both are off
unless the owner wants them, and both may change while the agent runs."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import h11
import trio

from agent.config.keys import MetricsConfig

logger = logging.getLogger("towpath.metrics")

# How often (seconds) the file is written, and how often the configuration is looked at.
WRITE_EVERY, LOOK_EVERY = 15.0, 2.0
# A client has so long for its request and our answer.
PATIENCE = 10.0
MAX_REQUEST, MAX_CLIENTS = 16 * 1024, 8
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Text = Callable[[], str]


class Publisher:
    """Run `run`; ``text`` is asked for the numbers each time."""

    def __init__(self, config: Callable[[], MetricsConfig], text: Text) -> None:
        self._config = config
        self._text = text
        # Where the numbers can be read now, None while they cannot.
        self.port: int | None = None

    async def run(self) -> None:
        """Publish as configured until cancelled. Trouble with file or port is logged, and tried again."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep, lambda config: config.textfile, self._write)
            nursery.start_soon(self._keep, lambda config: config.port, self._serve)

    async def _keep(
        self, wanted: Callable[[MetricsConfig], object], work: Callable[[MetricsConfig], Awaitable[None]]
    ) -> None:
        while True:
            config = self._config()
            if wanted(config) is None:
                await trio.sleep(LOOK_EVERY)
                continue
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._until_changed, wanted, wanted(config), nursery.cancel_scope)
                try:
                    await work(config)
                except OSError as error:
                    logger.warning("The metrics cannot be published: %s", error)
                    await trio.sleep(WRITE_EVERY)
                nursery.cancel_scope.cancel()

    async def _until_changed(
        self, wanted: Callable[[MetricsConfig], object], before: object, scope: trio.CancelScope
    ) -> None:
        while True:
            await trio.sleep(LOOK_EVERY)
            if wanted(self._config()) != before:
                scope.cancel()
                return

    # --- the file ----------------------------------------------------------------------------------------

    async def _write(self, config: MetricsConfig) -> None:
        file = config.textfile
        assert file is not None  # or this would not run
        while True:
            await trio.to_thread.run_sync(_replace, file, self._text())
            await trio.sleep(WRITE_EVERY)

    # --- the port ----------------------------------------------------------------------------------------

    async def _serve(self, config: MetricsConfig) -> None:
        listener = socket.create_server(("127.0.0.1", config.port or 0))
        self.port = listener.getsockname()[1]
        places = trio.Semaphore(MAX_CLIENTS)

        async def serve(stream: trio.SocketStream) -> None:
            # Every user of this machine may call. Nobody waits with an open connection: tasks need descriptors, too.
            try:
                places.acquire_nowait()
            except trio.WouldBlock:
                await trio.aclose_forcefully(stream)
                return
            try:
                async with stream:
                    with trio.move_on_after(PATIENCE):
                        await self._answer(stream)
            finally:
                places.release()

        try:
            await trio.serve_listeners(serve, [trio.SocketListener(trio.socket.from_stdlib_socket(listener))])
        finally:
            self.port = None

    async def _answer(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_REQUEST)
        try:
            while (event := connection.next_event()) is h11.NEED_DATA:
                connection.receive_data(await stream.receive_some(MAX_REQUEST))
            if not isinstance(event, h11.Request):
                return
            known = event.method == b"GET" and event.target.split(b"?")[0] == b"/metrics"
            # A page of the browser, whose name was re-bound to this machine, says its own name.
            names = [value.partition(b":")[0].lower() for name, value in event.headers if name == b"host"]
            known = known and names in ([b"127.0.0.1"], [b"localhost"])
            body = self._text().encode() if known else b"Only GET http://127.0.0.1/metrics is answered here.\n"
            headers = [
                ("content-type", CONTENT_TYPE if known else "text/plain"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            await stream.send_all(connection.send(h11.Response(status_code=200 if known else 404, headers=headers)))
            await stream.send_all(connection.send(h11.Data(data=body)))
        except (h11.ProtocolError, trio.BrokenResourceError):
            # Whoever that was spoke something else, or left.
            return


def _replace(file: Path, text: str) -> None:
    """Write a whole file in the place of the old one, so that nobody reads half of it."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        # Others may write in that folder, too: what they have put there is neither followed nor filled.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "w", encoding="utf-8") as written:
            written.write(text)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
