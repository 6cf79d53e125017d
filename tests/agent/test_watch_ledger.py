"""What watch rules have handed over, kept on disk over crashes: once and only once, under a place of its own."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from agent.watch import ledger as ledger_module
from agent.watch.ledger import KEEP_DONE, Item, Ledger
from protocol.errors import RetryLater
from tests.agent.watch_scene import NOW, seen


def test_the_ledger_remembers_over_a_crash(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    ledger.hand_over("r", [Item((b"a",), seen(b"a").version, "/a")], NOW)
    (before,) = ledger.open_batches("r")
    # No close: the process was killed.
    again = Ledger(tmp_path / "l")
    assert again.open_batches("r") == [before]
    assert again.fresh("r", [seen(b"a")]) == []
    assert again.fresh("r", [seen(b"a", size=2)]) == [seen(b"a", size=2)]
    assert again.fresh("other", [seen(b"a")]) == [seen(b"a")]
    again.close()
    ledger.close()


def test_too_many_files_of_one_name_are_refused_and_none_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_NAMESAKES", 3)
    ledger = Ledger(tmp_path / "ledger")
    files = [seen(b"%d/scan" % number) for number in range(4)]
    ledger.hand_over("r", [Item(file.path, file.version, "/scan") for file in files[:3]], NOW)
    with pytest.raises(RetryLater, match="More than 3 files would have the name /scan"):
        ledger.hand_over("r", [Item(files[3].path, files[3].version, "/scan")], NOW)
    assert ledger.fresh("r", files) == files[3:]
    ledger.close()


def test_rules_write_to_the_ledger_at_the_same_time(tmp_path: Path) -> None:
    ledger, errors = Ledger(tmp_path / "l"), []

    def write(rule: str) -> None:
        try:
            for number in range(30):
                ledger.hand_over(rule, [Item((b"%d" % n,), (1, 2, 3, 4, number), "/x") for n in range(200)], NOW)
        except sqlite3.Error as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(rule,)) for rule in ("one", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [len(ledger.open_batches(rule)) for rule in ("one", "other")] == [30, 30]
    ledger.close()


def test_a_batch_is_one_submission_until_its_task_has_failed(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path / "l")) as ledger:
        ledger.hand_over("r", [Item((b"a",), seen(b"a").version, "/a")], NOW)
        (new,) = ledger.open_batches("r")
        assert (new.state, new.task, new.attempts, new.next_try, new.reason) == ("new", "", 0, 0.0, "")
        assert [(item.seen, item.destination) for item in new.items] == [(seen(b"a"), "/a")]
        ledger.put_off(new, "The relay is away.", NOW + 5, NOW + 1)
        (waiting,) = ledger.open_batches("r")
        assert (waiting.submission, waiting.next_try, waiting.reason) == (new.submission, NOW + 5, "The relay is away.")
        ledger.submitted(new, "task", NOW + 2)
        (submitted,) = ledger.open_batches("r")
        assert (submitted.state, submitted.task, submitted.submission) == ("submitted", "task", new.submission)
        assert submitted.reason == ledger.last_reason("r") == ""
        ledger.again(submitted, "It failed.", NOW + 60, NOW + 3)
        (second,) = ledger.open_batches("r")
        assert (second.state, second.task, second.attempts, second.next_try) == ("new", "", 1, NOW + 60)
        assert second.submission != new.submission
        ledger.finished(second, "failed", "It failed again.", NOW + 4)
        assert ledger.open_batches("r") == []
        assert (ledger.counts("r"), ledger.last_reason("r")) == ({"failed": 1}, "It failed again.")
        assert ledger.retry_failed("other", NOW) == 0
        assert ledger.retry_failed("r", NOW + 5) == 1
        (third,) = ledger.open_batches("r")
        assert (third.state, third.task, third.attempts, third.next_try) == ("new", "", 0, 0.0)
        assert third.submission not in (new.submission, second.submission)


def test_files_go_in_batches_in_their_order_and_rules_have_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_BATCH", 2)
    with closing(Ledger(tmp_path / "l")) as ledger:
        files = [Item((b"d", b"%d" % number), seen(b"x").version, f"/{number}") for number in range(5)]
        ledger.hand_over("r", files, NOW)
        ledger.hand_over("s", files[:1], NOW, collection="elsewhere")
        batches = ledger.open_batches("r")
        assert [[item.destination for item in batch.items] for batch in batches] == [["/0", "/1"], ["/2", "/3"], ["/4"]]
        assert len({batch.submission for batch in batches}) == 3
        ledger.finished(batches[0], "done", "", NOW)
        assert (ledger.counts("r"), ledger.counts("s")) == ({"new": 2, "done": 1}, {"new": 1})


def test_finished_batches_are_forgotten_after_a_season_and_failed_ones_are_not(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path / "l")) as ledger:
        for number in range(4):
            ledger.hand_over("r", [Item((b"%d" % number,), seen(b"x").version, f"/{number}")], NOW)
        first, second, third, fourth = ledger.open_batches("r")
        ledger.finished(first, "done", "", NOW)
        ledger.finished(second, "failed", "No.", NOW)
        ledger.finished(third, "done", "", NOW + KEEP_DONE)
        assert ledger.counts("r") == {"done": 2, "failed": 1, "new": 1}
        ledger.finished(fourth, "done", "", NOW + KEEP_DONE + 1)
        assert ledger.counts("r") == {"done": 2, "failed": 1}
        # Their files stay known.
        assert ledger.fresh("r", [seen(b"0"), seen(b"0", size=2)]) == [seen(b"0", size=2)]


def test_a_timed_rule_that_is_new_has_run_now(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path / "l")) as ledger:
        assert ledger.last_run("r", NOW) == NOW
        assert ledger.last_run("r", NOW + 9) == NOW
        ledger.ran("r", NOW + 10)
        assert ledger.last_run("r", NOW + 20) == NOW + 10
        assert ledger.last_run("s", NOW + 20) == NOW + 20
