"""``towpath doctor``: look at everything that can be wrong, and say what to do."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agent.cli.command import with_output
from agent.cli.output import Output
from agent.cli.service import config_option
from agent.exit_codes import ExitCode

if TYPE_CHECKING:
    from agent.doctor.registry import Entry, Examination
    from protocol.findings import Finding


@click.command()
@click.argument("checks", nargs=-1)
@config_option
@with_output
def doctor(out: Output, checks: tuple[str, ...], config_file: Path) -> int:
    """Examine this machine, its agent and its network. Exit code 1 when something does not work.

    CHECKS are names of single checks; all of them if none is given.
    """
    from agent.doctor.registry import CHECKS
    from protocol.findings import document_of, failed, lines_of

    known = {entry.name for entry in CHECKS}
    unknown = [name for name in checks if name not in known]
    if unknown:
        raise click.UsageError(f"There is no check {unknown[0]}; known are {', '.join(sorted(known))}.")
    examination = examine(config_file)
    report = []
    for entry in CHECKS:
        if checks and entry.name not in checks:
            continue
        findings = run_check(entry, examination)
        report.append((entry, findings))
        if findings and not out.is_json:
            for line in lines_of(entry.title, findings):
                out.line(line)
    if out.is_json:
        out.document({"checks": [document_of(entry.name, findings) for entry, findings in report]})
    return ExitCode.OTHER if any(failed(findings) for _, findings in report) else ExitCode.DONE


def examine(config_file: Path) -> Examination:
    """What there is to look at now."""
    from agent import local_socket
    from agent.config.keys import ConfigError
    from agent.config.layers import load_config
    from agent.doctor.registry import Examination
    from protocol.errors import TowpathError

    config = status = None
    try:
        config = load_config(config_file)
        status = local_socket.ask(config.state_dir, "GET", "/status")
    except (ConfigError, TowpathError):
        # The checks find out why, each in its own words.
        pass
    return Examination(config_file=config_file, config=config, status=status, now=time.time())


def run_check(entry: Entry, examination: Examination) -> list[Finding]:
    """Run one check within its time. A check that breaks or hangs is a finding too."""
    from protocol import threads
    from protocol.findings import Finding

    findings: list[Finding] = []

    def work() -> None:
        try:
            findings.extend(entry.load()(examination))
        except Exception as error:
            findings.append(
                Finding(level="failure", sentence=f"The check itself failed: {type(error).__name__}: {error}.")
            )

    thread = threading.Thread(target=work, daemon=True)
    try:
        threads.start(thread)
    except threads.NoThread as error:
        advice = "Raise the limit of processes of this account (`ulimit -u`), or end some."
        return [Finding(level="failure", sentence=f"The check could not begin: {error.strerror}.", advice=advice)]
    thread.join(entry.seconds)
    found = list(findings)
    if thread.is_alive():
        sentence = f"The check did not come to an end within {entry.seconds:g} seconds."
        found.append(Finding(level="failure", sentence=sentence, advice="Something it looked at hangs."))
    return found
