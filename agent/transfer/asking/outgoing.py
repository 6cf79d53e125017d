"""What waits to be sent on a control stream goes out together: one record of TLS and one wake-up of the peer for many
messages, when there are many."""

from __future__ import annotations

import trio

# Bytes from which on no further message is added.
TOGETHER = 64 * 1024


async def send_queued(stream: trio.abc.SendStream, queue: trio.MemoryReceiveChannel[bytes]) -> None:
    """Send what comes on a channel, in order, until it ends. Raises what the stream raises."""
    async for data in queue:
        waiting = [data]
        size = len(data)
        while size < TOGETHER:
            try:
                data = queue.receive_nowait()
            except (trio.WouldBlock, trio.EndOfChannel):
                break
            waiting.append(data)
            size += len(data)
        await stream.send_all(b"".join(waiting))
