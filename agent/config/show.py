"""What is in force, for people and programs: every setting with its value as written and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml

from agent.config.document import Entries, Section, as_written, schema_of, settings
from agent.config.keys import AgentConfig
from agent.config.kinds import Schema
from agent.config.layers import Loaded
from agent.redaction import Redactor


@dataclass(frozen=True)
class Row:
    """One setting by its dotted key."""

    key: str
    value: Any
    origin: str

    @property
    def text(self) -> str:
        """The value as it would stand in the file."""
        return (
            yaml.safe_dump(self.value, default_flow_style=True, width=10_000, allow_unicode=True)
            .split("\n...")[0]
            .strip()
        )

    def without_password(self) -> Row:
        """The same for who did not ask for this setting: an address of a proxy may hold a password."""
        if self.key != "relay.proxy" or self.value is None:
            return self
        return replace(self, value=Redactor().clean(self.value))


def rows_of(loaded: Loaded) -> Iterator[Row]:
    """All settings in the order of the definition."""
    yield from _rows(loaded.config, AgentConfig, (), "", loaded.origins)


def _rows(
    record: Any, definition: type[Any], path: tuple[str, ...], prefix: str, origins: Mapping[tuple[str, ...], str]
) -> Iterator[Row]:
    for row in settings(definition):
        value = getattr(record, row.name)
        here = (*path, row.name)
        if isinstance(row.kind, Section):
            yield from _rows(value, row.kind.record, here, f"{prefix}{row.key}.", origins)
        elif isinstance(row.kind, Entries):
            for entry in value:
                identity = str(getattr(entry, row.kind.identity))
                yield from _rows(entry, row.kind.record, (*here, identity), f"{prefix}{row.key}.{identity}.", origins)
        else:
            yield Row(prefix + row.key, as_written(row, value), origins.get(here, "default"))


def json_schema() -> Schema:
    """The JSON Schema of the owner's file, made from the definition."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Configuration of a Towpath agent",
        **schema_of(AgentConfig),
    }
