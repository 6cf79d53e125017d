"""What a value of the configuration may be: how it is read from YAML, and what the JSON Schema says of it.

A kind's ``read`` takes a node and the folder that relative paths begin in, and answers with the value or raises `Wrong`
with the end of a sentence ("must be true or false, not …"). Its ``schema`` describes the same values; a test holds both
against each other.
"""

from __future__ import annotations

import ipaddress
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

import yaml

MAX_TEXT = 4096
NOT_CONTROL = "^[^\\u0000-\\u001f\\u007f]*$"
Schema = dict[str, Any]


class Wrong(Exception):
    """A value that cannot be used; caught where the line is known."""


class Kind(Protocol):
    """One kind of value."""

    def read(self, node: yaml.Node, base: Path) -> Any:
        """The value. Raises `Wrong`."""

    def schema(self) -> Schema:
        """The same as JSON Schema (2020-12)."""


@runtime_checkable
class Written(Protocol):
    """A kind whose values look other in the file than in the records."""

    def written(self, value: Any) -> Any:
        """The value as it would stand in the file."""


_NAMES_OF_TAGS = {"str": "text", "int": "a number", "bool": "true or false", "null": "nothing", "float": "a fraction"}


def tag(node: yaml.Node) -> str:
    """The last word of a node's tag: str, int, bool, null, map, seq …"""
    return str(node.tag).rpartition(":")[2]


def found(node: yaml.Node) -> str:
    """What stands there instead, for a sentence."""
    if not isinstance(node, yaml.ScalarNode):
        return "a list" if isinstance(node, yaml.SequenceNode) else "keys with values"
    return f"{_NAMES_OF_TAGS.get(tag(node), tag(node))} ({str(node.value)[:64]!r})"


def _text(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode) or tag(node) != "str":
        raise Wrong(f"must be text, not {found(node)}; put it in quotes if it is meant as text")
    text = str(node.value)
    if not text or len(text) > MAX_TEXT or any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise Wrong(f"must be text of 1 to {MAX_TEXT} characters without control characters")
    return text


@dataclass(frozen=True)
class Text:
    """Text of limited length without control characters, optionally of a given form."""

    longest: int = MAX_TEXT
    pattern: str = ""
    form: str = ""

    def read(self, node: yaml.Node, base: Path) -> str:
        """The text."""
        text = _text(node)
        if len(text) > self.longest:
            raise Wrong(f"may have at most {self.longest} characters")
        if self.pattern and not re.fullmatch(self.pattern, text):
            raise Wrong(f"must be {self.form}, not {text[:64]!r}")
        return text

    def schema(self) -> Schema:
        """A string."""
        form = f"^(?:{self.pattern})$" if self.pattern else NOT_CONTROL
        return {"type": "string", "minLength": 1, "maxLength": self.longest, "pattern": form}


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def read(self, node: yaml.Node, base: Path) -> bool:
        """The flag."""
        if not isinstance(node, yaml.ScalarNode) or tag(node) != "bool":
            raise Wrong(f"must be true or false, not {found(node)}")
        return bool(yaml.constructor.SafeConstructor().construct_yaml_bool(node))

    def schema(self) -> Schema:
        """A boolean."""
        return {"type": "boolean"}


@dataclass(frozen=True)
class Number:
    """A whole number within bounds."""

    least: int
    most: int

    def read(self, node: yaml.Node, base: Path) -> int:
        """The number."""
        if not isinstance(node, yaml.ScalarNode) or tag(node) != "int" or len(node.value) > 20:
            raise Wrong(f"must be a whole number, not {found(node)}")
        try:
            number: int = yaml.constructor.SafeConstructor().construct_yaml_int(node)
        except ValueError:
            raise Wrong(f"must be a whole number, not {found(node)}") from None
        if not self.least <= number <= self.most:
            raise Wrong(f"must be between {self.least} and {self.most}, not {number}")
        return number

    def schema(self) -> Schema:
        """An integer."""
        return {"type": "integer", "minimum": self.least, "maximum": self.most}


@dataclass(frozen=True)
class Choice:
    """One of some words, each standing for a value."""

    values: Mapping[str, Any] = field(hash=False)

    def read(self, node: yaml.Node, base: Path) -> Any:
        """What the word stands for. ``off`` and ``on`` are words here, whatever YAML takes them for."""
        text = node.value if isinstance(node, yaml.ScalarNode) else ""
        if text not in self.values:
            raise Wrong(f"must be {' or '.join(self.values)}, not {found(node)}")
        return self.values[text]

    def schema(self) -> Schema:
        """An enumeration. A YAML 1.1 reader turns ``off`` into false, so that is allowed where the word is."""
        words: list[Any] = list(self.values)
        return {"enum": [*words, *([False] if "off" in self.values else []), *([True] if "on" in self.values else [])]}


def words(*names: str) -> Choice:
    """A choice whose words stand for themselves."""
    return Choice({name: name for name in names})


@dataclass(frozen=True)
class OrNull:
    """A kind, or null for "not given"."""

    kind: Kind

    def read(self, node: yaml.Node, base: Path) -> Any:
        """The value or None."""
        return None if tag(node) == "null" else self.kind.read(node, base)

    def schema(self) -> Schema:
        """Either."""
        return {"anyOf": [self.kind.schema(), {"type": "null"}]}


