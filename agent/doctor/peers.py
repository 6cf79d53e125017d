"""The doctor's look at the agents that data came from lately: whether a direct way to them is found now."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from agent import local_socket
from agent.doctor.registry import Examination, Finding
from protocol.errors import TowpathError

PATIENCE = 25.0

_WAYS = {
    "direct": "it can be dialled",
    "reversed": "it can dial this machine",
    "punched": "both sides' NATs or firewalls let a punched connection through",
    "quic": "over QUIC (UDP)",
}


def check_peers(examination: Examination) -> Iterator[Finding]:
    """Race for a path to each, through the relay's signalling; nothing is transferred."""
    if examination.status is None or examination.config is None:
        yield Finding(level="note", sentence="This is looked at only while the agent runs.")
        return
    try:
        answer = local_socket.ask(examination.config.state_dir, "POST", "/peers", timeout=PATIENCE)
    except TowpathError as error:
        yield Finding(level="note", sentence=error.sentence)
        return
    peers = [row for row in answer.get("peers", []) if isinstance(row, dict)]
    if not peers:
        yield Finding(level="note", sentence="No data came from another agent lately, so there is none to look for.")
    for row in peers:
        yield finding_of(row)


def finding_of(row: dict[str, Any]) -> Finding:
    """What was found of one peer, in words."""
    name = row.get("name") or row.get("collection_id", "")
    kind, trip = str(row.get("kind", "")), row.get("rtt_ms")
    if not kind:
        why = f": {row['why']}" if row.get("why") else ""
        return Finding(
            level="warning",
            sentence=f"No direct way to {name} was found{why}.",
            advice="Data goes through the relay, or over UDP where that passes. One side in reach is enough: a port "
            "mapping, IPv6, or an open data port named in `data.advertise`.",
            details=row,
        )
    after = f", {trip:.0f} ms there and back" if isinstance(trip, int | float) else ""
    return Finding(level="ok", sentence=f"{name} is reached directly: {_WAYS.get(kind, kind)}{after}.", details=row)
