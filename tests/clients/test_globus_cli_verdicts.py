"""docs/globus-cli.md says what was tried, and nothing else.

The other files of this folder are run before it: in the same process or, with a file that keeps their calls
(`calls.FILE`), in several others.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.clients.browser import missing_programs
from tests.clients.calls import FILE, Calls

pytestmark = [pytest.mark.clients]

TABLE = Path(__file__).parents[2] / "docs" / "globus-cli.md"
FILES = {
    "test_globus_cli_login",
    "test_globus_cli_options",
    "test_globus_cli_roles",
    "test_globus_cli_sign_in",
    "test_globus_cli_transfer",
}


def rows() -> list[tuple[tuple[str, ...], set[str], str]]:
    found = []
    for line in TABLE.read_text().splitlines():
        if line.startswith("| `globus "):
            command, options, verdict, *_ = [cell.strip() for cell in line.strip("|").split("|")]
            words = tuple(command.strip("`").split()[1:])
            found.append((words, set(re.findall(r"`(-[^`]*)`", options)), verdict))
    return found


def options_used(words: tuple[str, ...], calls: list[tuple[str, ...]]) -> set[str] | None:
    """Every option that a command was called with, or None if it was never called."""
    made = [call for call in calls if call[: len(words)] == words]
    return {word for call in made for word in call if re.match(r"--?[A-Za-z]", word)} if made else None


def test_the_table_says_what_was_tried(request: pytest.FixtureRequest, calls: Calls) -> None:
    files = {item.path.stem for item in request.session.items if not item.get_closest_marker("skip")}
    kept = FILE in os.environ and not files & FILES
    whole = files >= FILES and not request.config.option.keyword and not hasattr(request.config, "workerinput")
    if not kept and not whole:
        pytest.skip("only a run of all these tests can be compared with the table")
    if missing := ("GLOBUS_CLI" not in os.environ and "the globus command") or missing_programs():
        pytest.skip(f"without {missing} not all of these tests have run")
    _compare(calls.everything())


def _compare(calls: list[tuple[str, ...]]) -> None:
    works = [(words, options) for words, options, verdict in rows() if verdict == "works"]
    wrong = {words: missing for words, options in works if (missing := _missing(words, options, calls))}
    assert wrong == {}
    known = {words for words, _, _ in rows()}
    unlisted = {call for call in calls if not any(call[: len(words)] == words for words in known)}
    assert unlisted == set()


def _missing(words: tuple[str, ...], options: set[str], calls: list[tuple[str, ...]]) -> set[str]:
    used = options_used(words, calls)
    return {"never called"} if used is None else options - used


def test_each_verdict_is_one_of_three() -> None:
    assert {verdict for _, _, verdict in rows()} == {"works", "differs", "missing"}
    assert len(rows()) > 30
