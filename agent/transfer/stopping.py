"""How the threads of a run are told to end, and which error a run ends with."""

from __future__ import annotations

from collections.abc import Callable

import trio

from protocol.errors import RetryLater, TowpathError


async def call_on_cancel(function: Callable[[], None], *, task_status: trio.TaskStatus[None]) -> None:
    """Wait to be cancelled, then call: how a blocking thread is told to end."""
    task_status.started()
    try:
        await trio.sleep_forever()
    finally:
        function()


def first_error(group: BaseExceptionGroup[BaseException]) -> TowpathError:
    """The first error of a group, as one of ours."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    if isinstance(found, TowpathError):
        return found
    return RetryLater(f"The connection to the source broke: {found}.", code="CONNECTION_LOST")


def first_system_error(group: BaseExceptionGroup[OSError]) -> OSError:
    """One of the errors in a group that holds no others."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, OSError)  # except* gives nothing else
    return found
