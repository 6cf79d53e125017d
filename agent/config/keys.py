"""The owner's configuration: what this machine offers, to which relay, within which limits.

The records here are the definition: every key, what it may be, its default and a sentence on it. `layers.load` reads
the owner's file, what `towpath config set` and other commands wrote beside it, and the environment, and answers
with frozen records, or raises `ConfigError` that lists *every* problem with file and line. Unknown keys and wrong
types are problems: a misspelt ``acess: read-only`` must never quietly mean read-write. `conf/agent.yaml` documents
every key for people, `conf/agent.schema.json` for editors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from agent.config.document import (
    MAX_CONFIG_BYTES,
    ConfigError,
    Entries,
    Problem,
    Section,
    build,
    compose,
    read_layer,
    setting,
)
from agent.config.kinds import (
    Address,
    Choice,
    FilePath,
    Flag,
    Folder,
    Host,
    InCollection,
    ListOf,
    Number,
    OrAuto,
    Origin,
    OrNull,
    Text,
    Uuid,
    is_uuid,
    relay_url_problem,
    words,
)
from agent.config.migrate import CURRENT, migrated
from agent.limits.kinds import Rate, WeeklyTime
from agent.watch.rule import Cron, Template

__all__ = [
    "MAX_CONFIG_BYTES",
    "AgentConfig",
    "BandwidthConfig",
    "BandwidthEntry",
    "CollectionConfig",
    "CollectionLimits",
    "ConfigError",
    "DataConfig",
    "LimitsConfig",
    "LogConfig",
    "MannersConfig",
    "MetricsConfig",
    "Problem",
    "RelayConfig",
    "UpdateConfig",
    "WatchConfig",
    "compose",
    "default_config_file",
    "default_state_dir",
    "is_uuid",
    "parse_config",
    "relay_url_problem",
]

MAX_COLLECTIONS = 1000
MAX_ADVERTISED = 16
MAX_RULES = 100
MAX_ENTRIES = 100
MAX_NAME = 255
PROXY = r"none|http://([^/@\s]+@)?[^/@\s]+"


@dataclass(frozen=True, kw_only=True)
class CollectionLimits:
    """How much may happen on one collection at a time; None: only the agent's own limits count."""

    sessions: int | None = setting(
        OrNull(Number(1, 64)),
        None,
        doc="Transfers into it and sessions reading from it at a time, each at most so many.",
    )


