"""One small interface over the libraries that speak QUIC without doing I/O: qh3 (Rust inside, fast) and aioquic.

Time is passed in as monotonic seconds. An engine never sends or receives by itself: datagrams are fed and collected.
"""

from __future__ import annotations

import importlib
import importlib.util
import ssl
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from agent.connect.quic.door import Answer, Begin, Door
from agent.connect.quic.labour import Labour
from protocol.errors import ProtocolError, RetryLater

ALPN = "towpath-quic/1"
# A peer that says nothing for so long (seconds) is gone; pings are sent often enough that an idle one is not.
IDLE_TIMEOUT = 13.0
PING_EVERY = 4.0
# What the library accepts of one stream, and in all, beyond what was taken: more than the credit of `credit`, which is
# what really holds a sender back, because libraries widen these windows whether or not the data was taken.
MAX_STREAM_DATA = 16 * 1024 * 1024
MAX_DATA = 64 * 1024 * 1024
# One key of AES-GCM may protect 2^23 packets (RFC 9001 section 6.6), some 11 GB; both libraries update keys when asked
# to, and never by themselves. The rest is for packets until the peer has followed.
KEY_PACKETS = 2**22
_ED25519 = 0x0807
_PREFERENCE = ("qh3", "aioquic")
_ENDED = "The QUIC connection ended."
# Datagrams that wait to be sent for no connection; more are as good as lost.
_MOST_STRAYS = 1024

Address = tuple[str, int]


class EngineMissing(RetryLater):
    """No library for QUIC is installed."""

    default_code = "QUIC_UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class Up:
    """The handshake is done; ``certificate`` (DER) is what the peer showed, empty at the server."""

    certificate: bytes


@dataclass(frozen=True, slots=True)
class StreamData:
    """Bytes of a stream, in order; ``end`` when no more will come."""

    stream: int
    data: bytes
    end: bool


@dataclass(frozen=True, slots=True)
class StreamReset:
    """The peer gave a stream up."""

    stream: int


@dataclass(frozen=True, slots=True)
class Closed:
    """The connection is over."""

    reason: str


Event = Up | StreamData | StreamReset | Closed


def available() -> list[str]:
    """Libraries that are installed, best first."""
    return [name for name in _PREFERENCE if importlib.util.find_spec(name) is not None]


