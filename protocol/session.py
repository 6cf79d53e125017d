"""The control stream of a session: what a destination asks of a source, and what the source answers.

The destination drives and the source is stateless: it lists, reads and digests. Each message is a msgpack map behind a
four-byte big-endian length; unknown keys are ignored. Requests carry a number ``r`` chosen by the destination;
answers repeat it. File contents do not travel here but on lanes (`protocol.lane`). What decoding cannot tell, because
it concerns several fields at once, is checked in `protocol.session_checks`.

Paths are bytes relative to the source collection's root, components joined by ``/``, no leading slash, empty for the
root itself; the side that receives one checks it with `path_untrusted` before any use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from protocol.errors import ProtocolError
from protocol.names import CollectionPath, check_component_untrusted, is_reserved

ALPN_CONTROL = "towpath-session/1"
# The same, of a source that takes requests before it has answered the greeting, and requests for a lane before that
# lane has greeted. A destination learns it in the handshake, in time for its first flight.
ALPN_CONTROL_AHEAD = "towpath-session/1.1"
# What both sides name for a control stream, in the order in which they want it.
ALPNS_CONTROL = (ALPN_CONTROL_AHEAD, ALPN_CONTROL)
ALPN_LANE = "towpath-lane/1"
SNI_SUFFIX = ".session.towpath"

PREFIX = 4
MAX_MESSAGE = 8 * 1024 * 1024
MAX_PATH = 16 * 1024
# How many rows a source sends in one message, and how many messages of one listing may be under way.
ROWS_IN_MESSAGE = 1000
LISTING_WINDOW = 4
MAX_PACK_FILES = 1024
# Bytes of content that may be asked for before it is known what there is.
MAX_TAKEN = 4 * 1024 * 1024
# Blocks between these sizes are accepted by either side.
MIN_BLOCK = 64 * 1024
MAX_BLOCK = 16 * 1024 * 1024
MAX_RANGE = 64 * 1024 * 1024
# A side that hears nothing for two of these takes the session for dead (seconds).
KEEPALIVE = 15.0

# Kinds of directory entries on the wire.
FILE, DIRECTORY, SYMLINK, OTHER = 0, 1, 2, 3

# Device, inode, size, mtime_ns and ctime_ns of a source file: two reads with equal versions read the same content.
Version = tuple[int, int, int, int, int]


# Offset and length of a part of a file that holds data.
Extent = tuple[int, int]
# Abilities a source may announce in its `HelloAnswer`.
EXTENTS = "extents"
BLOCK_DIGESTS = "block digests"
LANE_READINGS = "lane readings"
# Abilities a destination may announce in its `Hello`: it takes content compressed with zstd where that pays; it wants
# all of it so.
ZSTD, ZSTD_ALWAYS = "zstd", "zstd always"
ATTRIBUTES, ACCESS_LISTS = "attributes", "access lists"
# Lanes in one answer to `ReadLanes`, and times of each.
MAX_READINGS, LANE_TIMES = 256, 5
# Files in one `ReadAttributes`, and the bytes of attributes from which on its answer holds no further file.
MAX_ATTRIBUTE_FILES, ATTRIBUTE_BYTES = 250, 1024 * 1024
# Digests of blocks in one answer.
MAX_DIGESTS = 1024


# In place of a file's target, see `Row`. Versions of before send none, and do not look at it.
LOOK_AGAIN, NARROWED = b"look again", b"narrowed"


class Row(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One directory entry. ``target`` is the text of a symlink; of a file, it says that its access list could not be
    looked at, so that its mode gives the group what everybody has: `LOOK_AGAIN` where that may pass, else `NARROWED`.
    ``links`` is how many names a file has; later versions may append fields."""

    name: bytes
    kind: int
    size: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    mtime_ns: int
    ctime_ns: int
    device: int
    inode: int
    mode: int
    target: bytes | None = None
    links: int = 1

    @property
    def version(self) -> Version:
        return (self.device, self.inode, self.size, self.mtime_ns, self.ctime_ns)


