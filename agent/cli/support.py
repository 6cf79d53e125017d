"""``towpath support-bundle``: one file with what somebody needs who is to help, and no secret in it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click

from agent.cli.background import LOG_FILE
from agent.cli.doctor import examine, run_check
from agent.cli.logs import last_lines
from agent.cli.service import config_option, failing_plainly


@click.command("support-bundle")
@click.option("--output", "target", type=click.Path(dir_okay=False, path_type=Path), help="Where to write it.")
@config_option
def support_bundle(target: Path | None, config_file: Path) -> None:
    """Collect log, configuration, state and the doctor's findings in a ZIP file, without secrets.

    Names of folders, files in log lines, and ids are in it: look before you send it.
    """
    from agent.config.keys import ConfigError
    from agent.config.layers import load, overlay_file, state_dir_of
    from agent.config.show import rows_of
    from agent.doctor.registry import CHECKS
    from agent.redaction import Redactor
    from agent.support import MAX_LOG_TEXT, facts, known_secrets, state_listing, write_bundle
    from protocol.findings import document_of

    target = target or Path(f"towpath-support-{time.strftime('%Y%m%d-%H%M%S')}.zip")
    state_dir = state_dir_of(config_file)
    config_dir = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "towpath"
    cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "towpath"
    redactor = Redactor(known_secrets(state_dir, config_dir, cache_dir, os.environ))
    examination = examine(config_file)
    try:
        configuration: object = [row.__dict__ for row in rows_of(load(config_file))]
    except ConfigError as error:
        configuration = {"mistakes": error.sentence}
    parts: dict[str, str | object] = {
        "facts.json": facts(),
        "status.json": examination.status or {"running": False},
        "configuration.json": configuration,
        "doctor.json": [document_of(entry.name, run_check(entry, examination)) for entry in CHECKS],
        "state.json": state_listing(state_dir),
    }
    for file in (config_file, overlay_file(config_file)):
        if file.exists():
            parts[f"files/{file.name}"] = _text(file)
    if (state_dir / LOG_FILE).exists():
        parts["agent.log"] = "\n".join(last_lines(state_dir / LOG_FILE, 20_000))[-MAX_LOG_TEXT:]
    with failing_plainly():
        names = write_bundle(target, parts, redactor)
    click.echo(f"{target} holds {', '.join(names)}. Known secrets are removed; look into it before you send it.")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"It cannot be read: {error.strerror}."
