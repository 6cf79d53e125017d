"""The configuration in layers: defaults, profile, the owner's file, the overlay, the environment, flags.

Each layer is above the one before. The *overlay* (``agent.overlay.yaml`` beside ``agent.yaml``) is where the program
writes what it was told to remember (`towpath config set`, `towpath collection …`); the owner's own file is never
written to.
Environment variables are ``TOWPATH_AGENT_`` and the key in capitals (``TOWPATH_AGENT_LIMITS_LANES=4``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from agent.config.document import (
    MAX_CONFIG_BYTES,
    REMOVED,
    ConfigError,
    Entries,
    Layer,
    Problem,
    Section,
    Setting,
    Values,
    compose,
    merged,
    read_layer,
    settings,
)
from agent.config.keys import AgentConfig, default_state_dir, document, finished
from agent.config.kinds import Wrong
from agent.system.file_lock import wait_for_lock
from protocol.errors import TowpathError
from protocol.private_file import write_private_file

PREFIX = "TOWPATH_AGENT_"
# What a profile sets where the owner says nothing else.
PROFILES: Mapping[str, Values] = {
    "standard": {},
    # Hundreds of people share the machine: one session at a time, few connections.
    "login-node": {"limits": {"workers": 1, "lanes": 2, "spare_worker": False}},
}
_HEADER = """\
# Written by the towpath command; what stands here counts more than agent.yaml beside it.
# Change it with `towpath config set | unset` and `towpath collection`, and write your own settings into agent.yaml.
"""

Path_ = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The configuration, and where each value that is not a default comes from (by path of field names)."""

    config: AgentConfig
    origins: Mapping[Path_, str]
    values: Values


class UnknownSetting(TowpathError):
    """There is no such key."""

    default_code = "CONFIG_ERROR"


def overlay_file(config_file: Path) -> Path:
    """Where the overlay of a configuration lies."""
    return config_file.with_name(f"{config_file.stem}.overlay.yaml")


def overlay_lock(config_file: Path) -> Path:
    """What is locked while the overlay is changed."""
    path = overlay_file(config_file)
    return path.with_name(f".{path.name}.lock")


def load(
    file: Path,
    *,
    environment: Mapping[str, str] = os.environ,
    flags: Mapping[str, str] | None = None,
    overlay: bytes | None = None,
    owners: bytes | None = None,
) -> Loaded:
    """Read all layers. ``owners`` and ``overlay`` stand for what is on disk. Raises `ConfigError`."""
    data = _owners_file(file) if owners is None else owners
    own = read_layer(document(data, file), AgentConfig, file)
    above = overlay_layer(file, _overlay_bytes(file) if overlay is None else overlay)
    from_environment = _from_environment(environment, file)
    from_flags = _from_flags(flags or {}, file)
    upper = [own, above, from_environment, from_flags]
    profile = str(merged([layer.values for layer in upper]).get("profile", "standard"))
    base = Layer(Path(f"profile {profile}"), PROFILES[profile])
    values = merged([layer.values for layer in (base, *upper)])
    origins: dict[Path_, str] = {}
    for layer in (base, *upper):
        for path in _leaves(layer.values):
            line = layer.lines.get(path)
            origins[path] = f"{layer.file}:{line}" if line else str(layer.file)
    return Loaded(config=finished(values, file), origins=origins, values=values)


def load_config(
    file: Path, *, environment: Mapping[str, str] = os.environ, flags: Mapping[str, str] | None = None
) -> AgentConfig:
    """What `load` finds, without where it comes from."""
    return load(file, environment=environment, flags=flags).config


def _owners_file(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError as error:
        sentence = "There is no configuration here yet. Run `towpath setup` with a setup key."
        raise ConfigError(file, [Problem(0, sentence)]) from error
    except OSError as error:
        raise ConfigError(file, [Problem(0, f"The file cannot be read: {error.strerror}.")]) from error


def _overlay_bytes(file: Path) -> bytes:
    path = overlay_file(file)
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ConfigError(path, [Problem(0, f"The file cannot be read: {error.strerror}.")]) from error


def overlay_layer(file: Path, data: bytes) -> Layer:
    """The checked overlay of a configuration. Raises `ConfigError` that names the overlay."""
    path = overlay_file(file)
    return read_layer(document(data, path), AgentConfig, path, partial=True)


def _leaves(values: Mapping[str, Any], path: Path_ = ()) -> Iterator[Path_]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name)


