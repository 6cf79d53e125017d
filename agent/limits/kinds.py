"""Rates and times of the week as values of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from agent.config.kinds import Schema, Text, Wrong, tag
from agent.limits.rate import parse_rate
from agent.limits.timetable import FORM, parse_weekly


class Rate:
    """A kind of value of the configuration: a rate."""

    def read(self, node: yaml.Node, base: Path) -> int:
        """Bytes a second."""
        if isinstance(node, yaml.ScalarNode) and tag(node) in ("int", "float"):
            raise Wrong(f"must be a rate with its unit, such as 20 MB/s or 200 Mbit/s, not {node.value[:40]}")
        try:
            return parse_rate(Text(40).read(node, base))
        except ValueError as error:
            raise Wrong(f"must be a rate: {error}") from None

    def schema(self) -> Schema:
        """A string."""
        return {**Text(40).schema(), "pattern": r"^\s*[0-9]{1,13}(\.[0-9]{1,6})? ?[kMGT]?(B|bit)/s\s*$"}

    def written(self, value: Any) -> Any:
        """As it would stand in the file, exactly."""
        return None if value is None else f"{value} B/s"


class WeeklyTime:
    """A kind of value of the configuration: times of the week, as text."""

    def read(self, node: yaml.Node, base: Path) -> str:
        """The text."""
        text = Text(200).read(node, base)
        try:
            parse_weekly(text)
        except ValueError as error:
            raise Wrong(str(error)) from None
        return text

    def schema(self) -> Schema:
        """A string."""
        return {**Text(200).schema(), "pattern": f"^{FORM}$"}
