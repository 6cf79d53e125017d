"""What the settler syncs one by one is synced side by side."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import ThreadPoolExecutor

from agent.transfer.settling.batch import FSYNCS_AT_ONCE, sync_each


def test_no_sync_waits_for_the_one_before() -> None:
    # None of them ends before all have begun.
    begun = threading.Barrier(FSYNCS_AT_ONCE, timeout=5)

    def sync() -> None:
        begun.wait()

    with ThreadPoolExecutor(FSYNCS_AT_ONCE) as beside:
        assert sync_each([sync] * FSYNCS_AT_ONCE, beside) == [None] * FSYNCS_AT_ONCE


def test_each_fault_is_told_in_its_place_and_the_others_are_synced() -> None:
    synced = []

    def sync(number: int) -> None:
        if number in (1, 4):
            raise OSError(errno.EIO, str(number))
        synced.append(number)

    with ThreadPoolExecutor(FSYNCS_AT_ONCE) as beside:
        errors = sync_each([lambda number=number: sync(number) for number in range(6)], beside)
    assert [number for number, error in enumerate(errors) if error is not None] == [1, 4]
    assert sorted(synced) == [0, 2, 3, 5]


def test_one_alone_needs_no_thread() -> None:
    threads = []
    with ThreadPoolExecutor(1) as beside:
        assert sync_each([lambda: threads.append(threading.current_thread())], beside) == [None]
    assert threads == [threading.current_thread()]
