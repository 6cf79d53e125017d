"""What a watch rule says: when a file has settled, which ones go, where to, and when a rule looks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config.keys import ConfigError, parse_config
from agent.watch.rule import Settling, destination, feeds_itself, is_due, is_wanted, next_time
from tests.agent.watch_scene import HERE, NOW, THERE, seen


def test_a_file_settles_when_it_has_not_changed_for_a_while() -> None:
    settling = Settling(60)
    assert settling.observe([seen(b"a")], NOW) == []
    assert settling.next_deadline(NOW) == NOW + 60
    assert settling.observe([seen(b"a", size=2, changed=NOW + 50)], NOW + 59) == []
    assert settling.observe([seen(b"a", size=2, changed=NOW + 50)], NOW + 109) == []
    assert settling.observe([seen(b"a", size=2, changed=NOW + 50)], NOW + 110) != []
    assert settling.next_deadline(NOW + 110) is None


def test_after_a_restart_old_files_do_not_wait_anew_and_a_wrong_clock_fools_nobody() -> None:
    assert Settling(60).observe([seen(b"old", changed=NOW - 61)], NOW) == [seen(b"old", changed=NOW - 61)]
    settling = Settling(60)
    future = seen(b"future", changed=NOW + 9999)
    assert settling.observe([future], NOW) == []
    assert settling.observe([future], NOW + 60) == [future]


def test_a_copy_that_keeps_an_old_time_waits_from_when_it_came() -> None:
    """Who copies with times (cp -p, rsync -t) sets the modification time back before the last byte has come."""
    copied = seen(b"copied", changed=NOW - 5, modified=NOW - 9999)
    settling = Settling(60)
    assert settling.observe([copied], NOW) == []
    assert settling.observe([copied], NOW + 55) == [copied]


def test_several_settle_oldest_change_first_and_the_next_deadline_is_the_earliest() -> None:
    settling = Settling(60)
    files = [seen(b"late", changed=NOW - 10), seen(b"b", changed=NOW - 70), seen(b"a", changed=NOW - 70)]
    files += [seen(b"oldest", changed=NOW - 90), seen(b"later", changed=NOW - 5)]
    assert [file.path for file in settling.observe(files, NOW)] == [(b"oldest",), (b"a",), (b"b",)]
    assert settling.next_deadline(NOW) == NOW + 50


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.1, 100)), max_size=20))
def test_nothing_settles_that_changed_within_the_time(steps: list[tuple[int, float]]) -> None:
    settling, now, last, size = Settling(30), NOW, NOW, -1
    for number, pause in steps:
        now += pause
        if number != size:
            size, last = number, now
        settled = settling.observe([seen(b"f", size=size, changed=last)], now)
        assert bool(settled) == (now - last >= 30)


@pytest.mark.parametrize(
    ("path", "include", "exclude", "wanted"),
    [
        (b"a.tif", (), (), True),
        (b"a.tif", ("*.tif",), (), True),
        (b"a.txt", ("*.tif",), (), False),
        (b"a.jpg", ("*.tif", "*.jpg"), (), True),
        (b"a.tmp", (), ("*.part", "*.tmp"), False),
        (b"a.part", (), ("*.part",), False),
        (b".cache/a.tif", ("*.tif",), (".*",), False),
        (b"x/a.tif", ("*.tif",), (".*",), True),
    ],
)
def test_filters(path: bytes, include: Sequence[str], exclude: Sequence[str], wanted: bool) -> None:
    assert is_wanted(tuple(path.split(b"/")), include, exclude) is wanted


def test_templates() -> None:
    file = seen(b"day/scan.ome.tif", changed=datetime.fromisoformat("2026-03-04T05:06:07+00:00").timestamp())
    assert destination("/a/{year}/{month}/{name}", file, "r", "h") == "/a/2026/03/scan.ome.tif"
    assert destination("/{rule}/{host}/{folder}/{stem}-{day}{hour}{minute}.{suffix}", file, "r", "h") == (
        "/r/h/day/scan.ome-040506.tif"
    )
    # It is the time of its content that counts, not when it was copied here.
    moved = seen(b"x", changed=NOW, modified=datetime.fromisoformat("2025-12-31T23:59:00+00:00").timestamp())
    assert destination("/{year}/{name}", moved, "r", "h") == "/2025/x"
    assert destination("/{folder}/{name}", seen(b"x"), "r", "h") == "/x"
    assert destination("/{name}", seen(b"\xff{path}"), "r", "h") == "/␛FF{path}"
    assert destination("/{stem}|{suffix}", seen(b".hidden"), "r", "h") == "/.hidden|"


def test_time_tables() -> None:
    at_two = datetime(2026, 5, 5, 2, 0).astimezone().timestamp()
    assert next_time("0 2 * * *", at_two - 1) == at_two
    assert not is_due("0 2 * * *", at_two, at_two + 3600)
    assert is_due("0 2 * * *", at_two - 3600, at_two)
    # Several times were missed while the machine was off: it runs once.
    assert is_due("*/5 * * * *", at_two, at_two + 86400)


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A place where clocks are changed: forward on 29 March 2026 at 2, back on 25 October at 3."""
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("berlin")
@pytest.mark.parametrize(
    ("schedule", "after", "moments"),
    [
        ("0 6 * * *", "2026-03-28T06:00", ["2026-03-29T06:00:00+02:00", "2026-03-30T06:00:00+02:00"]),
        ("0 6 * * *", "2026-10-24T06:00", ["2026-10-25T06:00:00+01:00", "2026-10-26T06:00:00+01:00"]),
        # There is no half past two on that day: as soon as it would be over, and once.
        ("30 2 * * *", "2026-03-28T12:00", ["2026-03-29T03:00:00+02:00", "2026-03-30T02:30:00+02:00"]),
        ("10,50 2 * * *", "2026-03-28T12:00", ["2026-03-29T03:00:00+02:00", "2026-03-30T02:10:00+02:00"]),
        ("30 2 29 3 *", "2026-03-28T12:00", ["2026-03-29T03:00:00+02:00", "2027-03-29T02:30:00+02:00"]),
        # On that one there are two.
        ("30 2 * * *", "2026-10-24T12:00", ["2026-10-25T02:30:00+02:00", "2026-10-26T02:30:00+01:00"]),
        ("30 2 * * *", "2026-10-25T02:10+01:00", ["2026-10-26T02:30:00+01:00", "2026-10-27T02:30:00+01:00"]),
        ("0,30 2 * * *", "2026-10-25T02:10+02:00", ["2026-10-25T02:30:00+02:00", "2026-10-26T02:00:00+01:00"]),
        ("0 3 * * *", "2026-10-25T02:40+02:00", ["2026-10-25T03:00:00+01:00", "2026-10-26T03:00:00+01:00"]),
        ("*/30 * * * *", "2026-10-25T02:20+02:00", ["2026-10-25T02:30:00+02:00", "2026-10-25T02:00:00+01:00"]),
        ("*/30 * * * *", "2026-03-29T01:20", ["2026-03-29T01:30:00+01:00", "2026-03-29T03:00:00+02:00"]),
        ("0 * * * *", "2026-03-29T00:30", ["2026-03-29T01:00:00+01:00", "2026-03-29T03:00:00+02:00"]),
        ("0 * * * *", "2026-10-25T01:30", ["2026-10-25T02:00:00+02:00", "2026-10-25T02:00:00+01:00"]),
        ("0 12 * * mon", "2026-03-27T12:00", ["2026-03-30T12:00:00+02:00", "2026-04-06T12:00:00+02:00"]),
    ],
)
def test_time_tables_on_days_on_which_clocks_are_changed(schedule: str, after: str, moments: list[str]) -> None:
    """A rule for six o'clock ran at seven, and in autumn at five and again at six."""
    moment, found = datetime.fromisoformat(after).timestamp(), []
    for _ in moments:
        moment = next_time(schedule, moment)
        found.append(datetime.fromtimestamp(moment).astimezone().isoformat())
    assert found == moments


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("template: /{nothing}", "field that cannot be filled"),
        ("template: '/{name'", "cannot be filled"),
        ("template: '/{name.__class__}'", "cannot be filled|must"),
        ("template: /constant", "same name"),
        ("template: /only/{year}{name:%}", "cannot be filled"),
        ("template: /{year}/{folder}", "same name"),
        ("template: 'a/{name}'", "begins with /"),
        ("template: '/../{name}'", "no .."),
        ("schedule: sometimes", "cron expression"),
        ("settle: -1", "between"),
        ("after: burn", "keep or delete or move"),
    ],
)
def test_mistakes_in_rules_are_named(change: str, words: str) -> None:
    text = f"watch:\n- name: r\n  collection: {HERE}\n  destination: {THERE}\n  {change}\n"
    with pytest.raises(ConfigError, match=words) as caught:
        parse_config(text.encode(), Path("f"))
    assert caught.value.problems[0].line == 5


def test_what_a_rule_says_is_kept_as_it_stands() -> None:
    wanted = "template: /in/{year}/{stem}.{suffix}\n  schedule: '30 2 * * mon'"
    text = f"watch:\n- name: r\n  collection: {HERE}\n  destination: {THERE}\n  {wanted}\n"
    (rule,) = parse_config(text.encode(), Path("f")).watch
    assert (rule.template, rule.schedule) == ("/in/{year}/{stem}.{suffix}", "30 2 * * mon")


@pytest.mark.parametrize(
    ("template", "folder", "recursive", "endless"),
    [
        ("/out/{path}", b"in", True, False),
        ("/in/{path}", b"in", True, True),
        ("/in/x-{name}", b"in", False, True),
        ("/in/{year}/{name}", b"in", True, True),
        ("/in/{year}/{name}", b"in", False, False),
        ("/in/done/{path}", b"in", True, False),
        ("/{path}", b"", True, True),
        ("/{year}/{name}", b"in", True, False),
    ],
)
def test_a_rule_that_would_feed_itself_is_known(template: str, folder: bytes, recursive: bool, endless: bool) -> None:
    assert feeds_itself(template, (folder,) if folder else (), recursive=recursive) is endless
