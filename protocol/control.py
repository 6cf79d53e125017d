"""The documents that travel on the link between a relay and an agent, as typed records.

All of them are JSON objects. Unknown keys are ignored (an older side must understand a newer one), missing
keys take the defaults written here, and every length that a peer chooses is bounded by `decode_untrusted`.
Paths and names are *escaped text* (see `protocol.names`); times are ISO 8601 in UTC with microseconds.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import msgspec

from protocol.candidates import Arrangement, PathAnswer, PathOffer
from protocol.candidates import Candidate as Candidate
from protocol.errors import ProtocolError
from protocol.record import Record as Record

MAX_DOCUMENT = 64 * 1024 * 1024
MAX_ITEMS = 100_000
# What a listing may be asked for: entries of one page, filters, and characters of each.
MAX_ENTRIES = 100_000
MAX_FILTERS = 32
MAX_FILTER = 4096

Desired = Literal["run", "pause", "cancel"]
TaskType = Literal["TRANSFER", "DELETE"]
TaskState = Literal["QUEUED", "ACTIVE", "WAITING", "PAUSED", "SUCCEEDED", "FAILED", "CANCELED"]
# Whether a task's bytes may pass the relay's tunnel: at any time, until a direct path was found, not at all.
RelayPath = Literal["allow", "until-direct", "never"]
Transport = Literal["tcp", "quic", "auto"]
Compression = Literal["auto", "on", "off"]
EntryType = Literal["file", "dir", "invalid_symlink", "chr", "blk", "pipe", "other"]

# Abilities an agent may announce in its hello: it takes a session and what the relay arranges for it while the other
# side is still being told; its data may go through the relay's tunnel; it shows its punching ports to the relay when a
# task is ordered, and punches when the relay has seen both sides'.
ARRANGED, TUNNELLED, MEETS = "arranged", "tunnel", "meets"

FINAL_STATES: frozenset[str] = frozenset({"SUCCEEDED", "FAILED", "CANCELED"})


# --- hello -----------------------------------------------------------------------------------------------


class RelayHello(Record, frozen=True, kw_only=True):
    """First request on every link, relay to agent. ``proof`` is a signed JWT, see `protocol.link`. ``stun_ports`` are
    the relay's UDP ports for STUN; over TCP its one port serves. ``watch``: see `AgentHello`; the shortest the relay
    bears now."""

    relay_id: str
    nonce: str
    proof: str
    key_certificate: str
    version: str = ""
    abilities: list[str] = []
    stun_ports: list[int] = []
    watch: float = 0.0


class CollectionReport(Record, frozen=True, kw_only=True):
    """What the owner's configuration says of one collection; the relay may narrow it, never widen it."""

    id: str
    name: str
    read_only: bool = False
    shareable: bool = False
    available: bool = True
    default_directory: str = "/~/"
    # Where ``~`` and relative paths begin.
    home: str = "/"
    reason: str = ""


class MissingCollections(Record, frozen=True, kw_only=True):
    """Of the collections that an agent has named, those that the relay does not have as this agent's (any more)."""

    ids: list[str]


class AgentHello(Record, frozen=True, kw_only=True):
    """The agent's answer: who it is (signed over nonce and channel), what it has, which events it holds.

    ``tasks`` is how many it holds that are not closed, so that a relay need not ask those that have none.
    ``watch``: the link goes through something (a proxy) that answers for a peer that has vanished, so the agent asks
    for a sign of life after so many seconds of silence; 0 where the kernels at both ends watch.
    ``candidates``: where its data port is dialled without any arrangement, as known at this moment.
    """

    node_id: str
    endpoint_id: str
    signature: str
    certificate: str
    version: str = ""
    abilities: list[str] = []
    collections: list[CollectionReport] = []
    boot_id: str = ""
    paused: bool = False
    last_event: int = 0
    tasks: int | None = None
    watch: float = 0.0
    candidates: list[Candidate] = []


# --- listings --------------------------------------------------------------------------------------------

# What a listing can hold: sizes as systems keep them, and names of 255 bytes and more, of which each may be escaped as
# three characters. Times are of any year: agents of before did not bound them.
Size: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Mode: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=4096)]
LinkTarget: TypeAlias = Annotated[str, msgspec.Meta(max_length=16384)]


class Entry(Record, frozen=True, kw_only=True):
    """One row of a directory listing. ``mode`` holds permission bits only; times are nanoseconds since 1970.

    A symlink is reported with the type, size and time of its target, and ``link_*`` set.
    """

    name: Name
    type: EntryType
    size: Size = 0
    mtime_ns: int = 0
    mode: Mode = 0
    user: Name = ""
    group: Name = ""
    link_target: LinkTarget | None = None
    link_size: Size | None = None
    link_mtime_ns: int | None = None


class Listing(Record, frozen=True, kw_only=True):
    """Answer to ``ls``: ``path`` is canonical and ends in a slash; ``total`` counts rows after filtering."""

    path: str
    absolute_path: str
    entries: list[Entry]
    total: Size
    offset: Size = 0
    limit: Size = 100_000


# --- tasks -----------------------------------------------------------------------------------------------


class FilterRule(Record, frozen=True, kw_only=True):
    """One include or exclude rule; first match wins, unmatched names are included."""

    method: Literal["include", "exclude"]
    name: str
    type: Literal["file", "dir"] | None = None


class TaskOptions(Record, frozen=True, kw_only=True):
    """How a task is to be done; names and meanings are those of the Globus transfer and delete documents."""

    sync_level: int | None = None
    verify_checksum: bool = False
    preserve_timestamp: bool = False
    encrypt_data: bool = False
    skip_source_errors: bool = False
    fail_on_quota_errors: bool = False
    delete_destination_extra: bool = False
    # How many files and folders a mirror may delete; None: no more than stay, or a thousand.
    delete_destination_extra_limit: int | None = None
    recursive_symlinks: Literal["ignore", "keep", "copy"] = "ignore"
    # Take over extended attributes of the user's namespace.
    preserve_xattrs: bool = False
    # Take over access lists (POSIX), as far as the destination's owner lets them name accounts.
    preserve_acls: bool = False
    # Keep several names of one file as such.
    preserve_hard_links: bool = False
    filter_rules: list[FilterRule] = []
    recursive: bool = False
    ignore_missing: bool = False
    interpret_globs: bool = False
    relay_path: RelayPath = "allow"
    transport: Transport = "auto"
    # Compress content on its way: where it pays, all of it, never.
    compression: Compression = "auto"
    # The most that the task may move, in bytes a second; may change while it runs.
    bandwidth_limit: int | None = None


class TaskItem(Record, frozen=True, kw_only=True):
    """One line of a submission. ``recursive`` None means: look whether it is a file or a directory.

    For DELETE tasks only ``source_path`` is used.
    """

    source_path: str
    destination_path: str = ""
    recursive: bool | None = None
    symlink: bool = False
    external_checksum: str | None = None
    checksum_algorithm: str | None = None


class Party(Record, frozen=True, kw_only=True):
    """One side of a task: the logical endpoint, the node that serves it, the collection, and the node's
    certificate (PEM) to which every connection of the task is pinned."""

    endpoint_id: str
    node_id: str
    collection_id: str
    certificate: str
    display_name: str = ""


class SessionOrder(Record, frozen=True, kw_only=True):
    """Relay to source: a destination with this certificate will dial under this session id."""

    session_id: str
    task_id: str
    ticket: str
    peer: Party
    observed: str = ""
    peer_observed: str = ""
    relay_path: RelayPath = "allow"
    arranged: Arrangement | None = None


