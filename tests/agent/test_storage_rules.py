"""Globs, and the include and exclude rules of transfers."""

from __future__ import annotations

import fnmatch
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.storage.rules import has_wildcards, included, matches, shell_matches
from protocol.control import FilterRule


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        (b"*", b"", True),
        (b"*.txt", b"a.txt", True),
        (b"*.txt", b"a.txt\n", False),
        (b"*", b"a\nb", True),
        (b"?", "é".encode(), True),
        (b"??", "é".encode(), False),
        (b"?", b"\xff", True),
        (b"[a-c]x", b"bx", True),
        (b"[!a-c]x", b"bx", False),
        (b"[", b"[", True),
        (b"[]]", b"]", True),
        (b"[*]", b"*", True),
        (b"[*]", b"x", False),
        (b"A", b"a", False),
        (b"a.c", b"abc", False),
        (b"\xff*", b"\xff\xfe", True),
        (b"a\\*", b"a\\b", True),
    ],
)
def test_globs(pattern: bytes, name: bytes, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_case() -> None:
    assert matches(b"*.TXT", b"a.txt", ignore_case=True)
    assert matches("É*".encode(), "été".encode(), ignore_case=True)
    assert not matches(b"*.TXT", b"a.txt")


def test_shell_globs_spare_hidden_names() -> None:
    assert not shell_matches(b"*", b".ssh")
    assert not shell_matches(b"?ssh", b".ssh")
    assert not shell_matches(b"[.]ssh", b".ssh")
    assert shell_matches(b".*", b".ssh")
    assert shell_matches(b"*", b"x.ssh")


def test_what_is_a_pattern() -> None:
    assert has_wildcards(b"*")
    assert has_wildcards(b"a?")
    assert has_wildcards(b"a[b")
    assert not has_wildcards(b"a]b!")


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="ab*?[]!-", max_size=8), st.text(alphabet="ab[]!-", max_size=6))
def test_ascii_globs_agree_with_the_standard_library(pattern: str, name: str) -> None:
    assert matches(pattern.encode(), name.encode()) == fnmatch.fnmatchcase(name, pattern)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=12), st.binary(max_size=12))
def test_any_bytes_are_patterns(pattern: bytes, name: bytes) -> None:
    matches(pattern, name)
    if not has_wildcards(pattern):
        assert matches(pattern, name) == (pattern == name)


def rule(method: str, name: str, kind: str | None = None) -> FilterRule:
    return FilterRule(method=method, name=name, type=kind)  # type: ignore[arg-type]


def test_first_match_decides() -> None:
    rules = [rule("include", "keep*"), rule("exclude", "*.tmp", "file"), rule("exclude", "cache", "dir")]
    assert included(rules, b"keep.tmp", False)
    assert not included(rules, b"a.tmp", False)
    assert included(rules, b"a.tmp", True)
    assert not included(rules, b"cache", True)
    assert included(rules, b"cache", False)
    assert included(rules, b"anything", False)
    assert included([], b"anything", True)


def test_including_only_some() -> None:
    rules = [rule("include", "*.fits", "file"), rule("exclude", "*", "file")]
    assert included(rules, b"a.fits", False)
    assert not included(rules, b"a.txt", False)
    assert included(rules, b"folder", True)


def test_rules_name_odd_names_by_their_escape() -> None:
    assert not included([rule("exclude", "␛FF*")], b"\xffx", False)
    assert included([rule("exclude", "␛FF*")], "␛".encode(), False)


def test_a_malicious_pattern_takes_no_time() -> None:
    started = time.monotonic()
    assert not matches(b"*a" * 500 + b"*b", b"a" * 255)
    assert time.monotonic() - started < 1
