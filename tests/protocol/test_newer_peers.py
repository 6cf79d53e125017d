"""What a newer peer adds to any record is ignored, at every depth; what an older one leaves out has its default."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any

import msgspec
import pytest

from protocol import candidates, control
from protocol.control import decode_untrusted
from protocol.errors import ProtocolError
from protocol.record import Record


def records() -> list[type[Record]]:
    found = {
        kind
        for module in (control, candidates)
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, Record) and kind is not Record
    }
    return sorted(found, key=lambda kind: kind.__name__)


def example(kind: Any) -> Any:
    """A value of a type, as it travels, with every record inside it as large as it can be."""
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return {field.encode_name: example(field.type) for field in msgspec.structs.fields(kind)}
    if origin is typing.Annotated:
        # Bounds.
        return example(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return example(next(argument for argument in arguments if argument is not type(None)))
    if origin is typing.Literal:
        return arguments[0]
    if origin is list:
        # Rows of free form have no keys that are known or unknown.
        return [] if typing.get_origin(arguments[0]) is dict else [example(arguments[0])]
    return {str: "text", int: 1, float: 1.0, bool: True}[kind]


def with_more(value: Any) -> Any:
    """The same with keys that nobody knows, in every mapping."""
    if isinstance(value, dict):
        more = {"from_the_future": {"deep": [1, {"er": None}]}, "zz": "x", "0": 0.5}
        return {**{key: with_more(inner) for key, inner in value.items()}, **more}
    return [with_more(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("kind", records(), ids=lambda kind: kind.__name__)
def test_unknown_keys_are_ignored_at_every_depth(kind: type[Record]) -> None:
    plain = example(kind)
    known = decode_untrusted(msgspec.json.encode(plain), kind)
    assert decode_untrusted(msgspec.json.encode(with_more(plain)), kind) == known
    assert msgspec.to_builtins(known).keys() == plain.keys()


@pytest.mark.parametrize("kind", records(), ids=lambda kind: kind.__name__)
def test_what_an_older_peer_leaves_out_has_its_default(kind: type[Record]) -> None:
    plain = example(kind)
    required = {field.encode_name for field in msgspec.structs.fields(kind) if field.required}
    least = {key: value for key, value in plain.items() if key in required}
    decode_untrusted(msgspec.json.encode(least), kind)
    for key in required:
        with pytest.raises(ProtocolError):
            decode_untrusted(msgspec.json.encode({name: value for name, value in least.items() if name != key}), kind)


def test_all_records_of_the_wire_are_looked_at() -> None:
    names = {kind.__name__ for kind in records()}
    assert {"RelayHello", "AgentHello", "TaskOrder", "TaskObserved", "AgentEvent", "PathOffer", "PathGo"} <= names
    print(f"records: {len(names)}")