class Engine:
    """One connection. ``library`` chooses for tests; else the best there is. ``known``: where the peer of a server
    calls from (all addresses count when it is empty). After ``key_packets`` datagrams both ends have new keys. Raises
    `EngineMissing`."""

    def __init__(
        self,
        *,
        is_client: bool,
        certificate_pem: str,
        private_key_pem: bytes,
        library: str | None = None,
        known: Collection[Address] = (),
        key_packets: int = KEY_PACKETS,
    ) -> None:
        found = available()
        if library is None and not found:
            raise EngineMissing("No library for QUIC is installed on this machine; `pip install qh3` brings one.")
        self.library = library or found[0]
        self.is_client = is_client
        self._certificate_pem = certificate_pem
        self._private_key_pem = private_key_pem
        self._connection: Any = None
        self._is_up = False
        self.door = Door(self.library, known)
        self.labour = Labour()
        # A server's datagrams that belong to no connection that there still is.
        self._strays: list[tuple[bytes, Address]] = []
        self._key_packets = key_packets
        # Datagrams sent with the keys of this phase, which either end may begin, and how often there were new ones.
        self._with_these_keys = 0
        self._phase: int | None = None
        self.key_updates = 0
        # Why the library takes nothing more.
        self._over = ""

    # --- the connection --------------------------------------------------------------------------------------

    def connect(self, address: Address, now: float) -> None:
        """Client: begin the handshake."""
        module = importlib.import_module(f"{self.library}.quic.connection")
        self._connection = module.QuicConnection(configuration=self._configuration())
        self._connection.connect(address, now=now)

    def receive(self, data: bytes, segment: int, address: Address, now: float) -> None:
        """Datagrams that came from an address: one, or several of ``segment`` bytes one behind the other.

        Garbage is ignored, as QUIC wants it. Raises only `ProtocolError`, and a server only over what came from who has
        done the handshake.
        """
        if not data:
            return
        if not self.is_client and not self._is_up:
            for start in range(0, len(data), segment or len(data)):
                self._knock(data[start : start + (segment or len(data))], address, now)
            return
        if self._connection is None:
            return
        with self._working(-(-len(data) // (segment or len(data)))), _only_protocol_errors():
            if segment and len(data) > segment and hasattr(self._connection, "receive_gro_buffer"):
                self._connection.receive_gro_buffer(data, segment, address, now=now)
                return
            for start in range(0, len(data), segment or len(data)):
                self._connection.receive_datagram(data[start : start + (segment or len(data))], address, now=now)

    def _knock(self, data: bytes, address: Address, now: float) -> None:
        """Server: one datagram before the handshake is done."""
        verdict = self.door.judge_untrusted(data, address, now)
        if isinstance(verdict, Answer):
            if len(self._strays) < _MOST_STRAYS:
                self._strays.append((verdict.data, address))
            return
        if isinstance(verdict, Begin):
            module = importlib.import_module(f"{self.library}.quic.connection")
            self._connection = module.QuicConnection(
                configuration=self._configuration(),
                original_destination_connection_id=verdict.original,
                retry_source_connection_id=verdict.retry_source,
            )
            self.door.began(self._connection.host_cid)
        if verdict is None or self._connection is None:
            return
        try:
            with _only_protocol_errors():
                self._connection.receive_datagram(data, address, now=now)
        except ProtocolError:
            self._give_up(now)

    def _give_up(self, now: float) -> None:
        """Server: what was half open has come to nothing; who has not proven anything ends nothing."""
        with suppress(ProtocolError):
            self._strays += self.datagrams(now)[: _MOST_STRAYS - len(self._strays)]
        self._connection = None
        self.door.gave_up()

    def datagrams(self, now: float) -> list[tuple[bytes, Address]]:
        """What is to be sent now, and where to. Raises only `ProtocolError`."""
        strays, self._strays = self._strays, []
        if self._connection is None:
            return strays
        with _only_protocol_errors():
            if self.library == "qh3" and not self.is_client and not self._is_up:
                return strays + self._within_allowance(now)
            self._renew_keys()
            began = time.thread_time()
            sent: list[tuple[bytes, Address]] = self._connection.datagrams_to_send(now=now)
            self._with_these_keys += len(sent)
            if self._is_up:
                self.labour.did(time.thread_time() - began, len(sent))
                if self.library == "qh3":
                    core = self._connection._core
                    self.labour.waits(core.bytes_in_flight, core.congestion_window)
            return strays + sent

    @contextmanager
    def _working(self, datagrams: int) -> Iterator[None]:
        """The library works for so many datagrams. Before the handshake is done the door counts what comes."""
        began = time.thread_time()
        yield
        if self._is_up:
            self.labour.did(time.thread_time() - began, datagrams)

    def _renew_keys(self) -> None:
        """Update the keys when they have protected enough packets of ours. Never soon after another update, also one of
        the peer's: that has to be acknowledged first (RFC 9001 section 6.1)."""
        if not self._is_up or not self._connection._handshake_confirmed:
            return
        if self._with_these_keys >= self._key_packets:
            # qh3 refuses while the last update is not through (ValueError); it is asked again with the next datagrams.
            with suppress(ValueError):
                self._connection.request_key_update()
        phase = self._key_phase()
        if phase != self._phase:
            self.key_updates += self._phase is not None
            self._phase, self._with_these_keys = phase, 0

    def _key_phase(self) -> int | None:
        # Neither library tells in its public interface; a later version without these names makes the tests fail.
        if self.library == "qh3":
            phase: int | None = self._connection._core.send_key_phase
        else:
            phase = self._connection._cryptos[self._one_rtt()].key_phase
        return phase

    def _one_rtt(self) -> Any:
        return importlib.import_module("aioquic.tls").Epoch.ONE_RTT

    def _within_allowance(self, now: float) -> list[tuple[bytes, Address]]:
        """The datagrams of a qh3 server during the handshake.

        When what it may send to an unproven address (three times what came from there) is used up, qh3 2.1 fails
        instead of waiting, and `datagrams_to_send` loses what it had collected. So they are collected one by one here.
        """
        sent: list[tuple[bytes, Address]] = []
        core = self._connection._core
        while core is not None:
            try:
                transmit = core.poll_transmit(now)
            except RuntimeError:
                break
            if transmit is None:
                break
            sent.append((transmit[0], transmit[1]))
        return sent

    def timer(self) -> float | None:
        """When `handle_timer` wants to be called."""
        if self._connection is None:
            return None
        timer: float | None = self._connection.get_timer()
        return timer

    def handle_timer(self, now: float) -> None:
        """Time has passed. Raises only `ProtocolError`."""
        if self._connection is None:
            return
        try:
            with self._working(0), _only_protocol_errors():
                self._connection.handle_timer(now=now)
        except ProtocolError:
            if self.is_client or self._is_up:
                raise
            self._give_up(now)

    def events(self) -> Iterator[Event]:
        """What has happened since the last call."""
        while self._connection is not None and (event := self._connection.next_event()) is not None:
            # Both libraries name their events alike; the classes are not the same.
            kind = type(event).__name__
            if kind == "HandshakeCompleted":
                if event.alpn_protocol != ALPN:
                    yield Closed("The peer speaks another protocol over QUIC.")
                    return
                self._is_up = True
                yield Up(self._peer_certificate() if self.is_client else b"")
            elif kind == "StreamDataReceived":
                yield StreamData(event.stream_id, bytes(event.data), bool(event.end_stream))
            elif kind in ("StreamReset", "StopSendingReceived"):
                yield StreamReset(event.stream_id)
            elif kind == "ConnectionTerminated" and not self.is_client and not self._is_up:
                self._give_up(now())
            elif kind == "ConnectionTerminated":
                self._over = ""
                yield Closed(str(event.reason_phrase or _ENDED))
        if self._over:
            yield Closed(self._over)

    # --- streams ---------------------------------------------------------------------------------------------

    def open_stream(self) -> int:
        """The number of the next stream of ours; it begins with the first bytes sent."""
        number: int = self._connection.get_next_available_stream_id()
        return number

    def send(self, stream: int, data: bytes | memoryview, *, end: bool = False) -> None:
        """Queue bytes of a stream. Over a connection that has ended nothing goes; `events` tells of the end, behind
        what came before it."""
        with self._noting_the_end():
            self._connection.send_stream_data(stream, bytes(data), end)

    def reset(self, stream: int) -> None:
        """Give a stream up in both directions."""
        with self._noting_the_end():
            self._connection.reset_stream(stream, 1)
            self._connection.stop_stream(stream, 1)

    def ping(self) -> None:
        """Say something, so that silence means death."""
        if self._is_up:
            with self._noting_the_end():
                self._connection.send_ping(0)

    def move(self) -> None:
        """Our address has changed: use another connection id, so that the path cannot be linked to the old one."""
        if self._is_up:
            with self._noting_the_end():
                self._connection.change_connection_id()

    def close(self, reason: str) -> None:
        """End the connection; `datagrams` has the goodbye."""
        if self._connection is not None:
            self._connection.close(error_code=0, reason_phrase=reason[:200])

    @contextmanager
    def _noting_the_end(self) -> Iterator[None]:
        """The peer's goodbye may have come in the very moment in which something is sent; qh3 refuses it then."""
        ended = importlib.import_module(f"{self.library}.quic.connection").QuicConnectionError
        try:
            yield
        except ended as error:
            self._over = f"{_ENDED} ({error.reason_phrase})"

    # --- the libraries ---------------------------------------------------------------------------------------

    def _configuration(self) -> Any:
        module = importlib.import_module(f"{self.library}.quic.configuration")
        options: dict[str, Any] = {
            "alpn_protocols": [ALPN],
            "is_client": self.is_client,
            "idle_timeout": IDLE_TIMEOUT,
            "max_data": MAX_DATA,
            "max_stream_data": MAX_STREAM_DATA,
            # The certificate's chain and names mean nothing here; its key is compared with the ticket's pin as soon
            # as the handshake, which proves that the peer has the key, is done (`introduction`).
            "verify_mode": ssl.CERT_NONE,
            "server_name": "towpath",
        }
        if self.library == "qh3":
            options["signature_algorithms"] = [_ED25519]
            configuration = module.QuicConfiguration(**options)
            if not self.is_client:
                configuration.load_cert_chain(self._certificate_pem.encode(), self._private_key_pem)
        else:
            options |= {"congestion_control_algorithm": "cubic", "max_datagram_size": 1400}
            configuration = module.QuicConfiguration(**options)
            if not self.is_client:
                configuration.certificate = x509.load_pem_x509_certificate(self._certificate_pem.encode())
                configuration.private_key = serialization.load_pem_private_key(self._private_key_pem, None)
        return configuration

    def _peer_certificate(self) -> bytes:
        if self.library == "qh3":
            certificate = self._connection.get_peercert()
            return b"" if certificate is None else bytes(certificate.public_bytes())
        # aioquic keeps it to itself; a later version without this name makes the test of this module fail.
        certificate = self._connection.tls._peer_certificate
        return b"" if certificate is None else bytes(certificate.public_bytes(serialization.Encoding.DER))


def now() -> float:
    """The clock of all engines."""
    return time.monotonic()


@contextmanager
def _only_protocol_errors() -> Iterator[None]:
    """Libraries raise many things over a peer's bytes; to us they are all the one error that a peer may cause."""
    try:
        yield
    except ProtocolError:
        raise
    except MemoryError as error:
        raise ProtocolError("The peer makes QUIC keep more than this process may have of memory.") from error
    except Exception as error:
        raise ProtocolError(f"The peer's QUIC is not understood: {error}.") from error
