"""From YAML to frozen records and back to nothing lost: the part of the configuration that knows no key.

The keys are the fields of dataclasses, declared with `setting`: kind, default and description stand at one place, and
reader, JSON Schema, environment variables and `towpath config` all follow from it. A document is read into a *layer*
(nested dictionaries of checked values, by field name), layers are merged, and `build` makes the records.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import yaml

from agent.config.kinds import Kind, OrAuto, OrNull, Schema, Written, Wrong, tag
from protocol.errors import TowpathError

MAX_CONFIG_BYTES = 1024 * 1024
# In an overlay: the entry of this id is not wanted.
REMOVED = "removed"

Values = dict[str, Any]
Record = TypeVar("Record")


class Problem(NamedTuple):
    """One thing wrong with a configuration file; ``line`` counts from 1, and is 0 for the whole file."""

    line: int
    sentence: str


class ConfigError(TowpathError):
    """The configuration cannot be used. ``problems`` holds every mistake found, in the order of the file."""

    default_code = "CONFIG_ERROR"

    def __init__(self, file: Path, problems: list[Problem]) -> None:
        self.file = file
        self.problems = sorted(problems)
        super().__init__("\n".join(map(self.told, self.problems)), who="you")

    def told(self, problem: Problem) -> str:
        """One of the problems, with its place."""
        return f"{self.file}{f':{problem.line}' if problem.line else ''}: {problem.sentence}"


# --- the definition ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A mapping with the keys of a record."""

    record: type[Any]


@dataclass(frozen=True)
class Entries:
    """A list of records that are told apart by one of their keys; read as a mapping from that key."""

    record: type[Any]
    noun: str
    most: int
    identity: str = "id"


@dataclass(frozen=True)
class Setting:
    """One key: the field it fills, its name in the document, what it may be, and a sentence on it."""

    name: str
    key: str
    kind: Kind | Section | Entries
    doc: str
    required: bool
    default: Any


def setting(
    kind: Kind | Section | Entries,
    default: Any = dataclasses.MISSING,
    *,
    doc: str,
    key: str = "",
    required: bool = False,
) -> Any:
    """A dataclass field that is a key of the configuration. Sections and entries need no default."""
    metadata = {"kind": kind, "key": key, "doc": doc, "required": required}
    if isinstance(kind, Section):
        return field(default_factory=kind.record, metadata=metadata)
    if isinstance(kind, Entries):
        return field(default=(), metadata=metadata)
    return field(default=default, metadata=metadata)


def settings(record: type[Any]) -> list[Setting]:
    """The keys of a record, in order."""
    return [
        Setting(
            name=row.name,
            key=row.metadata["key"] or row.name,
            kind=row.metadata["kind"],
            doc=row.metadata["doc"],
            required=row.metadata["required"],
            default=row.default,
        )
        for row in dataclasses.fields(record)
        if "kind" in row.metadata
    ]


# --- reading -------------------------------------------------------------------------------------------------


def compose(data: bytes, file: Path) -> yaml.Node | None:
    """The YAML as nodes that know their lines; None for an empty document. Raises `ConfigError`."""
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(file, [Problem(1, f"The file is larger than {MAX_CONFIG_BYTES} bytes.")])
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


@dataclass
class Layer:
    """The checked values of one document and the lines they stand on (by path of field names)."""

    file: Path
    values: Values = field(default_factory=dict)
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)


def read_layer(root: yaml.Node | None, record: type[Any], file: Path, *, partial: bool = False) -> Layer:
    """Check a whole document. Raises `ConfigError` with every mistake.

    With ``partial`` (an overlay) the entries of lists may lack keys, and may say that they are ``removed``.
    """
    reader = _Reader(file, partial)
    values = reader.record(root, record, "", ())
    if reader.problems:
        raise ConfigError(file, reader.problems)
    return Layer(file, values, reader.lines)


