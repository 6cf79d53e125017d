"""The owner's configuration: what this machine offers, to which relay, within which limits.

`load_config` reads the YAML file and answers with frozen records, or raises `ConfigError` that lists *every* problem
with file and line. Unknown keys and wrong types are problems: a misspelt ``acess: read-only`` must never
quietly mean read-write. `conf/agent.yaml` documents every key.
"""

from __future__ import annotations

import ipaddress
import os
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

import yaml

from protocol.errors import TowpathError

MAX_CONFIG_BYTES = 1024 * 1024
MAX_COLLECTIONS = 1000
MAX_ADVERTISED = 16
MAX_NAME = 255
MAX_PATH_TEXT = 4096

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CollectionConfig:
    """One storage root the owner offers. ``home`` and ``default_directory`` are paths inside the collection."""

    id: str
    name: str
    root: str
    read_only: bool = False
    shareable: bool = False
    home: str = "/"
    default_directory: str = "/~/"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where other agents may reach this one. Port 0 lets the system choose; an empty ``advertise`` means the
    addresses of the machine's own interfaces."""

    listen: str = "0.0.0.0"  # noqa: S104 - the data port is meant to be reached by other machines
    port: int = 0
    advertise: tuple[str, ...] = ()
    allow_loopback: bool = False


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """How much of the machine transfers may use: worker processes at a time, lanes of one session."""

    workers: int = 4
    lanes: int = 2


@dataclass(frozen=True, kw_only=True)
class RelayConfig:
    """The relay; ``url`` is None until `towpath setup`. Without ``ca_file`` the system's trust store decides."""

    url: str | None = None
    ca_file: Path | None = None


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Everything the owner configured."""

    state_dir: Path
    relay: RelayConfig = field(default_factory=RelayConfig)
    collections: tuple[CollectionConfig, ...] = ()
    data: DataConfig = field(default_factory=DataConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)


class Problem(NamedTuple):
    """One thing wrong with a configuration file; ``line`` counts from 1."""

    line: int
    sentence: str


class ConfigError(TowpathError):
    """The configuration cannot be used. ``problems`` holds every mistake found, in the order of the file."""

    default_code = "CONFIG_ERROR"

    def __init__(self, file: Path, problems: list[Problem]) -> None:
        self.file = file
        self.problems = sorted(problems)
        super().__init__("\n".join(f"{file}:{line}: {sentence}" for line, sentence in self.problems), who="you")


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


def load_config(file: Path) -> AgentConfig:
    """Read and check the configuration. Raises `ConfigError`, also for a file that is missing or unreadable."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(
            file, [Problem(1, "There is no configuration here yet. Run `towpath setup` with a setup key.")]
        ) from error
    except OSError as error:
        raise ConfigError(file, [Problem(1, f"The file cannot be read: {error.strerror}.")]) from error
    return parse_config(data, file)


def parse_config(data: bytes, file: Path) -> AgentConfig:
    """Check the text of a configuration; ``file`` is used in messages and for paths relative to it."""
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(file, [Problem(1, f"The file is larger than {MAX_CONFIG_BYTES} bytes.")])
    root = compose(data, file)
    reader = _Reader(file)
    config = reader.agent(root)
    if reader.problems:
        raise ConfigError(file, reader.problems)
    return config


