"""Configuration files of older versions, understood without being rewritten.

A file says its version (1 if it says nothing). What changed from one version to the next is a step here: keys that
were renamed. It is applied to the parsed nodes, so mistakes are still named with the lines of the owner's file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from agent.config.document import ConfigError, Problem
from agent.config.kinds import tag

CURRENT = 1


@dataclass(frozen=True)
class Renamed:
    """A key that has a new name; both are dotted (``limits.lanes``). ``[]`` stands for every entry of a list."""

    old: str
    new: str


# From this version to the next.
STEPS: Mapping[int, Sequence[Renamed]] = {}


def migrated(
    root: yaml.Node | None, file: Path, *, steps: Mapping[int, Sequence[Renamed]] = STEPS, current: int = CURRENT
) -> yaml.Node | None:
    """The document in today's layout.

    Raises `ConfigError` for a version of the future, or when a key is given by its old and its new name.
    """
    if not isinstance(root, yaml.MappingNode):
        return root
    version = _version(root, file, current)
    for number in range(version, current):
        for step in steps.get(number, ()):
            _rename(root, step.old.split("."), step.new.split("."), file)
    return root


def _version(root: yaml.MappingNode, file: Path, current: int) -> int:
    node = _child(root, "version")
    if node is None or tag(node) != "int" or not str(node.value).isdecimal():
        # A wrong type is named by the reader, with all other mistakes.
        return 1
    version = int(node.value[:9])
    if version > current:
        sentence = f"This file is of version {version}; this program understands versions up to {current}. Update it."
        raise ConfigError(file, [Problem(node.start_mark.line + 1, sentence)])
    if version >= 1:
        node.value = str(current)
    return version


def _child(node: yaml.Node | None, key: str) -> yaml.Node | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    return next((value for name, value in node.value if name.value == key), None)


def _rename(root: yaml.MappingNode, old: list[str], new: list[str], file: Path) -> None:
    holder: yaml.Node | None = root
    while len(old) > 1 and old[0] == new[0]:
        if old[0] == "[]":
            for item in holder.value if isinstance(holder, yaml.SequenceNode) else ():
                if isinstance(item, yaml.MappingNode):
                    _rename(item, old[1:], new[1:], file)
            return
        holder = _child(holder, old[0])
        old, new = old[1:], new[1:]
    source = holder
    for key in old[:-1]:
        source = _child(source, key)
    if not isinstance(holder, yaml.MappingNode) or not isinstance(source, yaml.MappingNode):
        return
    pair = next((pair for pair in source.value if pair[0].value == old[-1]), None)
    if pair is None:
        return
    source.value.remove(pair)
    for key in new[:-1]:
        inner = _child(holder, key)
        if not isinstance(inner, yaml.MappingNode):
            inner = yaml.MappingNode("tag:yaml.org,2002:map", [], pair[1].start_mark, pair[1].end_mark)
            name = yaml.ScalarNode("tag:yaml.org,2002:str", key, pair[0].start_mark, pair[0].end_mark)
            holder.value.append((name, inner))
        holder = inner
    if _child(holder, new[-1]) is not None:
        sentence = f"`{old[-1]}` is now called `{new[-1]}`, and both are given; remove the old one."
        raise ConfigError(file, [Problem(pair[0].start_mark.line + 1, sentence)])
    pair[0].value = new[-1]
    holder.value.append(pair)