class _Reader:
    """Walks the nodes of one file, collects problems, and never stops at the first."""

    def __init__(self, file: Path, partial: bool) -> None:
        self.file = file
        self.partial = partial
        self.problems: list[Problem] = []
        self.lines: dict[tuple[str, ...], int] = {}

    def problem(self, node: yaml.Node | None, sentence: str) -> None:
        line = node.start_mark.line + 1 if node is not None else 1
        self.problems.append(Problem(line, sentence))

    def record(
        self,
        node: yaml.Node | None,
        record: type[Any],
        where: str,
        path: tuple[str, ...],
        extra: Iterable[str] = (),
        prefix: str = "",
    ) -> Values:
        """``where`` and ``prefix`` are what messages call the place and put before the names of its keys."""
        known = {row.key: row for row in settings(record)}
        values: Values = {}
        for key, value in self.mapping(node, where, {*known, *extra}).items():
            if key not in known:
                continue
            row = known[key]
            here = (*path, row.name)
            self.lines[here] = value.start_mark.line + 1
            if isinstance(row.kind, Section):
                values[row.name] = self.record(value, row.kind.record, prefix + key, here, prefix=f"{prefix}{key}.")
            elif isinstance(row.kind, Entries):
                values[row.name] = self.entries(value, row.kind, prefix + key, here)
            else:
                try:
                    values[row.name] = row.kind.read(value, self.file.parent)
                except Wrong as error:
                    self.problem(value, f"`{prefix}{key}` {error}.")
        return values

    def entries(self, node: yaml.Node, kind: Entries, key: str, path: tuple[str, ...]) -> Values:
        if tag(node) == "null":
            return {}
        if not isinstance(node, yaml.SequenceNode):
            self.problem(node, f"`{key}` must be a list, each entry beginning with a dash.")
            return {}
        if len(node.value) > kind.most:
            self.problem(node, f"There are more than {kind.most} {key}.")
            return {}
        found: Values = {}
        for item in node.value:
            self.entry(item, kind, path, found)
        return found

    def entry(self, node: yaml.Node, kind: Entries, path: tuple[str, ...], found: Values) -> None:
        if not isinstance(node, yaml.MappingNode) or not node.value:
            self.problem(node, f"{_article(kind.noun)} must hold keys with values, like `key: value`.")
            return
        # The path is known once the identity is; until then lines are kept under the entry's position.
        position = f"#{len(found)}"
        values = self.record(
            node, kind.record, _article(kind.noun, small=True), (*path, position), [REMOVED] if self.partial else []
        )
        present = {key.value: value for key, value in node.value if isinstance(key, yaml.ScalarNode)}
        for row in settings(kind.record):
            needed = row.name == kind.identity if self.partial else row.required
            if needed and row.key not in present:
                self.problem(node, f"{_article(kind.noun)} needs the key `{row.key}`.")
        identity = values.get(kind.identity)
        if identity is None:
            return
        if identity in found:
            self.problem(node, f"{kind.noun.capitalize()} {identity} is listed twice.")
        if self.partial and REMOVED in present:
            values[REMOVED] = present[REMOVED].value == "true"
        found[identity] = values
        for old in [line for line in self.lines if line[: len(path) + 1] == (*path, position)]:
            self.lines[(*path, identity, *old[len(path) + 1 :])] = self.lines.pop(old)
        self.lines[(*path, identity)] = node.start_mark.line + 1

    def mapping(self, node: yaml.Node | None, where: str, allowed: set[str]) -> dict[str, yaml.Node]:
        """The keys of a mapping; unknown and repeated ones become problems. Absent or empty is an empty mapping."""
        if node is None or tag(node) == "null":
            return {}
        if not isinstance(node, yaml.MappingNode):
            name = f"`{where}`" if where else "The file"
            self.problem(node, f"{name} must hold keys with values, like `key: value`.")
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


def _article(noun: str, *, small: bool = False) -> str:
    article = "an" if noun[0] in "aeiou" else "a"
    return f"{article if small else article.capitalize()} {noun}"


def _suggest(key: str, allowed: set[str]) -> str:
    import difflib

    close = difflib.get_close_matches(key, allowed, n=1)
    return f"; did you mean `{close[0]}`?" if close else f"; known are {', '.join(sorted(allowed))}"


# --- merging and building --------------------------------------------------------------------------------------


def merged(layers: Iterable[Mapping[str, Any]]) -> Values:
    """The layers on top of one another, the last one uppermost; mappings are merged, everything else replaced."""
    result: Values = {}
    for layer in layers:
        for name, value in layer.items():
            below = result.get(name)
            both = isinstance(value, dict) and isinstance(below, dict)
            result[name] = merged([cast("Values", below), value]) if both else value
    return result


def build(record: type[Record], values: Mapping[str, Any]) -> Record:
    """The record of checked values; keys not given take their defaults.

    Entries that are removed, or that are incomplete because an overlay changes something that is no longer there, are
    left out.
    """
    arguments: Values = {}
    for row in settings(record):
        given = values.get(row.name)
        if isinstance(row.kind, Section):
            arguments[row.name] = build(row.kind.record, given or {})
        elif isinstance(row.kind, Entries):
            entries = (given or {}).values()
            arguments[row.name] = tuple(
                build(row.kind.record, entry) for entry in entries if is_wanted(row.kind, entry)
            )
        elif row.name in values:
            arguments[row.name] = given
    return record(**arguments)


def is_wanted(kind: Entries, entry: Mapping[str, Any]) -> bool:
    """Whether an entry is complete and not removed."""
    return not entry.get(REMOVED) and all(row.name in entry for row in settings(kind.record) if row.required)


def as_written(row: Setting, value: Any) -> Any:
    """A value of the records as the document has it."""
    words = getattr(row.kind, "values", None)
    if isinstance(words, Mapping):
        return next((word for word, meaning in words.items() if meaning == value), value)
    if isinstance(row.kind, OrNull) and isinstance(row.kind.kind, Written):
        return row.kind.kind.written(value)
    if isinstance(row.kind, OrAuto):
        return row.kind.written(value)
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


# --- JSON Schema ---------------------------------------------------------------------------------------------


def schema_of(record: type[Any]) -> Schema:
    """The JSON Schema of a record's document."""
    properties: Schema = {}
    required = []
    for row in settings(record):
        described = _schema_of_kind(row.kind)
        if not isinstance(row.kind, Section | Entries) and isinstance(row.default, str | int | bool | type(None)):
            described["default"] = as_written(row, row.default)
        properties[row.key] = {"description": row.doc, **described}
        if row.required:
            required.append(row.key)
    schema: Schema = {"type": "object", "additionalProperties": False, "properties": properties}
    if required:
        schema["required"] = required
    return schema


def _schema_of_kind(kind: Kind | Section | Entries) -> Schema:
    if isinstance(kind, Section):
        return {"anyOf": [schema_of(kind.record), {"type": "null"}]}
    if isinstance(kind, Entries):
        return {"anyOf": [{"type": "array", "maxItems": kind.most, "items": schema_of(kind.record)}, {"type": "null"}]}
    return kind.schema()
