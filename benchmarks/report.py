"""Results: kept as JSON, drawn as tables (Markdown) and bars (SVG).

python benchmarks/report.py RESULTS.json --markdown docs/benchmarks.md --chart docs/benchmarks.svg
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from protocol.python_build import is_unoptimised

# What our rows begin with.
NAME = "Towpath"
LANE = "bare lane"
DISK = "the disk alone"


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

    @property
    def cpu_seconds(self) -> float | None:
        """The median of both ends together; None where nobody counted."""
        return statistics.median(self.cpu) if self.cpu else None


@dataclass(frozen=True)
class Measure:
    """One number that stands for itself; ``limit``: the most it should be."""

    what: str
    value: float
    unit: str
    limit: float | None = None


@dataclass
class Result:
    """All there is about one goal: programs beside each other (ours first), or single numbers."""

    key: str
    rows: list[Row]
    measures: list[Measure] = field(default_factory=list)


@dataclass(frozen=True)
class Goal:
    """What is measured, and how many times each peer's rate ours should have. ``cpu``: the most CPU time, in times of
    the bare lane's. ``lower``: the lowest of these peers counts, not each of them."""

    title: str
    rates: dict[str, float] = field(default_factory=dict)
    cpu: float | None = None
    lower: bool = False


_ENCRYPTED = dict.fromkeys(("scp", "rsync over ssh", "tar over TLS (socat)", "GridFTP private"), 1.2)
GOALS = {
    "G1": Goal(
        "one large file, in memory",
        {"curl from nginx": 1.0, "GridFTP private": 1.5, "scp": 2.0, LANE: 0.9},
        cpu=1.15,
    ),
    "G1d": Goal(
        "one large file, durable on disk and read back",
        {LANE: 0.85, DISK: 0.85, "GridFTP private, checksum": 4.0},
        lower=True,
    ),
    "G2": Goal("small files, in memory", {"rsync over ssh": 1.5, "GridFTP private": 5.0, "rsync daemon": 1.0}),
    "G2d": Goal("small files, durable on disk", {"cp": 0.9, "rsync over ssh": 1.0}),
    "G3": Goal("100 files of 10 MiB, durable on disk", _ENCRYPTED),
    "G3m": Goal("a real tree, durable on disk", _ENCRYPTED),
    "G4": Goal("a tree of small files again, nothing changed", {"rsync over ssh": 1.0}),
    **{
        f"G5-{loss:g}": Goal(
            f"one large file over 100 ms at 200 Mbit/s, {loss:g} % lost", {"iperf3": 0.95, "GridFTP": 1.2}
        )
        for loss in (0, 0.1, 1)
    },
    "G5f": Goal("small files over a long path"),
    "G5z": Goal("program text over a long path, compressed"),
    "G6": Goal("memory and state by number of files"),
    "G7": Goal("starting"),
    "G8": Goal("listing a folder while a transfer runs"),
}


def table(result: Result) -> str:
    """Ours first, then the peers with the ratio ours / theirs and, where there is a goal, whether it is reached. Of
    two rows of ours the first is the one that is compared: it gives the same guarantees as the peers."""
    goal = GOALS[result.key]
    lines = [f"### {result.key}: {goal.title}", ""]
    if result.measures:
        lines += ["| what | value | goal |", "| --- | --- | --- |"]
        lines += [
            f"| {found.what} | {_number(found.value)} {found.unit} | {_at_most(found)} |" for found in result.measures
        ]
        return "\n".join(lines)
    ours = result.rows[0]
    unit = ours.unit
    lines.append(
        f"| {ours.amount:,.0f} {unit} | on the wire | s (range) | {unit}/s | CPU s both | ours / theirs | goal |"
    )
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in result.rows:
        spread = f"{statistics.median(row.seconds):.2f} ({min(row.seconds):.2f}-{max(row.seconds):.2f})"
        shown = "" if row is ours else f"{ours.rate / row.rate:.2f}"
        used = "" if row.cpu_seconds is None else f"{row.cpu_seconds:.2f}"
        lines.append(
            f"| {row.name} | {row.wire} | {spread} | {_number(row.rate)} | {used} | {shown} "
            f"| {_verdict(goal, result.rows, row)} |"
        )
    missing = [name for name in goal.rates if name not in {row.name for row in result.rows}]
    if missing:
        lines.append(f"\nNot compared, because not installed or not able to: {', '.join(missing)}.")
    return "\n".join(lines)


def _number(value: float) -> str:
    """Whole where it is large, else as exact as two decimals."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.2f}"


def _at_most(found: Measure) -> str:
    if found.limit is None:
        return ""
    return f"at most {found.limit:g}: {'reached' if found.value <= found.limit else '**missed**'}"


def _verdict(goal: Goal, rows: list[Row], row: Row) -> str:
    ours, least = rows[0], goal.rates.get(row.name)
    said = []
    if least is not None:
        either = [other.rate for other in rows if other.name in (LANE, DISK)]
        if goal.lower and row.name in (LANE, DISK) and row.rate > min(either):
            return "(the lower of both counts)"
        said.append(f"{least:g} x {'reached' if ours.rate >= least * row.rate else '**missed**'}")
    if goal.cpu is not None and row.name == LANE and ours.cpu_seconds and row.cpu_seconds:
        used = ours.cpu_seconds / row.cpu_seconds
        said.append(f"CPU {used:.2f}, at most {goal.cpu:g} x {'reached' if used <= goal.cpu else '**missed**'}")
    return "; ".join(said)


def machine() -> dict[str, Any]:
    """What it was measured on, in general words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "memory_gib": round(memory),
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python": platform.python_version() + (" (built without optimisations)" if is_unoptimised() else ""),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def store(path: Path, result: Result) -> None:
    """Add a result to a file; what it holds of the same goal is replaced."""
    document = json.loads(path.read_text()) if path.exists() else {"results": {}}
    document["machine"] = machine()
    document["results"][result.key] = {
        "rows": [asdict(row) for row in result.rows],
        "measures": [asdict(found) for found in result.measures],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def load(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """The machine, and all results in the goals' order."""
    document = json.loads(path.read_text())
    results = [
        Result(key, [Row(**row) for row in kept["rows"]], [Measure(**found) for found in kept["measures"]])
        for key in GOALS
        if (kept := document["results"].get(key)) is not None
    ]
    return document["machine"], results


def markdown(made_on: dict[str, Any], results: list[Result], chart_name: str) -> str:
    """A page of tables."""
    head = (
        f"# Benchmarks\n\nMeasured on {made_on['date']} on a machine with {made_on['cores']} cores "
        f"({made_on['processor']}), {made_on['memory_gib']} GiB of memory, {made_on['system']}, "
        f"Python {made_on['python']}. Both ends share the machine, over loopback; CPU seconds are those of both. "
        "The programs took turns in one run, so the ratios count, not the rates: above 1 ours was faster.\n\n"
        "Ours digests everything at both ends and checks what has come; the peers check no more than that. Where ours "
        "has two rows, the first one does not read back from the destination's storage afterwards: it is compared, and "
        "held against the goal. The second shows what reading back, the default, costs. G1d and G4 are read back.\n\n"
        "Written by `benchmarks/run.py` and `benchmarks/report.py`, which say how; [performance.md](performance.md) "
        "says why.\n\n"
        f"![rates]({chart_name})\n"
    )
    return head + "\n" + "\n\n".join(map(table, results)) + "\n"


def chart(results: list[Result], path: Path) -> None:
    """Bars of the rates, one panel for each piece of work, ours in another colour."""
    width, bar, gap, left = 760, 20, 46, 230
    parts: list[str] = []
    y = 10
    for result in results:
        if not result.rows:
            continue
        top, unit = max(row.rate for row in result.rows), result.rows[0].unit
        title = f"{result.key}: {GOALS[result.key].title}, {unit}/s"
        parts.append(f'<text x="10" y="{y + 16}" font-weight="bold">{escape(title)}</text>')
        y += 26
        for row in result.rows:
            long = max(1, int((width - left - 110) * row.rate / top))
            colour = "#0b6e4f" if row.name.startswith(NAME) else "#9aa5b1"
            parts.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(row.name)}</text>')
            parts.append(f'<rect x="{left}" y="{y}" width="{long}" height="{bar - 4}" fill="{colour}"/>')
            parts.append(f'<text x="{left + long + 6}" y="{y + 14}">{row.rate:,.0f}</text>')
            y += bar
        y += gap - 26
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" font-family="sans-serif" font-size="13">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--markdown", type=Path, required=True)
    parser.add_argument("--chart", type=Path, required=True)
    options = parser.parse_args()
    made_on, results = load(options.results)
    options.markdown.write_text(markdown(made_on, results, options.chart.name))
    chart(results, options.chart)


if __name__ == "__main__":
    main()
