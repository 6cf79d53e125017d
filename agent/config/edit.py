"""Changes a configuration file without touching what the owner wrote around it.

Text is inserted at the places where the parser found the nodes; comments, order and layout stay. (YAML libraries that
keep comments tie them to the entry before, so that appending to a list moves the comment of the next section.)
Every edit is checked by parsing the result (`checked`); a layout that cannot be edited raises `CannotEdit`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from agent.config.keys import AgentConfig, ConfigError, compose, parse_config
from protocol.errors import TowpathError

Scalar = str | bool | int


class CannotEdit(TowpathError):
    """The file's layout leaves no safe place for the change; the owner must make it."""

    default_code = "CONFIG_ERROR"


def set_value(text: str, section: str | None, key: str, value: Scalar, file: Path) -> str:
    """The text with ``section.key`` (or a top-level ``key``) set. Raises `ConfigError` or `CannotEdit`."""
    root = _root(text, file)
    holder = root if section is None else _child(root, section)
    if section is not None and (holder is None or _is_null(holder)):
        block = f"{section}:\n  {key}: {_scalar(value)}\n"
        return _append(text, block) if holder is None else _replace_entry(text, root, section, block)
    if not isinstance(holder, yaml.MappingNode):
        raise CannotEdit(f"Set `{key}: {_scalar(value)}` in `{section}` of {file} by hand.", who="you")
    node = _child(holder, key)
    if node is not None:
        # An empty value (`url:`) has no text of its own; what stands there is put behind the colon.
        space = " " if node.start_mark.index == node.end_mark.index else ""
        return _replace(text, node, space + _scalar(value))
    if holder.flow_style:
        at = holder.end_mark.index - 1
        comma = ", " if holder.value else ""
        return text[:at] + f"{comma}{key}: {_scalar(value)}" + text[at:]
    return _insert_line(text, _last_leaf(holder), holder.start_mark.column, f"{key}: {_scalar(value)}")


def append_collection(text: str, collection: Mapping[str, Scalar], file: Path) -> str:
    """The text with one more entry in ``collections``. Raises `ConfigError` or `CannotEdit`."""
    root = _root(text, file)
    node = _child(root, "collections")
    lines = [f"{key}: {_scalar(value)}" for key, value in collection.items()]
    if node is None:
        return _append(text, _block("collections:", lines, 2))
    if _is_null(node) or (isinstance(node, yaml.SequenceNode) and not node.value):
        return _replace_entry(text, root, "collections", _block("collections:", lines, 2))
    if not isinstance(node, yaml.SequenceNode):
        raise CannotEdit(f"`collections` in {file} is not a list.", who="you")
    if node.flow_style:
        at = node.end_mark.index - 1
        return text[:at] + ", " + json.dumps(dict(collection), ensure_ascii=False) + text[at:]
    column = node.start_mark.column
    entry = _block("", lines, column).strip("\n").lstrip()
    return _insert_line(text, _last_leaf(node), column, entry)


def checked(text: str, file: Path) -> AgentConfig:
    """Parse an edited text. Raises `CannotEdit` if the edit broke it."""
    try:
        return parse_config(text.encode(), file)
    except ConfigError as error:
        raise CannotEdit(
            f"{file} could not be changed safely; nothing was written. Add the entry by hand.", who="you"
        ) from error


def _root(text: str, file: Path) -> yaml.MappingNode:
    root = compose(text.encode(), file)
    if root is None:
        return yaml.MappingNode("tag:yaml.org,2002:map", [])
    if not isinstance(root, yaml.MappingNode) or root.flow_style:
        raise CannotEdit(f"{file} is not written as `key: value` lines; add the entry by hand.", who="you")
    return root


def _child(node: yaml.MappingNode, key: str) -> yaml.Node | None:
    return next((value for name, value in node.value if name.value == key), None)


def _is_null(node: yaml.Node) -> bool:
    return str(node.tag).endswith(":null")


def _scalar(value: Scalar) -> str:
    """One value as YAML. JSON strings are YAML strings; plain words stay plain."""
    if isinstance(value, bool | int):
        return json.dumps(value)
    plain = value and all(c.isalnum() or c in "-_/." for c in value) and value[0].isalpha() | (value[0] == "/")
    if plain and value.isascii() and yaml.safe_load(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def _block(head: str, lines: list[str], column: int) -> str:
    indent = " " * column
    body = "".join(f"{indent}{'- ' if number == 0 else '  '}{line}\n" for number, line in enumerate(lines))
    return f"{head}\n{body}"


def _last_leaf(node: yaml.Node) -> yaml.Node:
    """The node whose end is the end of the text of this one; a block's own end mark lies behind the comments."""
    while isinstance(node, yaml.MappingNode | yaml.SequenceNode) and node.value and not node.flow_style:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    return node


def _insert_line(text: str, after: yaml.Node, column: int, line: str) -> str:
    at = text.find("\n", after.end_mark.index)
    if isinstance(after, yaml.ScalarNode) and after.style in ("|", ">"):
        # Block scalars end at the beginning of the line behind them.
        at = after.end_mark.index - 1
    if at < 0:
        text, at = text + "\n", len(text)
    return text[: at + 1] + " " * column + line + "\n" + text[at + 1 :]


def _replace(text: str, node: yaml.Node, value: str) -> str:
    return text[: node.start_mark.index] + value + text[node.end_mark.index :]


def _replace_entry(text: str, root: yaml.MappingNode, key: str, block: str) -> str:
    """Put a block in the place of ``key: []`` or ``key:``; a comment on that line goes behind the key."""
    name, value = next((name, value) for name, value in root.value if name.value == key)
    end = text.find("\n", value.end_mark.index)
    end = len(text) if end < 0 else end
    comment = text[value.end_mark.index : end].strip()
    head, _, body = block.partition("\n")
    head += f"  {comment}" if comment.startswith("#") else ""
    return text[: name.start_mark.index] + head + "\n" + body.rstrip("\n") + text[end:]


def _append(text: str, block: str) -> str:
    return text + ("" if not text or text.endswith("\n") else "\n") + block
