"""The doctor's look at the agents that data came from lately: which ways to them are open now."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from agent import local_socket
from agent.doctor.registry import Examination
from protocol.errors import TowpathError
from protocol.findings import Finding

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
        yield Finding(
            level="note",
            sentence="No data came from another agent lately, so there is none to look for. Ways are arranged by who "
            "receives: for agents that data goes to from here, run `towpath doctor peers` there.",
        )
    for row in peers:
        yield finding_of(row)


def finding_of(row: dict[str, Any]) -> Finding:
    """What was found of one peer, in words."""
    name = row.get("name") or row.get("collection_id", "")
    kind, trip = str(row.get("kind", "")), row.get("rtt_ms")
    others = _others(row)
    if kind:
        after = f", {trip:.0f} ms there and back" if isinstance(trip, int | float) else ""
        sentence = f"{name} is reached directly: {_WAYS.get(kind, kind)}{after}.{others}"
        return Finding(level="ok", sentence=sentence, details=row)
    why = f": {row['why']}" if row.get("why") else ""
    sentence = f"No direct way to {name} was found over TCP{why}.{others}"
    if row.get("udp"):
        # A direct way all the same.
        return Finding(level="ok", sentence=sentence, details=row)
    reach = "One side in reach is enough: a port mapping, IPv6, or an open data port named in `data.advertise`."
    if "data.allow_loopback" in why:
        # No router stands between two agents of one machine.
        reach = "`towpath config set data.allow_loopback true` with both agents lets them meet."
    if row.get("answered") is False:
        return Finding(
            level="warning",
            sentence=f"{sentence} It did not answer through the relay either: it may be switched off or not linked.",
            advice="Nothing can be transferred from it until it is linked: `towpath status` there says whether it is.",
            details=row,
        )
    if row.get("tunnel") is False:
        return Finding(
            level="failure", sentence=sentence, advice=f"Nothing can be transferred now. {reach}", details=row
        )
    return Finding(level="warning", sentence=sentence, advice=f"Data goes through the relay. {reach}", details=row)


def _others(row: dict[str, Any]) -> str:
    """What became of the looks at UDP and the tunnel."""
    said = ""
    for key, subject, works in (
        ("udp", "QUIC over UDP", "works"),
        ("tunnel", "The relay's tunnel", "connects the two"),
    ):
        if row.get(key) is not None:
            why = f" ({row[key + '_why']})" if row.get(key + "_why") else ""
            said += f" {subject} {works}." if row[key] else f" {subject} does not{why}."
    return said