class PackFile(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One small file asked for in a pack: its name in the pack's directory and the version that was listed."""

    name: bytes
    version: Version


class Message(msgspec.Struct, tag_field="t", frozen=True):
    """Base of all control messages."""


# --- destination to source ---------------------------------------------------------------------------------


class Hello(Message, tag="hello", frozen=True):
    """First message. ``instance`` is random; lanes name it to join this control stream."""

    ticket: str
    instance: bytes
    version: str = ""
    abilities: list[str] = []


class ListDirectory(Message, tag="list", frozen=True):
    """Ask for the rows of one directory. With ``follow`` symlinks are reported as what they point to."""

    r: int
    path: bytes
    follow: bool = False


class MoreRows(Message, tag="more", frozen=True):
    """One message of rows was consumed: the source may send one more."""

    r: int


class StatPaths(Message, tag="stat", frozen=True):
    """Ask what each path is. With ``follow`` a symlink is reported as what it points to."""

    r: int
    paths: list[bytes]
    follow: bool = True


class TakePaths(Message, tag="take", frozen=True):
    """Ask what each path is, as `StatPaths` does, and for the content of those of the first ``count`` that are small
    files (see `fitting`), which comes on a lane as an answer to a `ReadPack` of the number ``pack``. Only of a source
    that may be asked ahead (`ALPN_CONTROL_AHEAD`)."""

    r: int
    paths: list[bytes]
    lane: int
    pack: int
    count: int
    largest: int
    most: int
    follow: bool = True


class ReadRange(Message, tag="read", frozen=True):
    """Ask for part of a file in blocks of ``block`` bytes on one lane."""

    r: int
    lane: int
    path: bytes
    version: Version
    offset: int
    length: int
    block: int
    follow: bool = False


class ReadPack(Message, tag="pack", frozen=True):
    """Ask for several small files, whole, on one lane; their names are paths below ``directory``."""

    r: int
    lane: int
    directory: bytes
    files: list[PackFile]
    follow: bool = False


class DigestFile(Message, tag="digest", frozen=True):
    """Ask for the digest of a whole file."""

    r: int
    path: bytes
    algorithm: str
    version: Version | None = None
    follow: bool = False


class FindExtents(Message, tag="extents", frozen=True):
    """Ask which parts of a file hold data; only of a source with the ability `EXTENTS`."""

    r: int
    path: bytes
    version: Version
    follow: bool = False


class DigestBlocks(Message, tag="blocks", frozen=True):
    """Ask for the BLAKE3 digests of some blocks of a file; only of a source with the ability `BLOCK_DIGESTS`."""

    r: int
    path: bytes
    version: Version
    block: int
    first: int
    count: int
    follow: bool = False


class AttributesOf(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A file or folder whose extended attributes are asked for; a file with the version that was listed."""

    path: bytes
    version: Version | None = None


class ReadAttributes(Message, tag="attributes", frozen=True):
    """Ask for extended attributes; only of a source with the ability `ATTRIBUTES`. ``lists`` asks for access lists
    besides, of a source with the ability `ACCESS_LISTS`, which also understands that no ``attributes`` are wanted."""

    r: int
    files: list[AttributesOf]
    follow: bool = False
    attributes: bool = True
    lists: bool = False


class ReadLanes(Message, tag="lanes", frozen=True):
    """Ask what the source measures of the session's lanes; only of a source with the ability `LANE_READINGS`."""

    r: int


class Abandon(Message, tag="abandon", frozen=True):
    """The answer to a request is no longer wanted."""

    r: int


class RenewTicket(Message, tag="renew", frozen=True):
    """A newer ticket for the same session."""

    ticket: str


class Ping(Message, tag="ping", frozen=True):
    """Say something, so that silence means death."""


Request = (
    Hello
    | ListDirectory
    | MoreRows
    | StatPaths
    | TakePaths
    | ReadRange
    | ReadPack
    | DigestFile
    | FindExtents
    | DigestBlocks
    | ReadAttributes
    | ReadLanes
    | Abandon
    | RenewTicket
    | Ping
)


# --- source to destination ---------------------------------------------------------------------------------


class HelloAnswer(Message, tag="welcome", frozen=True):
    """The source accepted the ticket. ``hides``: it lists no names that begin with a dot, which may be there."""

    version: str = ""
    abilities: list[str] = []
    hides: bool = False


class Rows(Message, tag="rows", frozen=True):
    """Some rows of a listing; ``last`` ends it. Then ``changed`` says that names came, went or changed in the folder
    meanwhile, so that one of them may be missing that was there all the time under one name or the other; and
    ``recent``, that they did since the session began, or shortly before (None: a source that does not tell).
    ``mtime_ns`` is the folder's time as the listing began (None, too)."""

    r: int
    rows: list[Row]
    last: bool = False
    changed: bool = False
    recent: bool | None = None
    mtime_ns: int | None = None


class StatResult(msgspec.Struct, array_like=True, frozen=True):
    """What one path is, or why that cannot be told."""

    row: Row | None
    error: dict[str, Any] | None = None


class Stats(Message, tag="stats", frozen=True):
    """Answer to `StatPaths`, in its order."""

    r: int
    results: list[StatResult]


class Digest(Message, tag="digested", frozen=True):
    """Answer to `DigestFile`: lower-case hex."""

    r: int
    value: str


class Extents(Message, tag="parts", frozen=True):
    """Answer to `FindExtents`, in order; null when that cannot be told."""

    r: int
    extents: list[Extent] | None


class BlockDigests(Message, tag="digests", frozen=True):
    """Answer to `DigestBlocks`, in order."""

    r: int
    digests: list[bytes]


class FileAttributes(msgspec.Struct, array_like=True, frozen=True):
    """The extended attributes of one file or folder, how many more it has that cannot be given, and how many grant
    rights (access lists, capabilities) and are not given. Names are those of the user's namespace, without it: no other
    can be said. Where access lists were asked for they do not count there: ``access`` and ``default`` are they (see
    docs/protocol.md), empty for none, and ``lists_left_out`` is how many there are besides. ``error``: why nothing
    could be looked at, where that may pass; what is left out is to be asked for again then."""

    attributes: list[tuple[bytes, bytes]]
    left_out: int = 0
    rights: int = 0
    access: bytes = b""
    default: bytes = b""
    lists_left_out: int = 0
    error: dict[str, Any] | None = None


class Attributes(Message, tag="attributed", frozen=True):
    """Answer to `ReadAttributes`, in order: at least one file, and as many as go into one answer."""

    r: int
    files: list[FileAttributes]


class LaneReading(msgspec.Struct, array_like=True, frozen=True):
    """What a source measures of one lane. All times are seconds since the lane's beginning: what its thread did (idle,
    held back by a limit, reading, digesting, sending), and what the kernel says of its sender: in how much of the time
    there was something to send (null: unknown), and the receiver's window was in the way."""

    lane: int
    content: int
    times: list[float]
    rtt: float | None = None
    retransmissions: int = 0
    busy: float | None = None
    window: float = 0.0


class LaneReadings(Message, tag="readings", frozen=True):
    """Answer to `ReadLanes`. ``processor``: seconds of processor time of the source's process so far, ``now``: its
    clock. ``silent``: its storage is waited for and does not answer."""

    r: int
    now: float
    processor: float
    lanes: list[LaneReading]
    silent: bool = False


class Failed(Message, tag="failed", frozen=True):
    """A request failed; ``error`` is an error document. With ``r`` 0 the whole session is refused."""

    r: int
    error: dict[str, Any]


class Pong(Message, tag="pong", frozen=True):
    """Answer to `Ping`."""


Answer = HelloAnswer | Rows | Stats | Digest | Extents | BlockDigests | Attributes | LaneReadings | Failed | Pong

_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(Request)
_answer_decoder = msgspec.msgpack.Decoder(Answer)


def encode(message: Message) -> bytes:
    """One message with its length in front. Raises ValueError when it is larger than a peer accepts."""
    body = _encoder.encode(message)
    if len(body) > MAX_MESSAGE:
        raise ValueError(f"A control message of {len(body)} bytes is larger than allowed.")
    return len(body).to_bytes(PREFIX, "big") + body


def request_untrusted(body: bytes | bytearray) -> Request:
    """A destination's message. Raises only `ProtocolError`."""
    message: Request = _decode(_request_decoder, body)
    return message


def answer_untrusted(body: bytes | bytearray) -> Answer:
    """A source's message. Raises only `ProtocolError`."""
    message: Answer = _decode(_answer_decoder, body)
    return message


def _decode(decoder: msgspec.msgpack.Decoder[Any], body: bytes | bytearray) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"A session message of the peer cannot be read: {error}") from error


class MessageReader:
    """Cuts a byte stream into message bodies. Feed it what arrives, take what is whole."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed_untrusted(self, data: bytes | bytearray) -> list[bytes]:
        """Whole bodies that are complete now. Raises `ProtocolError` for an impossible length."""
        self._buffer += data
        bodies = []
        start = 0
        while len(self._buffer) - start >= PREFIX:
            length = int.from_bytes(self._buffer[start : start + PREFIX], "big")
            if length > MAX_MESSAGE:
                raise ProtocolError(f"A session message of {length} bytes is larger than {MAX_MESSAGE} bytes.")
            if len(self._buffer) - start - PREFIX < length:
                break
            bodies.append(bytes(self._buffer[start + PREFIX : start + PREFIX + length]))
            start += PREFIX + length
        if start:
            del self._buffer[:start]
        return bodies

    @property
    def pending(self) -> int:
        """Bytes of an incomplete message held."""
        return len(self._buffer)


def join_path(path: Sequence[bytes]) -> bytes:
    """Components as they travel on a session."""
    return b"/".join(path)


def path_untrusted(raw: bytes) -> CollectionPath:
    """Components of a path from a peer, every one checked. Raises only `ProtocolError`."""
    if len(raw) > MAX_PATH:
        raise ProtocolError("A path of the peer is too long.")
    if not raw:
        return ()
    return tuple(map(name_untrusted, raw.split(b"/")))


def name_untrusted(raw: bytes) -> bytes:
    """One component of a path from a peer. Raises only `ProtocolError`."""
    if is_reserved(check_component_untrusted(raw)):
        raise ProtocolError("Names that begin with .towpath. are the agent's own.", code="ILLEGAL_NAME")
    return raw


def fitting(rows: Sequence[Row | None], largest: int, most: int) -> list[int]:
    """Which of these are files of at most ``largest`` bytes, in their order, as many as have ``most`` bytes together.

    Both sides choose by this, so that it need not be said.
    """
    chosen, total = [], 0
    for index, row in enumerate(rows):
        if row is not None and row.kind == FILE and row.size <= largest and total + row.size <= most:
            chosen.append(index)
            total += row.size
    return chosen[:MAX_PACK_FILES]
