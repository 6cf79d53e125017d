"""What the doctors of agent and relay find, and how both tell it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# ``ok``: looked at, as it should be. ``note``: worth knowing. ``warning``: works, but not well or not for long.
# ``failure``: something does not work, or is open to others.
Level = Literal["ok", "note", "warning", "failure"]

# Days before the end of a relay's own authority from which on both say so: its copies are with every agent and client.
AUTHORITY_WARNING = 365.0


@dataclass(frozen=True)
class Finding:
    """What a check found: one sentence, and what to do about it (one sentence, empty if nothing is to be done).

    ``details`` are facts for programs; they must hold no secret.
    """

    level: Level
    sentence: str
    advice: str = ""
    details: dict[str, Any] | None = None


def lines_of(title: str, findings: Sequence[Finding]) -> Iterator[str]:
    """A check and what it found, for people. Text in it may be a peer's: whoever prints it makes it safe."""
    yield title
    for finding in findings:
        mark = finding.level.upper() if finding.level in ("warning", "failure") else finding.level
        yield f"  {mark:<8}{finding.sentence}"
        if finding.advice:
            yield f"  {'':<8}→ {finding.advice}"


def document_of(name: str, findings: Sequence[Finding]) -> dict[str, Any]:
    """A check and what it found, for programs."""
    rows = [
        {"level": one.level, "sentence": one.sentence, "advice": one.advice, "details": one.details or {}}
        for one in findings
    ]
    return {"name": name, "findings": rows}


def failed(findings: Sequence[Finding]) -> bool:
    """Whether a doctor ends with 1 for it."""
    return any(finding.level == "failure" for finding in findings)