# --- environment and flags -----------------------------------------------------------------------------------


def scalar_settings(
    record: type[Any] = AgentConfig, path: Path_ = (), keys: Path_ = ()
) -> Iterator[tuple[Path_, Path_, Setting]]:
    """Every setting that is not inside a list: path of field names, path of keys, the setting."""
    for row in settings(record):
        if isinstance(row.kind, Section):
            yield from scalar_settings(row.kind.record, (*path, row.name), (*keys, row.key))
        elif not isinstance(row.kind, Entries):
            yield (*path, row.name), (*keys, row.key), row


def variable_of(keys: Path_) -> str:
    """The environment variable of a setting."""
    return PREFIX + "_".join(keys).upper()


def _from_environment(environment: Mapping[str, str], file: Path) -> Layer:
    known = {variable_of(keys): keys for _, keys, _ in scalar_settings()}
    layer = Layer(Path("environment"))
    for name in sorted(environment):
        if not name.startswith(PREFIX):
            continue
        if name not in known:
            raise ConfigError(Path(f"environment {name}"), [Problem(1, "There is no such setting.")])
        _put(layer, ".".join(known[name]), environment[name], Path(f"environment {name}"), file)
    return layer


def _from_flags(flags: Mapping[str, str], file: Path) -> Layer:
    layer = Layer(Path("command line"))
    for key, text in flags.items():
        _put(layer, key, text, Path(f"command line --set {key}"), file)
    return layer


def _put(layer: Layer, key: str, text: str, source: Path, file: Path) -> None:
    row = next(((path, row) for path, keys, row in scalar_settings() if ".".join(keys) == key), None)
    if row is None:
        raise ConfigError(source, [Problem(1, f"There is no setting `{key}`.")])
    node = compose(text.encode(), source)
    path, definition = row
    if node is None:
        node = yaml.ScalarNode("tag:yaml.org,2002:null", "")
    try:
        value = definition.kind.read(node, file.parent)  # type: ignore[union-attr]  # sections are not among these
    except Wrong as error:
        raise ConfigError(source, [Problem(1, f"`{key}` {error}.")]) from error
    place = layer.values
    for name in path[:-1]:
        place = place.setdefault(name, {})
    place[path[-1]] = value


# --- the overlay ---------------------------------------------------------------------------------------------


def set_in_overlay(file: Path, key: str, text: str) -> None:
    """Remember a value for a dotted key (``limits.lanes``, ``collections.ID.name``). ``text`` is YAML.

    Raises `UnknownSetting`, or `ConfigError` when the result would not do; nothing is written then.
    """
    value = yaml.safe_load(text) if compose(text.encode(), Path("value")) is not None else None
    try:
        _set(file, key, value)
    except ConfigError:
        if not isinstance(value, bool):
            raise
        # YAML takes ``off`` for false; where a word is wanted it is a word.
        _set(file, key, text.strip())


def _set(file: Path, key: str, value: Any) -> None:
    with editing(file) as content:
        holder, last = _holder(content, key, make=True)
        holder[last] = value


def unset_in_overlay(file: Path, key: str) -> bool:
    """Forget what was remembered for a key; whether there was something. Raises as `set_in_overlay`."""
    with editing(file) as content:
        holder, last = _holder(content, key, make=False)
        return holder.pop(last, _NOTHING) is not _NOTHING


_NOTHING = object()


class Refused(ConfigError):
    """What was to be remembered will not do; nothing was written."""

    def __init__(self, file: Path, problems: list[Problem]) -> None:
        super().__init__(file, problems)
        self.sentence = "\n".join(("Nothing was changed.", *(problem.sentence for problem in self.problems)))


@contextlib.contextmanager
def editing(file: Path) -> Iterator[dict[str, Any]]:
    """The overlay as a plain document to change; checked together with all other layers and written at the end.

    Raises `ConfigError` when the result would not do; nothing is written then. One editor at a time.
    """
    path = overlay_file(file)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with overlay_lock(file).open("a") as lock:
        with contextlib.suppress(OSError):
            wait_for_lock(lock.fileno())
        data = _overlay_bytes(file)
        overlay_layer(file, data)
        content: dict[str, Any] = yaml.safe_load(data) or {}
        yield content
        text = _HEADER + yaml.safe_dump(_pruned(content), sort_keys=False, allow_unicode=True)
        try:
            load(file, overlay=text.encode(), environment={})
        except ConfigError as error:
            if error.file != path:
                raise
            # The lines of a file that was not written tell nobody anything.
            raise Refused(path, error.problems) from error
        write_private_file(path, text.encode())