class SessionAnswer(Record, frozen=True, kw_only=True):
    """Source to relay, and on to the destination: where to dial, which certificate to expect.

    ``observed`` and ``peer_observed`` are added by the relay: the addresses from which it sees the reader's link and
    the other side's (see `protocol.candidates`). With ``generation`` 0 the relay says what the source told at its link,
    and asks it at the same time. ``instance`` is another one after each start of the source's agent, so that what a
    destination has of an earlier one is known to be gone; empty where it is not known."""

    session_id: str
    generation: int
    candidates: list[Candidate]
    certificate: str
    observed: str = ""
    peer_observed: str = ""
    instance: str = ""


class TaskOrder(Record, frozen=True, kw_only=True):
    """The relay's desired state of a task. Orders with a lower ``revision`` than one already seen are ignored.

    The first order of a task carries everything; later ones may leave ``items`` null (unchanged).
    For a DELETE task ``destination`` is the endpoint to delete on and ``source`` is null.
    ``arranged`` is of use for a moment and not kept.
    """

    task_id: str
    revision: int
    desired: Desired
    type: TaskType
    ticket: str
    session_id: str
    destination: Party
    source: Party | None = None
    owner_id: str = ""
    owner: str = ""
    label: str = ""
    deadline: str | None = None
    options: TaskOptions = TaskOptions()
    items: list[TaskItem] | None = None
    session: SessionAnswer | None = None
    arranged: Arrangement | None = None


class Counters(Record, frozen=True, kw_only=True):
    """Absolute counts of one task so far; they only grow, so a lost progress report loses nothing.

    ``hard_links``: files with more names than one at the source, each of which becomes a file of its own but for
    ``hard_links_kept``, which became further names of another one;
    ``special_modes``: files with setuid, setgid or sticky, which are not taken over;
    ``xattrs_left_out``: files and folders that lack extended attributes of their source although these were asked for;
    ``acls_kept``, ``acls_not_kept``, ``acls_refused``: files and folders with access lists at the source, where these
    were asked for: that have them as they were; that do not, or not in full, by somebody's policy; whose destination's
    file system did not take them.
    """

    files: int = 0
    directories: int = 0
    symlinks: int = 0
    files_transferred: int = 0
    files_skipped: int = 0
    symlinks_transferred: int = 0
    directories_created: int = 0
    deleted: int = 0
    bytes_total: int = 0
    bytes_transferred: int = 0
    bytes_checksummed: int = 0
    bytes_sent_again: int = 0
    skipped_errors: int = 0
    failed: int = 0
    hard_links: int = 0
    hard_links_kept: int = 0
    special_modes: int = 0
    xattrs_left_out: int = 0
    acls_kept: int = 0
    acls_not_kept: int = 0
    acls_refused: int = 0
    retrying: int = 0
    faults: int = 0
    scan_complete: bool = False


class LaneFlow(Record, frozen=True, kw_only=True):
    """One lane of a running task: content bytes a second, round-trip time in seconds where it is known, and packets
    sent again so far."""

    lane: int
    goodput: float = 0.0
    # Of the goodput, what compression kept off the network.
    saved: float = 0.0
    rtt: float | None = None
    retransmissions: int = 0


class Flow(Record, frozen=True, kw_only=True):
    """How the content of a running task flows at the moment. ``limited_by`` is what holds it up: ``source disk``,
    ``source CPU``, ``network``, ``destination CPU``, ``destination disk``, ``a limit``, ``planning``, or empty when
    that is not known; ``rate_limit`` is the limit in force (bytes a second) and ``limit_of`` whose it is. ``renewed``
    counts lanes that were followed by others because their keys had protected enough."""

    limited_by: str = ""
    goodput: float = 0.0
    files_per_second: float = 0.0
    rate_limit: int | None = None
    limit_of: str = ""
    lanes: list[LaneFlow] = []
    renewed: int = 0


