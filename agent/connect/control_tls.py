"""TLS of a control stream, at the destination: pyOpenSSL over memory, as it lets us choose the cipher suite.

A control stream lives as long as its session and cannot be followed by another as a lane can (see
`agent.transfer.basis.lane_keys`): requests and listings are under way on it at any time. With ChaCha20-Poly1305 it
need not be, as no number of records that TLS can count wears its keys out (RFC 8446 section 5.5). Python's `ssl` has
no choice of TLS 1.3's suites before 3.15. The source's end stays with `ssl`, which can answer which ALPN name it chose
without a callback (`agent.connect.lane_tls` says why that matters), and takes what we prefer (`agent.connect.tls`). A
source of an older release takes AES-256-GCM.
"""

from __future__ import annotations

import trio
from OpenSSL import SSL

from agent.connect.lane_tls import check_presented, lane_context
from protocol.errors import AccessDenied
from protocol.identity import NodeKey, fingerprint_of_certificate_untrusted

# The others are for sources whose library has no ChaCha20, as where only FIPS's choice is allowed.
SUITES = b"TLS_CHACHA20_POLY1305_SHA256:TLS_AES_256_GCM_SHA384:TLS_AES_128_GCM_SHA256"
_CHUNK = 256 * 1024
# While nothing of ours is taken, answers of TLS itself wait here. So of what comes meanwhile one byte in so many has to
# be content, but for so many bytes.
_LEAST_CONTENT, _MOST_OTHER = 4, 1024 * 1024


class ControlStream(trio.abc.Stream):
    """The destination's end of a control stream; `do_handshake` first. One task may send while another receives. What
    breaks is `trio.BrokenResourceError`; a peer that is gone without a word ends what is received like one that said
    so, as each message says how long it is. Closing says nothing either."""

    def __init__(
        self,
        transport: trio.abc.Stream,
        identity: NodeKey,
        peer_certificate: str,
        *,
        server_name: str,
        alpn: tuple[str, ...],
    ) -> None:
        """Raises `ProtocolError` when ``peer_certificate`` cannot be read."""
        self.transport_stream = transport
        self._fingerprint = fingerprint_of_certificate_untrusted(peer_certificate)
        self._connection = SSL.Connection(lane_context(identity, peer_certificate, alpn, SUITES), None)
        self._connection.set_tlsext_host_name(server_name.encode("ascii"))
        self._connection.set_connect_state()
        self._sending = trio.Lock()
        # Bytes that came while our own did not go, and were no content.
        self._other = 0

    async def do_handshake(self) -> None:
        """Raises `trio.BrokenResourceError`, and `AccessDenied` for another peer."""
        while True:
            try:
                self._connection.do_handshake()
            except SSL.WantReadError:
                await self._flush()
                if not await self._more():
                    raise trio.BrokenResourceError("The peer of a control stream left during the handshake.") from None
                continue
            except SSL.Error as error:
                raise trio.BrokenResourceError("The handshake of a control stream failed.") from error
            break
        try:
            check_presented(self._connection, self._fingerprint)
        except AccessDenied:
            await trio.aclose_forcefully(self.transport_stream)
            raise
        await self._flush()

    def selected_alpn_protocol(self) -> str | None:
        """What the source chose."""
        return self._connection.get_alpn_proto_negotiated().decode("ascii", "replace") or None

    def cipher(self) -> str | None:
        """The suite in use."""
        return self._connection.get_cipher_name()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if not data:
            await trio.lowlevel.checkpoint()
            return
        try:
            # Into memory: all of it, at once.
            self._connection.send(bytes(data))
        except SSL.Error as error:
            raise trio.BrokenResourceError("The control stream is broken.") from error
        await self._flush()

    async def wait_send_all_might_not_block(self) -> None:
        async with self._sending:
            await self.transport_stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            try:
                data: bytes = self._connection.recv(max_bytes or _CHUNK)
            except SSL.WantReadError:
                pass
            except SSL.ZeroReturnError:
                return b""
            except SSL.Error as error:
                raise trio.BrokenResourceError("The control stream is broken.") from error
            else:
                self._other = max(0, self._other - _LEAST_CONTENT * len(data))
                await trio.lowlevel.cancel_shielded_checkpoint()
                return data
            # What the peer said may want an answer of TLS itself, as new keys do. Who sends just now takes it along;
            # to wait for that would be to wait for a peer that may wait for us to read.
            if not self._sending.locked():
                await self._flush()
                self._other = 0
            elif self._other > _MOST_OTHER:
                raise trio.BrokenResourceError("The peer of a control stream asks and takes no answers.")
            if not await self._more():
                return b""

    async def aclose(self) -> None:
        await self.transport_stream.aclose()

    async def _more(self) -> bool:
        """Take what comes next; whether anything will."""
        data = await self.transport_stream.receive_some(_CHUNK)
        if data:
            self._other += len(data)
            self._connection.bio_write(data)
        return bool(data)

    async def _flush(self) -> None:
        """Send what TLS has ready, in its order."""
        async with self._sending:
            while True:
                try:
                    data = self._connection.bio_read(_CHUNK)
                except SSL.WantReadError:
                    return
                await self.transport_stream.send_all(data)