def entry_in(content: dict[str, Any], section: str, identity: str, identity_key: str = "id") -> dict[str, Any]:
    """The overlay's entry of a list, made if it is not there."""
    rows = content.setdefault(section, []) or []
    content[section] = rows
    for row in rows:
        if row.get(identity_key) == identity:
            row.pop(REMOVED, None)
            return dict_of(row)
    rows.append({identity_key: identity})
    return dict_of(rows[-1])


def remove_entry(
    content: dict[str, Any], section: str, identity: str, *, owners: bool, identity_key: str = "id"
) -> None:
    """Take an entry away; one that the owner's file has (``owners``) is marked as removed."""
    content[section] = [row for row in content.get(section) or [] if row.get(identity_key) != identity]
    if owners:
        content[section].append({identity_key: identity, REMOVED: True})


def dict_of(row: Any) -> dict[str, Any]:
    """The same object, known to be a mapping."""
    assert isinstance(row, dict)
    return row


def _holder(content: dict[str, Any], key: str, *, make: bool) -> tuple[dict[str, Any], str]:
    """The mapping of the overlay that holds a key, and the key's last word. Raises `UnknownSetting`."""
    record: type[Any] = AgentConfig
    keys = key.split(".")
    place = content
    while True:
        row = next((row for row in settings(record) if row.key == keys[0]), None)
        if row is None:
            known = ", ".join(row.key for row in settings(record))
            raise UnknownSetting(f"There is no setting `{key}`; here are: {known}.", who="you")
        if isinstance(row.kind, Section) and len(keys) > 1:
            inner = place.setdefault(row.key, {}) if make else place.get(row.key, {})
            place, record, keys = dict_of(inner), row.kind.record, keys[1:]
        elif isinstance(row.kind, Entries) and len(keys) > 2:
            place = entry_in(place, row.key, keys[1], row.kind.identity) if make else _found(place, row, keys[1])
            record, keys = row.kind.record, keys[2:]
        elif isinstance(row.kind, Section | Entries) or len(keys) > 1:
            raise UnknownSetting(f"`{key}` is not a single setting; see `towpath config show`.", who="you")
        else:
            return place, row.key


def _found(place: dict[str, Any], row: Setting, identity: str) -> dict[str, Any]:
    assert isinstance(row.kind, Entries)
    key = row.kind.identity
    return next((entry for entry in place.get(row.key) or [] if entry.get(key) == identity), {})


def _pruned(content: dict[str, Any]) -> dict[str, Any]:
    """Without empty sections, and without entries that say nothing but their id."""
    result: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = [row for row in value if len(row) > 1]
            if rows:
                result[key] = rows
        elif value not in ({}, []) or not isinstance(value, dict | list):
            result[key] = value
    return result


def state_dir_of(file: Path) -> Path:
    """Where an agent of this configuration keeps its state, also while the file has mistakes.

    Commands that speak to the running agent (`towpath status`, `towpath stop`) must not depend on what was just typed
    into it.
    """
    try:
        return load(file).config.state_dir
    except ConfigError:
        pass
    value: object = None
    for path in (file, overlay_file(file)):
        with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError, StopIteration):
            lines = path.read_text(encoding="utf-8").splitlines()
            line = next(line for line in reversed(lines) if line.startswith("state_dir:"))
            value = yaml.safe_load(line).get("state_dir", value)
    text = os.environ.get(variable_of(("state_dir",))) or value
    if not isinstance(text, str) or not text:
        return default_state_dir(file)
    return file.parent / Path(text).expanduser()


def waiting_for_start(running: AgentConfig, read: AgentConfig) -> list[str]:
    """The keys whose new values an agent that runs cannot take up."""
    pairs = (
        ("relay", running.relay, read.relay),
        ("state_dir", running.state_dir, read.state_dir),
        ("profile", running.profile, read.profile),
        *((f"data.{name}", getattr(running.data, name), value) for name, value in vars(read.data).items()),
        ("limits.spare_worker", running.limits.spare_worker, read.limits.spare_worker),
    )
    return [key for key, old, new in pairs if old != new]