class TaskObserved(Record, frozen=True, kw_only=True):
    """The agent's observed state of a task. ``status_code`` is OK, QUEUED or the code of what holds it up; with
    ``needs_person`` it goes on when ``who`` has done something about that, and not by itself."""

    task_id: str
    revision: int
    state: TaskState
    status_code: str = "OK"
    status_sentence: str = ""
    who: str = ""
    counters: Counters = Counters()
    rate: float = 0.0
    current: str = ""
    path: str = ""
    error_code: str = ""
    completion_time: str | None = None
    flow: Flow | None = None
    needs_person: bool = False


class TaskList(Record, frozen=True, kw_only=True):
    """``GET /link/task-list``: every task that the agent drives and that is not closed."""

    tasks: list[TaskObserved]


class AgentEvent(Record, frozen=True, kw_only=True):
    """One line of ``GET /link/events``.

    ``n`` numbers durable lines of one agent, in order, without gaps; 0 marks a line that is not kept
    (progress). ``(task_id, seq)`` identifies an event for ever, so a repeated line changes nothing.

    kinds: ``event`` (a task event for people), ``state`` (``observed`` is set, durable when the state changed),
    ``progress`` (``observed`` is set, n = 0), ``session_wanted`` (the destination needs a SessionAnswer newer
    than ``generation``, n = 0), ``collections`` (the owner changed the configuration: ``collections`` is set, n = 0),
    ``path_offer`` (the destination wants a path arranged: ``offer`` is set, n = 0), ``path_candidates`` (the source of
    a task can be reached at more addresses than its answer to the newest offer said: ``candidates`` is set, n = 0).
    """

    n: int
    kind: str
    time: str
    task_id: str = ""
    seq: int = 0
    code: str = ""
    description: str = ""
    details: str = ""
    is_error: bool = False
    generation: int = 0
    observed: TaskObserved | None = None
    collections: list[CollectionReport] | None = None
    offer: PathOffer | None = None
    candidates: PathAnswer | None = None


class SuccessfulTransfer(Record, frozen=True, kw_only=True):
    """One row of the manifest of what was transferred."""

    source_path: str
    destination_path: str
    size: int
    checksum: str | None = None
    checksum_algorithm: str | None = None
    dynamic: bool = False


class SkippedError(Record, frozen=True, kw_only=True):
    """One item that was left out, and why."""

    source_path: str
    destination_path: str
    error_code: str
    error_details: str
    error_time: str
    is_directory: bool = False
    is_symlink: bool = False
    is_delete_destination_extra: bool = False
    external_checksum: str | None = None
    checksum_algorithm: str | None = None


class Page(Record, frozen=True, kw_only=True):
    """One page of rows read on demand; ``next_marker`` is null at the end."""

    rows: list[dict[str, Any]]
    next_marker: str | None = None


# --- enrolment -------------------------------------------------------------------------------------------


class EnrolRequest(Record, frozen=True, kw_only=True):
    """``POST /towpath/v1/enrol``: redeem a one-time setup key. ``proof`` is a JWT signed by the node key over
    the SHA-256 of the setup key, so that nobody can enrol a key they do not hold."""

    setup_key: str
    proof: str
    certificate: str
    node_id: str | None = None
    hostname: str = ""
    version: str = ""
    # Of the collection that the key is for; later the agent's reports say it.
    home: str = "/"


class EnrolAnswer(Record, frozen=True, kw_only=True):
    """Who the node now is. ``relay_root`` (PEM, Ed25519 public key) is pinned for good."""

    endpoint_id: str
    node_id: str
    collection_id: str
    display_name: str
    owner: str
    owner_id: str
    relay_id: str
    relay_root: str


R = TypeVar("R")


def encode(document: object) -> bytes:
    """One wire record as JSON."""
    return msgspec.json.encode(document)


def decode_untrusted(data: bytes | bytearray | memoryview, kind: type[R]) -> R:
    """One wire record from a peer's JSON. Raises only `ProtocolError`."""
    if len(data) > MAX_DOCUMENT:
        raise ProtocolError(f"A document of {len(data)} bytes is larger than {MAX_DOCUMENT} bytes, the most allowed.")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"A document of the peer cannot be read: {error}") from error
