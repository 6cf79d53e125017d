"""Edits of the owner's file: the change is there, everything else is as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config.edit import CannotEdit, append_collection, checked, set_value
from agent.enrol import template

FILE = Path("/etc/example/agent.yaml")
FIRST = "6c54cade-bde5-45c1-bdea-f4bd71dba2cc"
SECOND = "7d65dbef-cef6-46d2-aefb-05ce82ecb3dd"
URL = "https://relay.example.org:8443"

LAYOUTS = {
    "documented": template(),
    "empty": "",
    "comment only": "# mine\n",
    "no newline at the end": "relay:\ncollections: [] # none yet",
    "flow": f"relay: {{}}\ncollections: [{{id: {FIRST}, name: a, root: /b}}]\n",
    "indented list": f"collections:\n  # first\n  - id: {FIRST}\n    name: a\n    root: /b # here\n"
    "\n# data\ndata:\n  port: 5\n",
    "list at the margin": f"collections:\n- root: /b\n  name: a\n  id: {FIRST}\n# behind\nlimits:\n  lanes: 3\n",
    "block scalar last": f"collections:\n- id: {FIRST}\n  root: /b\n  name: >-\n    long\n    name\ndata:\n  port: 5\n",
    "url present": "relay:\n  url: https://old.example # old\n  ca_file: /x\ncollections:\n",
    "empty url": "relay:\n  url:\n  ca_file: /x\n",
}


def lines_of_comments(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.lstrip().startswith("#")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_edit_changes_what_it_should_and_keeps_the_rest(layout: str) -> None:
    before = LAYOUTS[layout]
    old = checked(before, FILE)
    text = set_value(before, "relay", "url", URL, FILE)
    text = set_value(text, None, "state_dir", "/state dir", FILE)
    text = append_collection(text, {"id": SECOND, "name": "yes", "root": "/c", "sharing": True}, FILE)
    new = checked(text, FILE)
    assert new.relay.url == URL
    assert new.relay.ca_file == old.relay.ca_file
    assert new.state_dir == Path("/state dir")
    assert new.collections[:-1] == old.collections
    assert (new.collections[-1].id, new.collections[-1].name, new.collections[-1].shareable) == (SECOND, "yes", True)
    assert (new.data, new.limits) == (old.data, old.limits)
    assert lines_of_comments(text) == lines_of_comments(before)


def test_comments_stay_with_the_section_they_belong_to() -> None:
    text = append_collection(LAYOUTS["indented list"], {"id": SECOND, "name": "b", "root": "/c"}, FILE)
    assert text.index(SECOND) < text.index("# data") < text.index("data:")
    assert "root: /b # here" in text


@given(st.text(min_size=1, max_size=40))
def test_any_text_survives_as_a_value(value: str) -> None:
    shown = "".join(c if c.isprintable() else "_" for c in value)
    text = append_collection(template(), {"id": SECOND, "name": shown, "root": "/" + shown}, FILE)
    (collection,) = checked(text, FILE).collections
    assert (collection.name, collection.root) == (shown, "/" + shown)


def test_a_layout_without_a_safe_place_is_refused() -> None:
    with pytest.raises(CannotEdit):
        set_value("{relay: {}}\n", None, "state_dir", "/x", FILE)
    with pytest.raises(CannotEdit):
        append_collection("collections: {}\n", {"id": SECOND}, FILE)
    with pytest.raises(CannotEdit, match="nothing was written"):
        checked("relay: [\n", FILE)
