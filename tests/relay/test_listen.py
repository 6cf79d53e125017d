"""Taking connections: bursts, callers that are gone, and a machine without descriptors."""

from __future__ import annotations

import errno
import socket
import struct
from typing import Any

import pytest
import trio
import trio.testing

from relay import listen
from relay.listen import BURST, accept_all


async def test_a_burst_of_callers_is_served_and_callers_that_are_gone_are_skipped() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=256)
    address = listener.socket.getsockname()
    served: list[bytes] = []

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            try:
                served.append(bytes(await stream.receive_some(10)))
            except trio.BrokenResourceError:
                served.append(b"reset")

    callers = [socket.create_connection(address) for _ in range(3 * BURST)]
    for caller in callers[::2]:
        caller.sendall(b"here")
    for caller in callers[1::2]:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        caller.close()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept_all, [listener], handle, nursery)
        with trio.fail_after(10):
            while served.count(b"here") < len(callers[::2]):
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    for caller in callers[::2]:
        caller.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


class _NoDescriptors:
    """A listening socket on a machine that has no descriptor left for a while."""

    def __init__(self, failures: list[int]) -> None:
        self.failures = failures

    def accept(self) -> Any:
        number = self.failures.pop(0) if self.failures else errno.EAGAIN
        raise OSError(number, "on purpose") if number != errno.EAGAIN else BlockingIOError()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_without_descriptors_the_port_waits(number: int) -> None:
    assert not listen._take_burst(_NoDescriptors([number]), None, None)  # type: ignore[arg-type]


def test_troubles_of_one_caller_are_skipped_and_those_of_the_port_are_not() -> None:
    passing = _NoDescriptors([errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN])
    assert listen._take_burst(passing, None, None)  # type: ignore[arg-type]
    assert not passing.failures
    with pytest.raises(OSError, match="on purpose"):
        listen._take_burst(_NoDescriptors([errno.EBADF]), None, None)  # type: ignore[arg-type]
