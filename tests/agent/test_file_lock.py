"""Locks on files: real ones here, and Windows' as far as its module can be stood in for."""

from __future__ import annotations

import errno
import importlib.util
import os
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.system import file_lock


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Any]:
    descriptors = []

    def open_once_more() -> int:
        descriptors.append(os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT, 0o600))
        return descriptors[-1]

    yield open_once_more
    for descriptor in descriptors:
        os.close(descriptor)


def test_one_holds_it_and_many_may_look(opened: Any) -> None:
    first, second, third = opened(), opened(), opened()
    assert file_lock.try_lock(first) is True
    assert file_lock.try_lock(second) is False
    assert file_lock.try_lock(second, shared=True) is False
    # The holder gives exclusiveness up.
    assert file_lock.try_lock(first, shared=True) is True
    assert file_lock.try_lock(second, shared=True) is True
    assert file_lock.try_lock(third) is False


def test_waiting_ends_when_the_holder_closes_its_file(tmp_path: Path, opened: Any) -> None:
    holder = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    assert file_lock.try_lock(holder) is True
    waiter = opened()
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(file_lock.wait_for_lock(waiter)))
    thread.start()
    assert results == []
    os.close(holder)
    thread.join(10)
    assert results == [True]


@pytest.mark.parametrize(("number", "answer"), [(errno.ENOLCK, None), (errno.ENOSYS, None), (errno.EAGAIN, False)])
def test_file_systems_without_locks_say_so(
    opened: Any, monkeypatch: pytest.MonkeyPatch, number: int, answer: bool | None
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    assert file_lock.try_lock(opened()) is answer


def test_a_refusal_of_the_system_is_no_lock_of_somebody_else(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "security module")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(PermissionError):
        file_lock.wait_for_lock(opened())


class Msvcrt(types.ModuleType):
    """Windows' `msvcrt` for one machine: locks bytes, not files, and refuses with EACCES."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self.held: dict[tuple[int, int], int] = {}

    def locking(self, descriptor: int, mode: int, count: int) -> None:
        assert (mode, count) == (self.LK_NBLCK, 1)
        byte = os.lseek(descriptor, 0, os.SEEK_CUR)
        key = (os.fstat(descriptor).st_ino, byte)
        if self.held.setdefault(key, descriptor) != descriptor:
            raise PermissionError(errno.EACCES, "Permission denied")


def test_the_lock_of_windows_covers_no_content(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    msvcrt = Msvcrt()
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(sys, "platform", "win32")
    assert file_lock.__file__ is not None
    spec = importlib.util.spec_from_file_location("file_lock_of_windows", file_lock.__file__)
    assert spec is not None
    assert spec.loader is not None
    windows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(windows)
    first, second = opened(), opened()
    assert windows.try_lock(first) is True
    assert windows.try_lock(second) is False
    ((_, byte),) = msvcrt.held
    assert byte >= 1 << 30
