"""One HTTP/2 connection without I/O: h2, with every bound that a hostile or a merely slow peer calls for.

Both ends of the link stand on this class. Bytes go in through `Core.receive_untrusted`, what they mean comes out as
records, bytes to send wait in a queue. Flow control: the window of the connection is given back on receipt, so that
nothing a reader does or leaves undone can starve the other streams; the window of a stream is given back as its
reader consumes. RFC 9113 throughout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import msgspec

from protocol.errors import ProtocolError
from protocol.reverse_http.errors import Flood
from protocol.reverse_http.flood import MAX_FRAME, FrameMeter
from protocol.reverse_http.limits import Limits
from protocol.reverse_http.pings import Pings

Header = tuple[bytes, bytes]
Headers = Sequence[Header]
_Code = h2.settings.SettingCodes
ErrorCodes = h2.errors.ErrorCodes

MAX_REASON = 300
MAX_RETRY_AFTER = 3600.0


class Farewell(msgspec.Struct, frozen=True):
    """What a side says as it closes; travels as JSON in the debug data of GOAWAY."""

    sentence: str = ""
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class HeadersArrived:
    """A request began (at a server), or an answer (at a client)."""

    stream_id: int
    headers: Headers


@dataclass(frozen=True, slots=True)
class DataArrived:
    """Part of a body. `Core.consumed` is owed for every byte."""

    stream_id: int
    data: bytes


@dataclass(frozen=True, slots=True)
class BodyEnded:
    """The peer's side of the stream is complete."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class StreamReset:
    """The stream ended early."""

    stream_id: int
    code: int


@dataclass(frozen=True, slots=True)
class WindowOpened:
    """More may be sent on one stream, or on all (0)."""

    stream_id: int


@dataclass(frozen=True, slots=True)
class SettingsArrived:
    """The peer's settings changed; `Core.capacity` may have."""


@dataclass(frozen=True, slots=True)
class PlacesFreed:
    """The peer answered a PING: it has seen the resets of this many streams, perhaps none."""

    count: int


@dataclass(frozen=True, slots=True)
class ConnectionEnded:
    """The peer said GOAWAY. ``said`` is what it gave as the reason, cut to size."""

    said: Farewell


Happening = (
    HeadersArrived
    | DataArrived
    | BodyEnded
    | StreamReset
    | WindowOpened
    | SettingsArrived
    | PlacesFreed
    | ConnectionEnded
)


class _Stream:
    """The side of our own bookkeeping that h2 does not keep: window owed to the peer, and which ends are done."""

    __slots__ = ("owed", "received", "sent")

    def __init__(self) -> None:
        self.owed = 0
        self.received = False
        self.sent = False


class _H2(h2.connection.H2Connection):
    """h2 that remembers few closed streams: a link lives for weeks, and an idle one must stay small."""

    def __init__(self, config: h2.config.H2Configuration, remembered: int) -> None:
        self.MAX_CLOSED_STREAMS = remembered
        super().__init__(config)


def _make_h2(client: bool, limits: Limits) -> _H2:
    # Outbound fields are checked in `headers` before they come here: an error in the middle of encoding would damage
    # the compression state that all later requests share.
    config = h2.config.H2Configuration(
        client_side=client,
        header_encoding=None,
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
    )
    # Between a reset and its fence at most one other stream per place can end, and be reset and end, once: twice the
    # places is the most h2 must remember to tell a late answer from nonsense.
    machine = _H2(config, 2 * limits.max_streams + 56)
    machine.local_settings = h2.settings.Settings(
        client=client,
        initial_values={
            _Code.ENABLE_PUSH: 0,
            _Code.MAX_CONCURRENT_STREAMS: limits.max_streams,
            _Code.INITIAL_WINDOW_SIZE: limits.stream_window,
            _Code.MAX_FRAME_SIZE: MAX_FRAME,
            _Code.MAX_HEADER_LIST_SIZE: limits.max_header_list,
        },
    )
    machine.decoder.max_header_list_size = limits.max_header_list
    machine.initiate_connection()
    # The window of the connection starts at 65,535 whatever the settings say (section 6.9.2).
    extra = limits.connection_window - 65_535
    if extra > 0:
        machine.increment_flow_control_window(extra)
    return machine


