"""The pure parts of what is told of tasks: counts, counters, times, filters."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from protocol.control import Counters, TaskObserved
from relay import times
from relay.transfer import task_documents
from relay.transfer.task_filters import glob_to_like
from relay.transfer.task_reports import merged
from relay.transfer.task_rows import Task

counts = st.integers(0, 1000)
all_counters = st.builds(
    Counters,
    **{name: counts for name in Counters.__struct_fields__ if name != "scan_complete"},
    scan_complete=st.booleans(),
)


def task_with(counters: Counters, status: str, code: str) -> Task:
    observed = TaskObserved(task_id="t", revision=1, state="ACTIVE", counters=counters)
    return Task(
        **{  # type: ignore[arg-type]
            **dict.fromkeys(Task.__dataclass_fields__),
            "status": status,
            "observed": msgspec.json.encode(observed).decode(),
            "fatal_error": f'{{"code": "{code}"}}' if status == "FAILED" else None,
        }
    )


@given(
    all_counters,
    st.sampled_from(["ACTIVE", "SUCCEEDED", "FAILED"]),
    st.sampled_from(["CANCELED", "DEADLINE_EXPIRED", "QUOTA_EXCEEDED"]),
)
def test_the_parts_of_subtasks_add_up_to_their_total(counters: Counters, status: str, code: str) -> None:
    parts = task_documents.subtasks(task_with(counters, status, code))
    total = parts.pop("subtasks_total")
    assert sum(parts.values()) == total
    assert min(parts.values()) >= 0
    assert total >= counters.files + counters.directories + counters.symlinks
    if status != "ACTIVE":
        assert parts["subtasks_pending"] == parts["subtasks_retrying"] == 0


@given(all_counters, all_counters)
def test_merged_counters_never_go_back(old: Counters, new: Counters) -> None:
    both = merged(old, new)
    for name in Counters.__struct_fields__:
        if name not in ("retrying", "scan_complete"):
            assert getattr(both, name) == max(getattr(old, name), getattr(new, name))


def test_a_time_that_an_older_relay_stored_can_be_shown() -> None:
    assert times.iso(253_402_300_799.9999995) == times.iso(1e15) == "9999-12-31T23:59:59.000000+00:00"
    assert times.api_time(253_402_300_799.9999995) == times.api_time(1e15) == "9999-12-31T23:59:59+00:00"
    assert times.api_time(-1e15) == "0001-01-01T00:00:00+00:00"
    assert times.api_time(-0.5) == "1969-12-31T23:59:59+00:00"
    assert times.api_time(1.999999) == "1970-01-01T00:00:01+00:00"
    assert times.iso(-1e15) == "0001-01-01T00:00:00.000000+00:00"


def test_globs_become_like_patterns_with_nothing_else_special() -> None:
    assert glob_to_like("a*b?c%d_e\\f") == "a%b_c\\%d\\_e\\\\f"
