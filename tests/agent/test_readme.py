"""What the README tells people to set sends nothing of theirs to anybody but their relay, and every command that a page
names is there, with its options."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from agent.cli.main import cli as agent
from agent.cli.transfer import _OWN_FIELDS
from relay.cli.main import cli as relay

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
# What has changed (docs/changes) also tells of commands that are not there.
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "conf").glob("*.yaml"))]
PROGRAMS: dict[str, click.Command] = {"towpath": agent, "towpath-relay": relay}
# What unmodified clients look for at Globus where nothing else is named, and send their tokens to.
SERVICES = ("AUTH", "TRANSFER", "GROUPS", "SEARCH", "TIMER", "FLOWS", "COMPUTE")


def test_the_environment_of_the_readme_names_the_relay_for_every_service() -> None:
    lines = README.read_text().splitlines()
    begin = next(at for at, line in enumerate(lines) if line.startswith("    export GLOBUS_SDK_SERVICE_URL_AUTH"))
    end = next(at for at, line in enumerate(lines) if line.startswith("    globus login"))
    script = "\n".join(line.strip() for line in lines[begin:end])
    told = subprocess.run(["sh", "-c", f"{script}\nenv"], env={}, capture_output=True, text=True, check=True).stdout
    named = dict(line.split("=", 1) for line in told.splitlines() if line.startswith("GLOBUS_SDK_SERVICE_URL_"))
    assert {name.removeprefix("GLOBUS_SDK_SERVICE_URL_") for name in named} == set(SERVICES)
    assert {address.rstrip("/") for address in named.values()} == {"https://relay.example.org:8443"}


def test_programs_are_told_every_field_of_a_transfer_that_is_ours() -> None:
    page = (ROOT / "docs" / "applications.md").read_text()
    ours = {field for field in _OWN_FIELDS.values() if field.startswith(("towpath_", "delete_"))}
    assert len(ours) == 8
    assert not {field for field in ours if f"`{field}`" not in page}


def commands(text: str) -> Iterator[list[str]]:
    """The commands in a page: indented lines, as far as a shell would give them to one program, and code in sentences,
    where ``a b | c`` names two."""
    lines = re.findall(
        r"^ {4}(?:[A-Z_]+=\S+ )?((?:towpath|towpath-relay) .+?)(?:  +#.*| [&|>].*)?$", text, re.MULTILINE
    )
    for command in lines + re.findall(r"`([^`]+)`", re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)):
        first, *others = command.split(" | ")
        # What the shell puts in is one word.
        words = shlex.split(re.sub(r"\$\([^)]*\)", "X", first)) if first.startswith("towpath") else [""]
        if words[0] in PROGRAMS and words[1:2] != ["…"]:
            yield words
            yield from ([*words[:-1], *other.split()] for other in others)


def taken(program: click.Command, name: str, arguments: list[str]) -> None:
    """Go down to the command and have it look at its options, running nothing. Raises `click.UsageError`."""
    context = click.Context(program, info_name=name)
    _, rest, _ = program.make_parser(context).parse_args(list(arguments))
    if isinstance(program, click.Group):
        if rest:
            below = program.get_command(context, rest[0])
            if below is None:
                raise click.UsageError(f"{name} has no command {rest[0]}.")
            taken(below, rest[0], rest[1:])
    elif rest:
        raise click.UsageError(f"{name} takes no {rest[0]}.")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_is_there(page: Path) -> None:
    wrong = []
    for words in commands(page.read_text()):
        try:
            taken(PROGRAMS[words[0]], words[0], words[1:])
        except click.BadOptionUsage:
            # An option named without its value.
            continue
        except click.UsageError as error:
            wrong.append(f"{shlex.join(words)}: {error.format_message()}")
    assert wrong == []


def test_commands_are_found_in_pages() -> None:
    assert sum(len(list(commands(page.read_text()))) for page in PAGES) > 80
    for words in ("nothing", "status --nothing", "status nothing", "task nothing"):
        with pytest.raises(click.UsageError):
            taken(agent, "towpath", words.split())
