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


async def run_in_thread(work: Callable[[], None], stop: Callable[[], None]) -> None:
    """Run blocking work in a thread. Cancelling calls ``stop`` (on trio's thread), and waits until the work ends by
    it. Raises what the work raises, in no group."""
    error: Exception | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(call_on_cancel, stop)
        try:
            await trio.to_thread.run_sync(work)
        except Exception as raised:
            error = raised
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error
    await trio.lowlevel.checkpoint_if_cancelled()


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
