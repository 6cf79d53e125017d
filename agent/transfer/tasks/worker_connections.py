"""What a worker has from its daemon: connections to the source, when it asks for them, and what it may do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable

from agent.connect.transport import Connection
from agent.limits.allotment import Allowance
from agent.transfer.processes.channel import Allowed, Channel, ChannelClosed, Connect, Connected, ConnectFailed
from agent.transfer.tasks.task_paths import TaskPaths
from protocol.errors import RetryLater, TaskFailed, TowpathError


async def give_connection(
    channel: Channel, message: Connect, paths: TaskPaths | None, tell_path: Callable[[TaskPaths], Awaitable[None]]
) -> bool:
    """Make a connection and pass it on, or say why there is none; whether there was one. ``tell_path`` is called
    before it is passed on. Raises `ChannelClosed` when the worker has ended.

    What is wrong with one connection ends neither other tasks nor the daemon.
    """
    try:
        if paths is None:
            raise TaskFailed("A delete has no source.")
        connection, certificate = await _found(paths, message.kind)
        descriptor = _passed_on(connection)
    except TowpathError as error:
        await channel.send(ConnectFailed(request=message.request, error=error.to_document()))
        return False
    try:
        await tell_path(paths)
        made = Connected(
            request=message.request, certificate=certificate, transport=connection.path.transport, descriptors=1
        )
        await channel.send(made, (descriptor,))
    finally:
        os.close(descriptor)
    return True


async def _found(paths: TaskPaths, kind: str) -> tuple[Connection, str]:
    """A connection to the source and its certificate. Raises `TowpathError`."""
    try:
        return await paths.connect(begins=kind == "control")
    except OSError as error:
        raise RetryLater(f"No connection to the source could be made: {error}.", code="CONNECT_FAILED") from error


def _passed_on(connection: Connection) -> int:
    """Another descriptor of the connection, whose own one is closed. Raises `RetryLater`."""
    with connection.sock:
        try:
            return os.dup(connection.sock.fileno())
        except OSError as error:
            raise RetryLater(
                f"The agent has no room for a connection: {error.strerror}.", code="CONNECT_FAILED"
            ) from error


async def allow(channel: Channel, allowance: Allowance) -> None:
    """Tell a worker what it may do; one that is ending hears it no more."""
    with contextlib.suppress(ChannelClosed):
        await channel.send(
            Allowed(
                rate=allowance.rate,
                limited_by=allowance.source,
                lanes=allowance.lanes,
                cpu=allowance.cpu,
                memory=allowance.memory,
            )
        )
