"""TLS for an agent's link, in as few steps as there can be: thousands of agents come back at once.

`trio.SSLStream` takes several turns of the event loop, and calls in vain, for each message. Here a message that comes
is one turn and one read, and one that goes is one write, without a turn where the socket takes it.
"""

from __future__ import annotations

import os
import ssl

import trio

# Bytes read off the socket at once; so much may be asked of a link's reader as well.
READ = 64 * 1024
# TLS's own messages cost a stranger 27 bytes each, and us new keys and an answer. So what comes has to be content, by
# one byte in so many at least, but for so many bytes, which hold the longest record four times.
LEAST_CONTENT, MOST_OTHER = 32, 64 * 1024


class LinkStream(trio.abc.Stream):
    """The server's end of TLS on ``transport_stream``, which it owns. One task reads, one writes.

    Errors of the connection and of TLS are `trio.BrokenResourceError`. An end without TLS's goodbye is an end: what is
    inside has its own. `aclose` closes at once.
    """

    def __init__(self, stream: trio.SocketStream, context: ssl.SSLContext) -> None:
        self.transport_stream = stream
        self._socket = stream.socket
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._unsent = memoryview(b"")
        # Only one may wait for the socket to take more.
        self._draining = trio.Lock()
        # TLS may have content that nobody has taken yet.
        self._more = False
        # Bytes that came and were no content, as `LEAST_CONTENT` counts them.
        self._other = 0

    def selected_alpn_protocol(self) -> str | None:
        """What the handshake chose."""
        return self._tls.selected_alpn_protocol()

    async def do_handshake(self) -> None:
        """Once, before anything else."""
        # The greeting is there: it was looked at.
        waiting = False
        while True:
            try:
                self._tls.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                done = False
            except ssl.SSLError as error:
                self._flush_alert()
                raise trio.BrokenResourceError("The TLS handshake failed.") from error
            await self._flush()
            if done:
                self._more = bool(self._incoming.pending)
                return
            await self._fill(wait=waiting)
            waiting = True

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As in trio. Always a checkpoint."""
        most = READ if max_bytes is None else max_bytes
        if self._more:
            await trio.lowlevel.checkpoint()
        else:
            await self._fill(wait=True)
        while True:
            data = self._decrypt(most)
            if data != b"" and self._outgoing.pending:
                # TLS itself has something to say, as after a change of keys. Who asks and asks must take the answers.
                await self._flush()
            if data is not None:
                self._other = max(0, self._other - LEAST_CONTENT * len(data))
                self._more = bool(self._tls.pending() or self._incoming.pending)
                return data
            if self._other > MOST_OTHER:
                raise trio.BrokenResourceError("The other side has TLS work and says nothing.")
            await self._fill(wait=True)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """As in trio, but lets nobody else have a turn where the socket takes everything at once."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._descriptor()
        if data:
            try:
                self._tls.write(data)
            except ssl.SSLError as error:
                raise trio.BrokenResourceError("TLS broke.") from error
        await self._flush()

    async def wait_send_all_might_not_block(self) -> None:
        async with self._draining:
            self._descriptor()
            await trio.lowlevel.wait_writable(self._socket)

    async def aclose(self) -> None:
        await self.transport_stream.aclose()

    def _decrypt(self, most: int) -> bytes | None:
        """Content that has come; empty at the end, None when there is nothing now."""
        try:
            return self._tls.read(most)
        except ssl.SSLWantReadError:
            return None
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""
        except ssl.SSLError as error:
            self._flush_alert()
            raise trio.BrokenResourceError("TLS broke.") from error

    async def _fill(self, *, wait: bool) -> None:
        """Read off the socket once, after waiting for it where there may be nothing."""
        while True:
            descriptor = self._descriptor()
            if wait:
                await trio.lowlevel.wait_readable(self._socket)
                descriptor = self._descriptor()
            try:
                data = os.read(descriptor, READ)
            except BlockingIOError:
                wait = True
                continue
            except OSError as error:
                raise trio.BrokenResourceError(f"The connection broke: {error}") from error
            if data:
                self._other += len(data)
                self._incoming.write(data)
            else:
                self._incoming.write_eof()
            return

    def _write(self) -> bool:
        """Send what TLS has for the other side, as far as the socket takes it; whether that is all."""
        while self._unsent or self._outgoing.pending:
            if not self._unsent:
                self._unsent = memoryview(self._outgoing.read())
            try:
                sent = os.write(self._descriptor(), self._unsent)
            except BlockingIOError:
                return False
            except OSError as error:
                raise trio.BrokenResourceError(f"The connection broke: {error}") from error
            self._unsent = self._unsent[sent:]
        return True

    async def _flush(self) -> None:
        if self._write():
            return
        async with self._draining:
            while not self._write():
                await trio.lowlevel.wait_writable(self._socket)

    def _flush_alert(self) -> None:
        """Tell the other side why, if that goes at once."""
        try:
            self._write()
        except trio.BrokenResourceError:
            # It has gone already; what broke is raised by whoever called.
            return

    def _descriptor(self) -> int:
        number = self._socket.fileno()
        if number < 0:
            raise trio.ClosedResourceError("The link is closed.")
        return number
