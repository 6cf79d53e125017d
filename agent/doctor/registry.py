"""The checks of `towpath doctor`: a table of functions, each imported only when it is run.

A check is a plain function that takes an `Examination` and yields `Finding`s; it may block (each runs in its own
thread with a time limit, see `agent.cli.doctor`), changes nothing, and never raises for what it came to find. To add
one, write the function in a module of this package and add its line to `CHECKS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from protocol.findings import Finding

if TYPE_CHECKING:
    from agent.config.keys import AgentConfig


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What there is to look at. ``config`` is None when the file cannot be used, ``status`` (the document of `towpath
    status --format json`) when no agent runs. ``now`` in Unix seconds."""

    config_file: Path
    config: AgentConfig | None
    status: dict[str, Any] | None
    now: float


Check = Callable[[Examination], Iterable[Finding]]


@dataclass(frozen=True)
class Entry:
    """One check: its name on the command line and in JSON, its heading, where it is (``module:function``), and how many
    seconds it may take."""

    name: str
    title: str
    target: str
    seconds: float = 10.0

    def load(self) -> Check:
        """Import the function."""
        module, _, attribute = self.target.partition(":")
        return cast("Check", getattr(importlib.import_module(module), attribute))


CHECKS: tuple[Entry, ...] = (
    Entry("configuration", "Configuration", "agent.doctor.machine:check_configuration"),
    Entry("agent", "Agent", "agent.doctor.machine:check_agent"),
    Entry("state", "State directory", "agent.doctor.machine:check_state"),
    Entry("collections", "Collections", "agent.doctor.machine:check_collections"),
    Entry("relay", "Way to the relay", "agent.doctor.network:check_relay", 30.0),
    Entry("nat", "NAT, UDP and IPv6", "agent.doctor.network:check_nat", 20.0),
    Entry("paths", "Paths of tasks", "agent.doctor.network:check_paths"),
    Entry("peers", "Ways to other agents", "agent.doctor.peers:check_peers", 30.0),
)