@dataclass(frozen=True)
class OrAuto:
    """A kind, or the word "auto" for what the program finds best (None)."""

    kind: Kind

    def read(self, node: yaml.Node, base: Path) -> Any:
        """The value or None."""
        automatic = isinstance(node, yaml.ScalarNode) and tag(node) == "str" and node.value == "auto"
        return None if automatic else self.kind.read(node, base)

    def schema(self) -> Schema:
        """Either."""
        return {"anyOf": [self.kind.schema(), {"const": "auto"}]}

    def written(self, value: Any) -> Any:
        """The value as it would stand in the file."""
        return "auto" if value is None else value


@dataclass(frozen=True)
class ListOf:
    """A short list of one kind; read as a tuple."""

    kind: Kind
    most: int
    plural: str

    def read(self, node: yaml.Node, base: Path) -> tuple[Any, ...]:
        """The values."""
        if not isinstance(node, yaml.SequenceNode):
            raise Wrong(f"must be a list of {self.plural}, not {found(node)}")
        if len(node.value) > self.most:
            raise Wrong(f"may hold at most {self.most} {self.plural}")
        return tuple(self.kind.read(item, base) for item in node.value)

    def schema(self) -> Schema:
        """An array."""
        return {"type": "array", "maxItems": self.most, "items": self.kind.schema()}


@dataclass(frozen=True)
class Uuid:
    """An id as the relay gives it."""

    def read(self, node: yaml.Node, base: Path) -> str:
        """The id."""
        text = _text(node)
        if not is_uuid(text):
            raise Wrong(f"must be the id of a collection, a lower-case UUID, not {text[:64]!r}")
        return text

    def schema(self) -> Schema:
        """A lower-case UUID."""
        return {"type": "string", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"}


def is_uuid(text: str) -> bool:
    """Whether the text is a UUID in the one form ids have here: lower case, with dashes."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def _expand(text: str) -> str:
    # Only the owner's own home: `~other` would read the user database for nothing.
    if text == "~" or text.startswith("~/"):
        return str(Path.home()) + text[1:]
    return text


@dataclass(frozen=True)
class FilePath:
    """A path in the file system; relative ones are relative to the configuration file."""

    def read(self, node: yaml.Node, base: Path) -> Path:
        """The path, absolute if the base is."""
        return base / Path(_expand(_text(node)))

    def schema(self) -> Schema:
        """A string."""
        return Text().schema()


@dataclass(frozen=True)
class Folder:
    """The absolute path of a folder of this machine."""

    def read(self, node: yaml.Node, base: Path) -> str:
        """The path."""
        path = _expand(_text(node))
        if not path.startswith("/"):
            raise Wrong(f"must be an absolute path (or begin with ~/), not {path[:64]!r}")
        return path

    def schema(self) -> Schema:
        """A string that begins with a slash or ~/."""
        return {**Text().schema(), "allOf": [{"pattern": "^(/|~/|~$)"}]}


@dataclass(frozen=True)
class InCollection:
    """A path inside a collection."""

    def read(self, node: yaml.Node, base: Path) -> str:
        """The path."""
        text = _text(node)
        if not text.startswith("/") or ".." in text.split("/"):
            raise Wrong("must be a path inside the collection that begins with / and has no ..")
        return text

    def schema(self) -> Schema:
        """A string that begins with a slash, without ``..``."""
        return {**Text().schema(), "allOf": [{"pattern": "^/"}], "not": {"pattern": "(^|/)\\.\\.(/|$)"}}


@dataclass(frozen=True)
class Origin:
    """The origin of a relay: https, host, perhaps a port."""

    def read(self, node: yaml.Node, base: Path) -> str:
        """The URL."""
        url = _text(node)
        sentence = relay_url_problem(url)
        if sentence:
            raise Wrong(sentence)
        return url

    def schema(self) -> Schema:
        """A string that begins with https."""
        return {**Text().schema(), "allOf": [{"pattern": "^[hH][tT][tT][pP][sS]://[^/?#@]+/?$"}]}


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


@dataclass(frozen=True)
class Address:
    """An IP address."""

    def read(self, node: yaml.Node, base: Path) -> str:
        """The address."""
        text = _text(node)
        try:
            ipaddress.ip_address(text)
        except ValueError as error:
            raise Wrong(f"must be an IP address such as 0.0.0.0 or ::, not {text[:64]!r}") from error
        return text

    def schema(self) -> Schema:
        """A string of digits, dots and colons."""
        return {"type": "string", "pattern": "^[0-9a-fA-F.:]+(%.+)?$"}


_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?\Z")


@dataclass(frozen=True)
class Host:
    """An IP address or a host name."""

    def read(self, node: yaml.Node, base: Path) -> str:
        """The address in its usual form, or the name."""
        text = _text(node)
        try:
            return str(ipaddress.ip_address(text))
        except ValueError:
            if not _HOST.match(text):
                raise Wrong(f"holds {text[:64]!r}, which is neither an address nor a host name") from None
            return text

    def schema(self) -> Schema:
        """A string."""
        return {"type": "string", "minLength": 1, "maxLength": 320, "pattern": "^[A-Za-z0-9:%.-]+$"}