def compose(data: bytes, file: Path) -> yaml.Node | None:
    """The YAML as nodes that know their lines; None for an empty document. Raises `ConfigError`."""
    try:
        return yaml.compose(data.decode(), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(file, [Problem(line, "The file is not UTF-8 text.")]) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(file, [Problem(line, f"This is not valid YAML: {error.problem}.")]) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(file, [Problem(1, "This is not valid YAML.")]) from error


class _Wrong(Exception):
    """A value that cannot be used; caught where the line is known."""


_NAMES_OF_TAGS = {"str": "text", "int": "a number", "bool": "true or false", "null": "nothing", "float": "a fraction"}


class _Reader:
    """Walks the nodes of one file, collects problems, and never stops at the first."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.problems: list[Problem] = []

    def problem(self, node: yaml.Node | None, sentence: str) -> None:
        line = node.start_mark.line + 1 if node is not None else 1
        self.problems.append(Problem(line, sentence))

    # --- the document ------------------------------------------------------------------------------------

    def agent(self, root: yaml.Node | None) -> AgentConfig:
        keys = self.mapping(root, "", {"relay", "state_dir", "collections", "data", "limits"})
        state_dir = self.value(keys, "state_dir", _optional(self.file_path), None)
        return AgentConfig(
            state_dir=state_dir or default_state_dir(self.file),
            relay=self.relay(keys.get("relay")),
            collections=self.collections(keys.get("collections")),
            data=self.data(keys.get("data")),
            limits=self.limits(keys.get("limits")),
        )

    def relay(self, node: yaml.Node | None) -> RelayConfig:
        keys = self.mapping(node, "relay", {"url", "ca_file"})
        return RelayConfig(
            url=self.value(keys, "url", _optional(_relay_url), None),
            ca_file=self.value(keys, "ca_file", _optional(self.file_path), None),
        )

    def data(self, node: yaml.Node | None) -> DataConfig:
        keys = self.mapping(node, "data", {"listen", "port", "advertise", "allow_loopback"})
        default = DataConfig()
        return DataConfig(
            listen=self.value(keys, "listen", _address, default.listen),
            port=self.value(keys, "port", _number(0, 65535), default.port),
            advertise=self.value(keys, "advertise", _hosts, default.advertise),
            allow_loopback=self.value(keys, "allow_loopback", _flag, default.allow_loopback),
        )

    def limits(self, node: yaml.Node | None) -> LimitsConfig:
        keys = self.mapping(node, "limits", {"workers", "lanes"})
        default = LimitsConfig()
        return LimitsConfig(
            workers=self.value(keys, "workers", _number(1, 64), default.workers),
            lanes=self.value(keys, "lanes", _number(1, 32), default.lanes),
        )

    def collections(self, node: yaml.Node | None) -> tuple[CollectionConfig, ...]:
        if node is None or _tag(node) == "null":
            return ()
        if not isinstance(node, yaml.SequenceNode):
            self.problem(node, "`collections` must be a list, each entry beginning with a dash.")
            return ()
        if len(node.value) > MAX_COLLECTIONS:
            self.problem(node, f"There are more than {MAX_COLLECTIONS} collections.")
            return ()
        found: dict[str, CollectionConfig] = {}
        for item in node.value:
            collection = self.collection(item)
            if collection is None:
                continue
            if collection.id in found:
                self.problem(item, f"Collection {collection.id} is listed twice.")
            found[collection.id] = collection
        return tuple(found.values())

    def collection(self, node: yaml.Node) -> CollectionConfig | None:
        where = "a collection"
        keys = self.mapping(
            node, where, {"id", "name", "root", "access", "sharing", "home", "default_directory"}, optional=False
        )
        if not keys:
            return None
        before = len(self.problems)
        for name in ("id", "name", "root"):
            if name not in keys:
                self.problem(node, f"A collection needs the key `{name}`.")
        read_only = self.value(keys, "access", _choice({"read-only": True, "read-write": False}), False)
        shareable = self.value(keys, "sharing", _flag, False)
        collection = CollectionConfig(
            id=self.value(keys, "id", _uuid, ""),
            name=self.value(keys, "name", _title, ""),
            root=self.value(keys, "root", _root, ""),
            read_only=read_only,
            shareable=shareable,
            home=self.value(keys, "home", _collection_path, "/"),
            default_directory=self.value(keys, "default_directory", _collection_path, "/~/"),
        )
        return collection if len(self.problems) == before else None

    # --- nodes -------------------------------------------------------------------------------------------

    def mapping(
        self, node: yaml.Node | None, where: str, allowed: set[str], *, optional: bool = True
    ) -> dict[str, yaml.Node]:
        """The keys of a mapping; unknown and repeated ones become problems. Absent or empty is an empty mapping."""
        if optional and (node is None or _tag(node) == "null"):
            return {}
        if not isinstance(node, yaml.MappingNode):
            name = f"`{where}`" if where in ("relay", "data", "limits") else where or "the file"
            self.problem(node, f"{name} must hold keys with values, like `key: value`.".capitalize())
            return {}
        found: dict[str, yaml.Node] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            if key not in allowed:
                place = f" in {where}" if where else ""
                self.problem(key_node, f"Unknown key `{key[:64]}`{place}{_suggest(key, allowed)}.")
            elif key in found:
                self.problem(key_node, f"The key `{key}` appears twice.")
            else:
                found[key] = value_node
        return found

    def value(self, keys: dict[str, yaml.Node], name: str, read: Callable[[yaml.Node], T], default: T) -> T:
        node = keys.get(name)
        if node is None:
            return default
        try:
            return read(node)
        except _Wrong as error:
            self.problem(node, f"`{name}` {error}.")
            return default

    def file_path(self, node: yaml.Node) -> Path:
        """A path in the file system; relative ones are relative to the configuration file."""
        return self.file.parent / Path(_expand(_text(node)))


# --- values: each takes a node and raises _Wrong ------------------------------------------------------------


def _tag(node: yaml.Node) -> str:
    return str(node.tag).rpartition(":")[2]


def _found(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return "a list" if isinstance(node, yaml.SequenceNode) else "keys with values"
    return f"{_NAMES_OF_TAGS.get(_tag(node), _tag(node))} ({str(node.value)[:64]!r})"


def _text(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode) or _tag(node) != "str":
        raise _Wrong(f"must be text, not {_found(node)}; put it in quotes if it is meant as text")
    text = str(node.value)
    if not text or len(text) > MAX_PATH_TEXT or any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise _Wrong(f"must be text of 1 to {MAX_PATH_TEXT} characters without control characters")
    return text


def _flag(node: yaml.Node) -> bool:
    if not isinstance(node, yaml.ScalarNode) or _tag(node) != "bool":
        raise _Wrong(f"must be true or false, not {_found(node)}")
    return bool(yaml.constructor.SafeConstructor().construct_yaml_bool(node))


def _number(least: int, most: int) -> Callable[[yaml.Node], int]:
    def read(node: yaml.Node) -> int:
        if not isinstance(node, yaml.ScalarNode) or _tag(node) != "int" or len(node.value) > 20:
            raise _Wrong(f"must be a whole number, not {_found(node)}")
        number: int = yaml.constructor.SafeConstructor().construct_yaml_int(node)
        if not least <= number <= most:
            raise _Wrong(f"must be between {least} and {most}, not {number}")
        return number

    return read


def _choice(values: Mapping[str, T]) -> Callable[[yaml.Node], T]:
    def read(node: yaml.Node) -> T:
        text = node.value if isinstance(node, yaml.ScalarNode) else ""
        if text not in values:
            raise _Wrong(f"must be {' or '.join(values)}, not {_found(node)}")
        return values[text]

    return read


def _optional(read: Callable[[yaml.Node], T]) -> Callable[[yaml.Node], T | None]:
    return lambda node: None if _tag(node) == "null" else read(node)


def _uuid(node: yaml.Node) -> str:
    text = _text(node)
    if not is_uuid(text):
        raise _Wrong(f"must be the id of a collection, a lower-case UUID, not {text[:64]!r}")
    return text


def is_uuid(text: str) -> bool:
    """Whether the text is a UUID in the one form ids have here: lower case, with dashes."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def _title(node: yaml.Node) -> str:
    text = _text(node)
    if len(text) > MAX_NAME:
        raise _Wrong(f"may have at most {MAX_NAME} characters")
    return text


def _expand(text: str) -> str:
    # Only the owner's own home: `~other` would read the user database for nothing.
    if text == "~" or text.startswith("~/"):
        return str(Path.home()) + text[1:]
    return text


def _root(node: yaml.Node) -> str:
    path = _expand(_text(node))
    if not path.startswith("/"):
        raise _Wrong(f"must be an absolute path (or begin with ~/), not {path[:64]!r}")
    return path


def _collection_path(node: yaml.Node) -> str:
    text = _text(node)
    if not text.startswith("/") or ".." in text.split("/"):
        raise _Wrong("must be a path inside the collection that begins with / and has no ..")
    return text


def _relay_url(node: yaml.Node) -> str:
    url = _text(node)
    sentence = relay_url_problem(url)
    if sentence:
        raise _Wrong(sentence)
    return url


def relay_url_problem(url: str) -> str:
    """Why a text cannot be the relay's URL, or an empty string. Only plain origins over TLS will do."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "is not a URL"
    if parts.scheme != "https" or not parts.hostname or port == 0:
        return f"must look like https://relay.example.org or https://relay.example.org:8443, not {url[:100]!r}"
    if parts.path not in ("", "/") or parts.query or parts.fragment or parts.username is not None:
        return "must be an origin only, without path, query or user name"
    return ""


def _address(node: yaml.Node) -> str:
    text = _text(node)
    try:
        ipaddress.ip_address(text)
    except ValueError as error:
        raise _Wrong(f"must be an IP address such as 0.0.0.0 or ::, not {text[:64]!r}") from error
    return text


_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?\Z")


def _hosts(node: yaml.Node) -> tuple[str, ...]:
    if not isinstance(node, yaml.SequenceNode):
        raise _Wrong(f"must be a list of addresses or host names, not {_found(node)}")
    if len(node.value) > MAX_ADVERTISED:
        raise _Wrong(f"may hold at most {MAX_ADVERTISED} addresses")
    return tuple(_host(item) for item in node.value)


def _host(node: yaml.Node) -> str:
    text = _text(node)
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        if not _HOST.match(text):
            raise _Wrong(f"holds {text[:64]!r}, which is neither an address nor a host name") from None
        return text


def _suggest(key: str, allowed: set[str]) -> str:
    import difflib

    close = difflib.get_close_matches(key, allowed, n=1)
    return f"; did you mean `{close[0]}`?" if close else f"; known are {', '.join(sorted(allowed))}"
