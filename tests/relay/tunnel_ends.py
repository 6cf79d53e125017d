"""What the two ends of a tunnel do in tests: send, read, be held back, notice its end."""

from __future__ import annotations

import trio

from tests.relay.tunnel_world import TunnelWorld


async def read_all(stream: trio.SocketStream) -> bytes:
    data = bytearray()
    while chunk := await stream.receive_some(256 * 1024):
        data += chunk
    return bytes(data)


async def count_until_broken(stream: trio.SocketStream) -> int:
    total = 0
    try:
        while chunk := await stream.receive_some(256 * 1024):
            total += len(chunk)
    except trio.BrokenResourceError:
        return total
    return total


async def send_for_ever(stream: trio.SocketStream, piece: bytes = bytes(64 * 1024)) -> None:
    try:
        while True:
            await stream.send_all(piece)
    except trio.BrokenResourceError:
        return


async def no_pairs(world: TunnelWorld) -> None:
    with trio.fail_after(10):
        while world.service.statistics().pairs:
            await trio.sleep(0.01)


async def pass_both_ways(source: trio.SocketStream, destination: trio.SocketStream, content: bytes) -> None:
    """Content arrives whole, and its opposite the other way, which is still open when the first one has ended."""
    received: dict[str, bytes] = {}

    async def read(name: str, stream: trio.SocketStream) -> None:
        received[name] = await read_all(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, "forward", destination)
        await source.send_all(content)
        await source.send_eof()
    assert received["forward"] == content
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, "back", source)
        await destination.send_all(content[::-1])
        await destination.send_eof()
    assert received["back"] == content[::-1]


async def send_until_held_back(source: trio.SocketStream) -> int:
    """Send for a second, while nobody reads: how much went away."""
    sent = 0
    with trio.move_on_after(1.0):
        while True:
            await source.send_all(bytes(64 * 1024))
            sent += 64 * 1024
    return sent


async def wake_up(source: trio.SocketStream, destination: trio.SocketStream, sent: int) -> None:
    """A receiver that took nothing gets everything, in order."""
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.send_eof)
            received = await read_all(destination)
    assert len(received) >= sent
    assert not any(received)
