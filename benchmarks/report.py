"""Results as a table, as JSON and as a bar chart (SVG)."""

from __future__ import annotations

import json
import os
import platform
import statistics
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path


@dataclass
class Row:
    """All runs of one program at one piece of work. ``amount`` of ``unit`` in each of ``seconds``."""

    work: str
    name: str
    wire: str
    amount: float
    unit: str
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.amount / statistics.median(self.seconds)


@dataclass(frozen=True)
class Goal:
    """Ours should reach ``least`` times this peer's rate."""

    peer: str
    least: float


def table(title: str, rows: list[Row], goals: list[Goal]) -> str:
    """Ours first, then the peers with the ratio ours / theirs and, where there is a goal, whether it is reached."""
    ours = rows[0]
    wanted = {goal.peer: goal.least for goal in goals}
    unit = ours.unit
    head = f"| {title} | on the wire | s (range) | {unit}/s | CPU s both | ours / theirs | goal |"
    lines = [head, "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        spread = f"{statistics.median(row.seconds):.2f} ({min(row.seconds):.2f}-{max(row.seconds):.2f})"
        cpu = f"{statistics.median(row.cpu):.2f}" if row.cpu else ""
        ratio = ours.rate / row.rate
        goal = wanted.get(row.name)
        verdict = "" if goal is None else f"{goal:g} x {'reached' if ratio >= goal else 'MISSED'}"
        shown = "" if row is ours else f"{ratio:.2f}"
        lines.append(f"| {row.name} | {row.wire} | {spread} | {row.rate:,.0f} | {cpu} | {shown} | {verdict} |")
    missing = [goal.peer for goal in goals if goal.peer not in {row.name for row in rows}]
    if missing:
        lines.append(f"\nNot compared, because not installed or not able to: {', '.join(missing)}.")
    return "\n".join(lines)


def to_json(results: dict[str, list[Row]]) -> str:
    """Everything measured, with what it was measured on."""
    machine = {"cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
    return json.dumps(
        {"machine": machine, "results": {key: [asdict(row) for row in rows] for key, rows in results.items()}}, indent=1
    )


def chart(results: dict[str, list[Row]], path: Path) -> None:
    """Bars of the rates, one panel for each piece of work, ours in another colour."""
    width, bar, gap, left = 760, 20, 46, 230
    parts: list[str] = []
    y = 10
    for key, rows in results.items():
        top = max(row.rate for row in rows)
        parts.append(f'<text x="10" y="{y + 16}" font-weight="bold">{escape(key)}: {escape(rows[0].unit)}/s</text>')
        y += 26
        for row in rows:
            long = max(1, int((width - left - 110) * row.rate / top))
            colour = "#0b6e4f" if row is rows[0] else "#9aa5b1"
            parts.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(row.name)}</text>')
            parts.append(f'<rect x="{left}" y="{y}" width="{long}" height="{bar - 4}" fill="{colour}"/>')
            parts.append(f'<text x="{left + long + 6}" y="{y + 14}">{row.rate:,.0f}</text>')
            y += bar
        y += gap - 26
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" font-family="sans-serif" font-size="13">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )
