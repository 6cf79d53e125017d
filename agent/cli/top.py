"""``towpath top``: what moves now, on one screen that keeps itself up to date."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from agent.cli.output import CommandFailed, console
from agent.cli.service import config_option, failing_plainly, read_from_here
from agent.quantities import human_bytes, human_seconds
from protocol.control import FINAL_STATES
from protocol.terminal import terminal_safe


@click.command()
@click.option(
    "--interval", type=click.FloatRange(0.2, 60), default=1.0, show_default=True, help="Seconds between looks."
)
@click.option("--once", is_flag=True, help="Look twice, print once, and end.")
@config_option
def top(interval: float, once: bool, config_file: Path) -> None:
    """Watch the transfers of this machine until Ctrl-C."""
    from rich.live import Live

    from agent import local_socket
    from agent.config.layers import state_dir_of

    state_dir = state_dir_of(config_file)

    def look() -> dict[str, Any]:
        with failing_plainly():
            return local_socket.ask(state_dir, "GET", "/status")

    before, began = look(), time.monotonic()
    if once or not sys.stdout.isatty():
        time.sleep(interval)
        for line in lines_of(look(), before, time.monotonic() - began):
            click.echo(line)
        return
    try:
        with Live(console=console(), auto_refresh=False, screen=True) as live:
            while True:
                time.sleep(interval)
                now, moment = look(), time.monotonic()
                live.update("\n".join(lines_of(now, before, moment - began)), refresh=True)
                before, began = now, moment
    except (CommandFailed, KeyboardInterrupt) as end:
        if isinstance(end, CommandFailed):
            raise


def _pause(now: dict[str, Any]) -> str:
    return ", PAUSED" if now["paused"] else ", DRAINING" if now.get("draining") else ""


def lines_of(now: dict[str, Any], before: dict[str, Any], seconds: float) -> list[str]:
    """The screen as lines, from two statuses so many seconds apart."""
    link = now["link"]
    where = "linked" if link["connected"] else f"not linked: {link['last_error'] or 'connecting'}"
    lines = [f"Agent {now['version']}, {terminal_safe(where)}{_pause(now)}"]
    earlier = {row["task_id"]: row for row in before["tasks"]}
    tasks = sorted(now["tasks"], key=lambda row: (row["state"] in FINAL_STATES, row["task_id"]))
    moved = 0.0
    rows = []
    for row in tasks:
        counters = row["counters"]
        old = earlier.get(row["task_id"], row)["counters"]
        rate = max(0, counters["bytes_transferred"] - old["bytes_transferred"]) / max(seconds, 1e-6)
        moved += rate
        rows.append(_task_line(row, counters, rate))
    active = sum(row["state"] == "ACTIVE" for row in tasks)
    lines.append(f"{active} active of {len(tasks)} task(s), {human_bytes(moved)}/s arriving")
    sessions = now["transfer"]["sessions"]
    if sessions:
        sent = max(0, now["transfer"]["sent"] - before["transfer"]["sent"]) / max(seconds, 1e-6)
        lines.append(f"{read_from_here(sessions)} {human_bytes(sent)}/s leaving")
    lines.append("")
    heading = f"{'TASK':<36}  {'STATE':<22}  {'DONE':>6}  {'FILES':>15}  {'BYTES':>21}  {'RATE':>12}  LEFT"
    if rows:
        return [*lines, heading, *rows]
    return lines if sessions else [*lines, "Nothing to do."]


def _task_line(row: dict[str, Any], counters: dict[str, Any], rate: float) -> str:
    total, done = counters["bytes_total"], counters["bytes_transferred"]
    share = f"{100 * done / total:.0f} %" if total and counters["scan_complete"] else "…"
    left = human_seconds((total - done) / rate) if rate > 0 and total >= done and counters["scan_complete"] else ""
    state = row["state"] if row["status_code"] in ("OK", "QUEUED") else row["status_code"]
    files = f"{counters['files_transferred']}/{counters['files']}"
    line = (
        f"{row['task_id']:<36}  {terminal_safe(state)[:22]:<22}  {share:>6}  {files:>15}  "
        f"{human_bytes(done) + '/' + human_bytes(total):>21}  {human_bytes(rate) + '/s':>12}  {left}"
    )
    held = f"\n    {terminal_safe(row['status_sentence'])}" if row["status_sentence"] else ""
    current = f"\n    {terminal_safe(row['current'])}" if row["current"] and row["state"] == "ACTIVE" else ""
    return line.rstrip() + held + current