class Core:
    """One end of one connection. ``now`` is monotonic seconds; nothing here blocks, sleeps or reads a clock."""

    def __init__(self, *, client: bool, limits: Limits, now: float) -> None:
        self.limits = limits
        self.client = client
        self.closed = False
        self.pings = Pings(limits.ping_interval, limits.quick_ping_interval, limits.fence_interval, now)
        self._meter = FrameMeter(server=not client, limits=limits, now=now)
        self._streams: dict[int, _Stream] = {}
        # Requests of ours whose answers have not begun.
        self._unanswered: set[int] = set()
        self._settings_seen = False
        self._credit = 0
        self._out = bytearray()
        self._h2 = _make_h2(client, limits)
        self._collect()

    # --- what the peer sent ----------------------------------------------------------------------------------

    def receive_untrusted(self, data: bytes, now: float) -> list[Happening]:
        """Take bytes from the peer. Raises only `ProtocolError`; the farewell is then already queued."""
        if self.closed:
            return []
        self.pings.heard(now)
        try:
            self._meter.feed_untrusted(data, now)
            happened = [h for event in self._h2.receive_data(data) for h in self._translate(event, now)]
            self._collect()
            self._check_queue()
            if not self._unanswered:
                self.pings.calm()
        except Flood as flood:
            self.close(Farewell(flood.sentence), ErrorCodes.ENHANCE_YOUR_CALM)
            raise
        except h2.exceptions.ProtocolError as error:
            sentence = f"The peer broke the rules of HTTP/2: {str(error)[:MAX_REASON]}"
            self.close(Farewell(sentence), getattr(error, "error_code", ErrorCodes.PROTOCOL_ERROR))
            raise ProtocolError(sentence) from error
        return happened

    def _check_queue(self) -> None:
        if len(self._out) > self.limits.max_queued:
            raise Flood("The peer asks and asks but does not read the answers.")

    def _translate(self, event: h2.events.Event, now: float) -> Iterable[Happening]:
        match event:
            case h2.events.RequestReceived() | h2.events.ResponseReceived():
                yield self._headers_arrived(event)
            case h2.events.DataReceived():
                yield from self._data_arrived(event)
            case h2.events.StreamEnded():
                self._stream(event.stream_id).received = True
                self._forget_if_done(event.stream_id)
                yield BodyEnded(event.stream_id)
            case h2.events.StreamReset():
                self._unanswered.discard(event.stream_id or 0)
                if self._streams.pop(event.stream_id or 0, None) is not None and not self.client:
                    self._meter.cancelled_untrusted(now)
                yield StreamReset(event.stream_id, int(event.error_code or 0))
            case h2.events.WindowUpdated():
                yield WindowOpened(event.stream_id or 0)
            case h2.events.RemoteSettingsChanged():
                self._settings_seen = True
                yield SettingsArrived()
            case h2.events.PingAckReceived():
                if (freed := self.pings.acknowledged(bytes(event.ping_data or b""))) is not None:
                    yield PlacesFreed(freed)
            case h2.events.ConnectionTerminated():
                self.closed = True
                yield ConnectionEnded(_farewell_untrusted(event.additional_data))
            case h2.events.InformationalResponseReceived() | h2.events.TrailersReceived():
                self._meter.oddity_untrusted(now)
            case _:
                # Acknowledgements and extensions: nothing to do, and counted by the meter.
                pass

    def _headers_arrived(self, event: h2.events.RequestReceived | h2.events.ResponseReceived) -> HeadersArrived:
        stream_id = event.stream_id or 0
        self._unanswered.discard(stream_id)
        if not self.client:
            self._streams[stream_id] = _Stream()
        headers = tuple((bytes(name), bytes(value)) for name, value in event.headers or ())
        return HeadersArrived(stream_id, headers)

    def _data_arrived(self, event: h2.events.DataReceived) -> Iterable[Happening]:
        stream_id, data = event.stream_id or 0, bytes(event.data or b"")
        self._credit += event.flow_controlled_length or 0
        if self._credit >= self.limits.connection_window // 2:
            self._h2.increment_flow_control_window(self._credit)
            self._credit = 0
        padding = (event.flow_controlled_length or 0) - len(data)
        if padding:
            self.consumed(stream_id, padding)
        if data:
            yield DataArrived(stream_id, data)

    def _stream(self, stream_id: int | None) -> _Stream:
        return self._streams.setdefault(stream_id or 0, _Stream())

    def _forget_if_done(self, stream_id: int | None) -> None:
        stream = self._streams.get(stream_id or 0)
        if stream is not None and stream.received and stream.sent:
            del self._streams[stream_id or 0]

    def consumed(self, stream_id: int, size: int) -> None:
        """A reader has taken ``size`` bytes of a body: let the peer send as many more."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.received or self.closed:
            return
        stream.owed += size
        if stream.owed >= self.limits.stream_window // 2:
            self._h2.increment_flow_control_window(stream.owed, stream_id)
            stream.owed = 0
            self._collect()

    # --- what we send ----------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """How many requests a client may have under way; none before the server's settings came."""
        if not self._settings_seen:
            return 0
        return int(min(self.limits.max_streams, self._h2.remote_settings.max_concurrent_streams))

    @property
    def exhausted(self) -> bool:
        """Whether all stream ids of this connection are used up (RFC 9113 section 5.1.1)."""
        highest = self._h2.highest_outbound_stream_id
        return (highest + 2 if highest else 1) > self.limits.last_stream_id

    def open(self, headers: Headers, now: float, *, end: bool) -> int:
        """Begin a request; returns its stream id. The headers must have been checked."""
        stream_id = self._h2.get_next_available_stream_id()
        self._unanswered.add(stream_id)
        self.pings.expect(now)
        self._send_headers(stream_id, headers, end)
        self._meter.opened()
        return stream_id

    def respond(self, stream_id: int, headers: Headers, *, end: bool) -> None:
        """Begin an answer. The headers must have been checked."""
        self._send_headers(stream_id, headers, end)

    def _send_headers(self, stream_id: int, headers: Headers, end: bool) -> None:
        self._h2.send_headers(stream_id, headers, end_stream=end)
        self._sent(stream_id, end)

    def room(self, stream_id: int) -> int:
        """How many bytes of body may be sent on this stream as far as the peer's windows go."""
        return int(min(self._h2.local_flow_control_window(stream_id), self._h2.max_outbound_frame_size, MAX_FRAME))

    @property
    def connection_room(self) -> int:
        """How many bytes of body may be sent on all streams together."""
        return self._h2.outbound_flow_control_window

    @property
    def queue_full(self) -> bool:
        """Whether bodies should wait for the socket."""
        return len(self._out) >= self.limits.out_buffer

    def send_data(self, stream_id: int, data: bytes | memoryview, now: float, *, end: bool) -> None:
        """Send part of a body, no longer than `room`."""
        if not end:
            # The rest of a body is of interest only as long as somebody is there.
            self.pings.expect(now)
        self._h2.send_data(stream_id, data, end_stream=end)
        self._meter.sent(len(data))
        self._sent(stream_id, end)

    def _sent(self, stream_id: int, end: bool) -> None:
        self._stream(stream_id).sent = end
        self._forget_if_done(stream_id)
        self._collect()

    def is_open(self, stream_id: int) -> bool:
        """Whether either side of the stream is unfinished."""
        return not self.closed and stream_id in self._streams

    def reset(self, stream_id: int, code: ErrorCodes = ErrorCodes.CANCEL) -> bool:
        """Give a stream up at both ends. False when it was already over."""
        if not self.is_open(stream_id):
            return False
        del self._streams[stream_id]
        self._unanswered.discard(stream_id)
        self._h2.reset_stream(stream_id, code)
        if self.client:
            self.pings.hold()
        self._collect()
        return True

    def tick(self, now: float) -> bool:
        """Send a PING if one is due; False when the peer is dead. See `pings.deadline` for when to call."""
        if self.closed:
            return True
        if self.pings.is_dead(now):
            return False
        if (data := self.pings.due(now)) is not None:
            self._h2.ping(data)
            self._collect()
        return True

    def close(self, farewell: Farewell, code: ErrorCodes = ErrorCodes.NO_ERROR) -> None:
        """Say GOAWAY with a reason. Nothing else is sent or taken afterwards."""
        if self.closed:
            return
        self.closed = True
        said = msgspec.structs.replace(farewell, sentence=farewell.sentence[:MAX_REASON])
        self._h2.close_connection(code, additional_data=msgspec.json.encode(said))
        self._collect()

    # --- the queue -------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        self._out += self._h2.data_to_send()

    @property
    def queued(self) -> int:
        """Bytes that wait for the socket."""
        return len(self._out)

    def take(self, most: int) -> bytes:
        """The next bytes for the socket."""
        data = bytes(memoryview(self._out)[:most])
        del self._out[:most]
        return data


def _farewell_untrusted(data: bytes | None) -> Farewell:
    """What the peer said in GOAWAY; anything unreadable counts as nothing said."""
    if not data or len(data) > 4 * MAX_REASON:
        return Farewell()
    try:
        said = msgspec.json.decode(data, type=Farewell)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Farewell()
    wait = said.retry_after
    if wait is not None and not 0 <= wait <= MAX_RETRY_AFTER:
        wait = None
    sentence = "".join(c if c.isprintable() else " " for c in said.sentence[:MAX_REASON])
    return Farewell(sentence, wait)
