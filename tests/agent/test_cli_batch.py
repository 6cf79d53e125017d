"""Lines of batch files: what is a comment and what belongs to a name."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cli.batch import BatchError, parse_delete_batch, parse_transfer_batch


@pytest.mark.parametrize(
    ("line", "paths"),
    [
        ("/data/run#1", ["/data/run#1"]),
        ("/data/#1", ["/data/#1"]),
        ("/data/a#b#c  # and a comment that doesn't end", ["/data/a#b#c"]),
        ("# nothing", []),
        ("   # nothing", []),
        ("'#a'", ["#a"]),
        ('"a #b"', ["a #b"]),
        (r"a\ #b", ["a #b"]),
        (r"\#a", ["#a"]),
        (r"'a\' #b", ["a\\"]),
    ],
)
def test_a_sign_within_a_word_is_no_comment(line: str, paths: list[str]) -> None:
    """A delete of /data/run#1 would have been one of /data/run."""
    assert list(parse_delete_batch([line], None)) == paths


def test_both_paths_of_a_transfer_keep_it() -> None:
    (item,) = parse_transfer_batch(["/a#1.txt /b#1.txt # once"], None, None)
    assert (item.source, item.destination) == ("/a#1.txt", "/b#1.txt")


@pytest.mark.parametrize("line", ["''", '""', "'' # comment"])
def test_an_empty_path_names_nothing(line: str) -> None:
    """A variable that was not set would have deleted all of the folder that the others lie in."""
    with pytest.raises(BatchError, match=r"Line 2 .* empty path"):
        list(parse_delete_batch(["a", line], "/data"))
    with pytest.raises(BatchError, match="empty path"):
        list(parse_transfer_batch([f"a {line}"], "/data", "/data"))


@given(st.text(st.sampled_from("ab #'\"\\/-"), min_size=1, max_size=12).filter(lambda text: not text.startswith("-")))
def test_every_quoted_name_comes_back(name: str) -> None:
    assert list(parse_delete_batch([f"{shlex.quote(name)} # comment"], None)) == [name]