@dataclass(frozen=True, kw_only=True)
class CollectionConfig:
    """One storage root the owner offers. ``home`` and ``default_directory`` are paths inside the collection."""

    id: str = setting(Uuid(), doc="Id of the collection, given by the relay at set-up.", required=True)
    name: str = setting(Text(MAX_NAME), doc="What you call it (the relay may show another name).", required=True)
    root: str = setting(
        Folder(), doc="The directory that is the collection's /; nothing outside can be reached.", required=True
    )
    read_only: bool = setting(
        Choice({"read-only": True, "read-write": False}), False, key="access", doc="What others may do."
    )
    shareable: bool = setting(
        Flag(), False, key="sharing", doc="Whether parts of it may be shared with others through the relay."
    )
    hidden: bool = setting(
        Choice({"offered": True, "denied": False}),
        True,
        doc="Names that begin with a dot: offered like all others, or denied (not listed, read, changed or made).",
    )
    read_twice: bool = setting(
        Choice({"once": False, "twice": True}),
        False,
        key="reading",
        doc="How often what is sent is read; twice finds disks and memory that err, and costs about twice the reading.",
    )
    numbered_accounts: bool = setting(
        Choice({"own": False, "numbers": True}),
        False,
        key="access_lists",
        doc="Whom an access list may name that a transfer into it keeps: the owner, its group and all others only, or "
        "accounts, too, by their numbers.",
    )
    limits: CollectionLimits = setting(Section(CollectionLimits), doc="How much may happen on it at a time.")
    home: str = setting(InCollection(), "/", doc="Where /~/ and relative paths begin, a path inside the collection.")
    default_directory: str = setting(InCollection(), "/~/", doc="Where clients start, a path inside the collection.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where other agents may reach this one. Port 0 lets the system choose; an empty ``advertise`` means the
    addresses of the machine's own interfaces."""

    listen: str = setting(
        Address(),
        "::",
        doc="Address to listen on: 0.0.0.0 is every IPv4 address, :: every IPv6 and IPv4 address.",
    )
    port: int = setting(Number(0, 65535), 0, doc="Port to listen on; 0 lets the system choose one.")
    advertise: tuple[str, ...] = setting(
        ListOf(Host(), MAX_ADVERTISED, "addresses or host names"),
        (),
        doc="Addresses or names by which other agents reach this machine, when they are not those of its interfaces.",
    )
    relay: str = setting(
        words("allow", "until-direct", "never"),
        "allow",
        doc="Whether data may pass the relay's tunnel: always, until a direct path was found, or never.",
    )
    port_mapping: bool = setting(
        Flag(), True, doc="Whether to ask the router for a mapping of the data port (PCP, NAT-PMP, UPnP)."
    )
    allow_loopback: bool = setting(Flag(), False, doc="Offer 127.0.0.1 too, for several agents on one machine.")


@dataclass(frozen=True, kw_only=True)
class BandwidthEntry:
    """Limits of bandwidth that count at some times of the week, in place of the general ones."""

    name: str = setting(
        Text(64, "[A-Za-z0-9][A-Za-z0-9_ -]*", "letters, digits, spaces, - and _"),
        doc="Name of the entry.",
        required=True,
    )
    when: str = setting(
        WeeklyTime(),
        doc="Local times of the week: 'mon-fri 08:00-18:00', 'sat,sun', '22:00-06:00'.",
        required=True,
    )
    receive: int | None = setting(OrNull(Rate()), None, doc="All transfers to this machine together; null: no limit.")
    send: int | None = setting(OrNull(Rate()), None, doc="All transfers from this machine together; null: no limit.")
    task: int | None = setting(OrNull(Rate()), None, doc="Each transfer; null: no limit.")


@dataclass(frozen=True, kw_only=True)
class BandwidthConfig:
    """How fast content may move, in bytes a second; None: no limit. The first entry of the time-table that holds the
    present moment takes the place of the other three."""

    receive: int | None = setting(
        OrNull(Rate()), None, doc="All transfers to this machine together, such as 20 MB/s or 200 Mbit/s."
    )
    send: int | None = setting(OrNull(Rate()), None, doc="All transfers from this machine together.")
    task: int | None = setting(OrNull(Rate()), None, doc="Each transfer, in either direction.")
    timetable: tuple[BandwidthEntry, ...] = setting(
        Entries(BandwidthEntry, "entry", MAX_ENTRIES, "name"),
        doc="Other limits at some times of the week; the first entry that holds the moment counts.",
    )


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """How much of the machine transfers may use: worker processes at a time, lanes of one session, bandwidth."""

    workers: int = setting(Number(1, 64), 4, doc="Worker processes at a time. Each running session takes one.")
    lanes: int = setting(
        Number(1, 32), 4, doc="Most parallel connections of one session; how many there are is found by measuring."
    )
    workers_per_session: int | None = setting(
        OrAuto(Number(1, 16)),
        None,
        doc="Processes that receive one session's files (Linux): a number, or auto, by the task and the processors.",
    )
    spare_worker: bool = setting(
        Flag(), True, doc="Keep a process ready that workers come from, so that transfers begin at once (about 35 MB)."
    )
    cpu: int | None = setting(
        OrNull(Number(5, 1000)),
        None,
        doc="Most that each worker may compute, in percent of one processor; null: no limit.",
    )
    memory: int = setting(
        Number(16, 48), 48, doc="Content of one transfer that may be on its way and not yet settled here, in MiB."
    )
    bandwidth: BandwidthConfig = setting(Section(BandwidthConfig), doc="How fast content may move.")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What the log looks like and how large it may grow."""

    format: str = setting(
        words("text", "json"), "text", doc="text: one line an event for people; json: one object a line."
    )
    level: str = setting(words("debug", "info", "warning", "error"), "info", doc="The least that is written.")
    max_bytes: int = setting(
        Number(65536, 2**40), 10 * 1024 * 1024, doc="A log file is rotated before it grows beyond this."
    )
    keep: int = setting(Number(0, 100), 3, doc="Rotated log files that are kept.")


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """Where the agent's numbers can be read, in Prometheus's text format; nowhere unless configured."""

    port: int | None = setting(
        OrNull(Number(1, 65535)), None, doc="Answer http://127.0.0.1:PORT/metrics, to everybody on this machine."
    )
    textfile: Path | None = setting(
        OrNull(FilePath()), None, doc="Write them to this file, for the node exporter's textfile collector (*.prom)."
    )


@dataclass(frozen=True, kw_only=True)
class MannersConfig:
    """When transfers of this machine wait by themselves."""

    on_battery: str = setting(
        words("pause", "go-on"), "go-on", doc="What transfers do while the machine runs on battery."
    )
    on_metered: str = setting(
        words("pause", "go-on"), "go-on", doc="What transfers do in a metered network (where NetworkManager tells)."
    )
    busy_above: int | None = setting(
        OrNull(Number(5, 100)),
        None,
        doc="Transfers wait while other programs use more than this percentage of all processors; null: never.",
    )

    @property
    def wanted(self) -> bool:
        """Whether the machine has to be looked at, at all."""
        return "pause" in (self.on_battery, self.on_metered) or self.busy_above is not None


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """How an agent that was installed from a bundle comes to its updates."""

    mode: str = setting(
        words("auto", "notify", "off"),
        "auto",
        doc="auto: install when no task runs; notify: only say that there is one; off: do not look.",
    )
    interval: int = setting(
        Number(10, 30 * 86400), 6 * 3600, doc="Seconds between two looks; spread by a fifth either way."
    )
    channel: str = setting(Text(32, "[a-z][a-z0-9-]*", "a word of small letters"), "stable", doc="Which releases.")
    mirror: str | None = setting(
        OrNull(Text(500, "https?://[^ ]+", "a web address")),
        None,
        doc="Where to ask; null: the relay. Everything is signed by the project, so any copy will do.",
    )


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """A rule that transfers new files of a folder by itself."""

    name: str = setting(
        Text(64, "[A-Za-z0-9][A-Za-z0-9_-]*", "a word of letters, digits, - and _"),
        doc="Name of the rule.",
        required=True,
    )
    collection: str = setting(Uuid(), doc="The collection of this machine that holds the folder.", required=True)
    folder: str = setting(InCollection(), "/", doc="The folder in it that is watched.")
    destination: str = setting(Uuid(), doc="The collection that files go to.", required=True)
    template: str = setting(
        Template(),
        "/{path}",
        doc="Their path there. Fields: {name} {stem} {suffix} {path} {folder} {rule} {host}, and of the file's time "
        "{year} {month} {day} {hour} {minute} (UTC).",
    )
    recursive: bool = setting(Flag(), True, doc="Also folders in the folder.")
    include: tuple[str, ...] = setting(ListOf(Text(255), 64, "patterns"), (), doc="Only names that match one of these.")
    exclude: tuple[str, ...] = setting(
        ListOf(Text(255), 64, "patterns"),
        (".*", "*.part", "*.tmp", "~*"),
        doc="Not what matches one of these, nor what lies in folders that do.",
    )
    settle: int = setting(Number(0, 604800), 60, doc="Seconds without change after which a file counts as finished.")
    schedule: str | None = setting(
        OrNull(Cron()), None, doc="Cron expression (local time): go at these times, not as soon as files have settled."
    )
    sync_level: str | None = setting(
        OrNull(words("exists", "size", "mtime", "checksum")), None, doc="Leave out what the destination has already."
    )
    after: str = setting(
        words("keep", "delete", "move"), "keep", doc="What becomes of a file here once it has arrived, verified, there."
    )
    moved_to: str = setting(InCollection(), "/transferred", doc="With `after: move`: a folder of the same collection.")
    retries: int = setting(Number(0, 1000), 10, doc="How often a failed task is submitted anew, ever less often.")


@dataclass(frozen=True, kw_only=True)
class RelayConfig:
    """The relay; ``url`` is None until `towpath setup`. Without ``ca_file`` the system's trust store decides."""

    url: str | None = setting(OrNull(Origin()), None, doc="Origin of the relay, https only. `towpath setup` writes it.")
    ca_file: Path | None = setting(
        OrNull(FilePath()),
        None,
        doc="Certificate (PEM) of the authority that signed the relay's; null: the trust store of this system.",
    )
    proxy: str | None = setting(
        OrNull(Text(1000, PROXY, "none, or an address such as http://proxy.example.org:3128")),
        None,
        doc="HTTP proxy on the way to the relay; null: what HTTPS_PROXY and NO_PROXY say; none: no proxy in any case.",
    )
    transport: str = setting(
        words("auto", "raw", "websocket"),
        "auto",
        doc="How connections to the relay are wrapped; auto: raw, and WebSocket where only real HTTPS passes.",
    )


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Everything the owner configured."""

    version: int = setting(Number(1, CURRENT), CURRENT, doc="Version of this file's layout; older ones are understood.")
    profile: str = setting(
        words("standard", "login-node"), "standard", doc="login-node: manners for a machine shared by many people."
    )
    relay: RelayConfig = setting(Section(RelayConfig), doc="The relay this agent belongs to.")
    state_dir: Path = setting(
        OrNull(FilePath()),
        doc="Where the agent keeps its key, its identity, the journals of running tasks and its log.",
    )
    collections: tuple[CollectionConfig, ...] = setting(
        Entries(CollectionConfig, "collection", MAX_COLLECTIONS), doc="What this machine offers."
    )
    data: DataConfig = setting(Section(DataConfig), doc="The data port: other agents connect here to move data.")
    limits: LimitsConfig = setting(Section(LimitsConfig), doc="How much of this machine transfers may use.")
    log: LogConfig = setting(Section(LogConfig), doc="The agent's log.")
    metrics: MetricsConfig = setting(Section(MetricsConfig), doc="The agent's numbers, for Prometheus.")
    manners: MannersConfig = setting(Section(MannersConfig), doc="When transfers of this machine wait by themselves.")
    update: UpdateConfig = setting(Section(UpdateConfig), doc="Updates of an agent that was installed from a bundle.")
    watch: tuple[WatchConfig, ...] = setting(
        Entries(WatchConfig, "rule", MAX_RULES, "name"), doc="Rules that transfer new files by themselves."
    )


def default_config_file(environment: Mapping[str, str] = os.environ) -> Path:
    """``towpath/agent.yaml`` below the user's configuration directory (XDG Base Directory Specification)."""
    return _xdg(environment, "XDG_CONFIG_HOME", ".config") / "towpath" / "agent.yaml"


def default_state_dir(config_file: Path, environment: Mapping[str, str] = os.environ) -> Path:
    """Where state goes when the configuration names no place.

    The default configuration keeps its state below the user's state directory; any other file keeps it beside
    itself, so that two agents of one user never meet by accident.
    """
    if config_file == default_config_file(environment):
        return _xdg(environment, "XDG_STATE_HOME", ".local/state") / "towpath" / "agent"
    return config_file.parent / f"{config_file.stem}.state"


def _xdg(environment: Mapping[str, str], variable: str, below_home: str) -> Path:
    value = environment.get(variable, "")
    # The specification tells programs to ignore relative paths here.
    return Path(value) if value.startswith("/") else Path.home() / below_home


def parse_config(data: bytes, file: Path) -> AgentConfig:
    """Check the text of the owner's file alone; ``file`` is used in messages and for paths relative to it."""
    layer = read_layer(document(data, file), AgentConfig, file)
    return finished(layer.values, file)


def document(data: bytes, file: Path) -> yaml.Node | None:
    """The YAML of a configuration in today's layout. Raises `ConfigError`."""
    return migrated(compose(data, file), file)


def finished(values: Mapping[str, object], file: Path) -> AgentConfig:
    """The records of checked values; where state goes is filled in."""
    return build(AgentConfig, {**values, "state_dir": values.get("state_dir") or default_state_dir(file)})
