"""What is raised inside `except*` comes out in a group again on Python before 3.11.4, where nobody expects one."""

from __future__ import annotations

import ast
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def raised_in_groups(text: str) -> list[int]:
    """The lines of a program on which something is raised where a group was caught."""
    caught = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.TryStar)]
    handlers = [handler for node in caught for handler in node.handlers]
    return sorted(node.lineno for handler in handlers for node in ast.walk(handler) if isinstance(node, ast.Raise))


def test_nothing_is_raised_where_a_group_was_caught() -> None:
    assert raised_in_groups("try:\n    pass\nexcept* OSError:\n    raise ValueError from None\n") == [4]
    for program in ("agent", "relay", "protocol"):
        for path in (PROJECT / program).rglob("*.py"):
            assert raised_in_groups(path.read_text()) == [], path.relative_to(PROJECT)
