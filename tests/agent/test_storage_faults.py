"""System errors as the project's errors, and storage that fails on purpose."""

from __future__ import annotations

import errno
import os

import pytest

from agent.storage.base import Directory, IllegalName, NotRegularFile, Root
from agent.storage.faults import fault
from agent.storage.faulty import Call, FaultyRoot, fail_nth
from agent.storage.memory import MemoryRoot
from agent.storage.reach import LeavesCollection
from protocol.errors import ItemFailed, NeedsPerson, RetryLater, TowpathError

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory storage needs memfd_create")


@pytest.mark.parametrize(
    ("code", "kind", "word", "who"),
    [
        (errno.ENOENT, ItemFailed, "FILE_NOT_FOUND", "destination owner"),
        (errno.EACCES, ItemFailed, "PERMISSION_DENIED", "destination owner"),
        (errno.EPERM, ItemFailed, "PERMISSION_DENIED", "destination owner"),
        (errno.EROFS, ItemFailed, "READ_ONLY", "destination owner"),
        (errno.ENOSPC, NeedsPerson, "NO_SPACE", "destination owner"),
        (errno.EDQUOT, NeedsPerson, "QUOTA_EXCEEDED", "destination owner"),
        (errno.EIO, RetryLater, "IO_ERROR", "destination owner"),
        (errno.ESTALE, RetryLater, "STALE_HANDLE", ""),
        (errno.EMFILE, RetryLater, "BUSY", ""),
        (errno.ENAMETOOLONG, ItemFailed, "ILLEGAL_NAME", ""),
        (errno.EINVAL, ItemFailed, "ILLEGAL_NAME", ""),
        (errno.EILSEQ, ItemFailed, "ILLEGAL_NAME", ""),
        (errno.ENOTDIR, ItemFailed, "NOT_A_DIRECTORY", ""),
        (errno.EISDIR, ItemFailed, "IS_A_DIRECTORY", ""),
        (errno.ELOOP, ItemFailed, "SYMLINK_LOOP", ""),
        (errno.EEXIST, ItemFailed, "EXISTS", ""),
        (errno.ENOTEMPTY, ItemFailed, "NOT_EMPTY", ""),
        (errno.EFBIG, ItemFailed, "TOO_LARGE", ""),
        (errno.ETIMEDOUT, RetryLater, "TIMEOUT", ""),
    ],
)
def test_errors_by_number(code: int, kind: type[TowpathError], word: str, who: str) -> None:
    found = fault(OSError(code, os.strerror(code)), "destination", (b"a", b"b\xff"))
    assert (type(found), found.code, found.who) == (kind, word, who)
    assert found.subject == "/a/b␛FF"
    assert "/a/b␛FF" in found.sentence
    assert "destination" in found.sentence
    assert found.sentence.endswith(".")


def test_every_number_has_a_readable_answer() -> None:
    for code in [*errno.errorcode, 0, 99999]:
        for side in ("source", "destination", ""):
            found = fault(OSError(code, "x"), side, (b"f",))  # type: ignore[arg-type]
            assert found.code
            assert found.sentence.endswith(".")
            assert "/f" in found.sentence
    assert fault(OSError("no number"), "source", (b"f",)).code == "UNKNOWN"


def test_sides_and_operations() -> None:
    missing = FileNotFoundError(errno.ENOENT, "x")
    assert fault(missing, "", (b"f",)).code == "NOT_FOUND"
    assert fault(missing, "source", (b"f",)).code == "FILE_NOT_FOUND"
    denied = PermissionError(errno.EACCES, "x")
    assert fault(denied, "source", b"f\n").who == "source owner"
    assert fault(denied, "source", b"a/f\n").subject == "/a/f␛0A"
    assert fault(denied, "", "/already/␛0A").subject == "/already/␛0A"
    assert "The collection" in fault(denied, "", b"").sentence


def test_a_full_disk_may_be_one_with_room_and_no_names_left() -> None:
    sentence = fault(OSError(errno.ENOSPC, "x"), "destination", (b"f",)).sentence
    assert "Free some space" in sentence
    assert "df -i" in sentence


def test_our_own_errors() -> None:
    assert fault(LeavesCollection(), "source", (b"l",)).code == "PERMISSION_DENIED"
    assert fault(NotRegularFile(), "source", (b"l",)).code == "NOT_A_FILE"
    assert fault(IllegalName(), "source", (b"l",)).code == "ILLEGAL_NAME"


def test_a_monstrous_name_does_not_flood_the_sentence() -> None:
    assert len(fault(OSError(errno.EACCES, "x"), "source", b"\xff" * 100_000).sentence) < 1500


# --- the fault-injecting wrapper -----------------------------------------------------------------------------


def publish(root: Root) -> None:
    """A small transfer in the order the engine uses."""
    with root.make_directories((b"d",)) as directory:
        fd = directory.create_temporary(b".towpath.t")
        try:
            data = memoryview(b"content")
            offset = 0
            while offset < len(data):
                offset += root.pwrite(fd, data[offset:], offset)
            root.futimes(fd, 1)
            root.fsync(fd)
        finally:
            root.close_file(fd)
        directory.rename(b".towpath.t", b"f")
        directory.sync()


def visible(root: Root, directory: Directory) -> bytes | None:
    try:
        fd = directory.open_read(b"f")
    except FileNotFoundError:
        return None
    buffer = bytearray(100)
    size = root.preadv(fd, [buffer], 0)
    root.close_file(fd)
    return bytes(buffer[:size])


def test_every_call_can_fail_once() -> None:
    calm = FaultyRoot(MemoryRoot())
    publish(calm)
    assert [call.operation for call in calm.script.calls] == [
        "make_directories",
        "create_temporary",
        "pwrite",
        "futimes",
        "fsync",
        "close_file",
        "rename",
        "sync",
    ]
    for number in range(1, len(calm.script.calls) + 1):
        for code in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES):
            inner = MemoryRoot()
            with pytest.raises(OSError) as caught:
                publish(FaultyRoot(inner, fail_nth(number, code)))
            assert caught.value.errno == code
            if number > 1:
                with inner.open_directory((b"d",)) as directory:
                    assert visible(inner, directory) in (None, b"content")


def test_failing_one_operation_for_ever_or_a_while() -> None:
    plan = fail_nth(2, errno.EIO, "fsync", times=0)
    outcomes = [plan(Call(number, "fsync", number, b"")) for number in range(1, 6)]
    assert outcomes == [None, errno.EIO, errno.EIO, errno.EIO, errno.EIO]
    plan = fail_nth(2, errno.EIO, times=2)
    assert [plan(Call(number, "x", 1, b"")) for number in range(1, 6)] == [None, errno.EIO, errno.EIO, None, None]


def test_short_writes_and_reads() -> None:
    root = FaultyRoot(MemoryRoot(), short=3)
    publish(root)
    assert sum(call.operation == "pwrite" for call in root.script.calls) == 3
    with root.open_directory((b"d",)) as directory:
        assert visible(root, directory) == b"con"


def test_names_are_passed_to_the_plan() -> None:
    def plan(call: Call) -> int | None:
        return errno.ENOSPC if call.name == b"f" else None

    root = FaultyRoot(MemoryRoot(), plan)
    with pytest.raises(OSError) as caught:
        publish(root)
    assert caught.value.errno == errno.ENOSPC
    assert root.script.calls[-1].operation == "rename"


def test_memory_root_that_is_not_mounted() -> None:
    root = MemoryRoot(capacity=10)
    publish(root)
    assert root.free_bytes() == 3
    root.present = False
    with pytest.raises(NeedsPerson):
        FaultyRoot(root).check_present()
