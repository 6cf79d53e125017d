"""What became of a task's files, page by page, as the relay asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.transfer.books.manifest import SKIPPED_LIST, TRANSFERRED_LIST, ManifestWriter, SkippedRow, TransferredRow
from agent.transfer.tasks.results import MAX_PAGE, ReadPage, skipped_page, successful_page
from protocol.errors import ItemFailed
from protocol.names import escape
from protocol.session import DIRECTORY, FILE, SYMLINK

WHEN = "2026-01-01T00:00:00Z"


def write(file: Path, rows: list[TransferredRow] | list[SkippedRow]) -> None:
    manifest = ManifestWriter(file, 0)
    manifest.append(rows)
    manifest.sync()
    manifest.close()


def test_successful_files_are_told_with_what_they_were_checked_by(tmp_path: Path) -> None:
    write(tmp_path / TRANSFERRED_LIST, [TransferredRow(b"a/\xffb", b"to", 7, "0f", "MD5"), TransferredRow(b"", b"", 0)])
    page = successful_page(tmp_path, None, 10, complete=True)
    assert page.next_marker is None
    assert page.rows[0] == {
        "source_path": "/a/" + escape(b"\xffb"),
        "destination_path": "/to",
        "size": 7,
        "checksum": "0f",
        "checksum_algorithm": "MD5",
        "dynamic": False,
    }
    assert (page.rows[1]["source_path"], page.rows[1]["checksum"]) == ("/", None)


def test_what_was_left_out_is_told_with_its_kind_and_why(tmp_path: Path) -> None:
    kinds = (FILE, DIRECTORY, SYMLINK, -1)
    rows = [SkippedRow(b"a", b"b", kind, "CODE", "Why.", WHEN, extra=kind == -1) for kind in kinds]
    write(tmp_path / SKIPPED_LIST, rows)
    told = skipped_page(tmp_path, None, 10, complete=True).rows
    assert [(row["is_directory"], row["is_symlink"], row["is_delete_destination_extra"]) for row in told] == [
        (False, False, False),
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    assert {(row["error_code"], row["error_details"], row["error_time"]) for row in told} == {("CODE", "Why.", WHEN)}
    assert {(row["source_path"], row["destination_path"]) for row in told} == {("/a", "/b")}
    assert {(row["external_checksum"], row["checksum_algorithm"]) for row in told} == {(None, None)}


def test_what_was_left_out_for_its_checksum_is_told_with_it(tmp_path: Path) -> None:
    write(
        tmp_path / SKIPPED_LIST, [SkippedRow(b"a", b"b", FILE, "CODE", "Why.", WHEN, checksum="0f", algorithm="SHA256")]
    )
    (row,) = skipped_page(tmp_path, None, 10, complete=True).rows
    assert (row["external_checksum"], row["checksum_algorithm"]) == ("0f", "SHA256")


def test_pages_go_on_where_the_last_one_ended_and_are_bounded(tmp_path: Path) -> None:
    write(tmp_path / TRANSFERRED_LIST, [TransferredRow(b"%d" % number, b"", 0) for number in range(MAX_PAGE + 5)])
    first = successful_page(tmp_path, None, 10 * MAX_PAGE, complete=True)
    second = successful_page(tmp_path, first.next_marker, 10, complete=True)
    paths = [row["source_path"] for row in first.rows + second.rows]
    assert paths == [f"/{number}" for number in range(MAX_PAGE + 5)]
    assert (len(second.rows), second.next_marker) == (5, None)


@pytest.mark.parametrize("read", [successful_page, skipped_page])
def test_a_damaged_list_and_a_made_up_marker_are_told_apart(tmp_path: Path, read: ReadPage) -> None:
    assert read(tmp_path, None, 10, complete=False).rows == []
    for name in (TRANSFERRED_LIST, SKIPPED_LIST):
        (tmp_path / name).write_bytes(b"garbage")
    with pytest.raises(ItemFailed) as damaged:
        read(tmp_path, None, 10, complete=True)
    with pytest.raises(ItemFailed) as unknown:
        read(tmp_path, "made up", 10, complete=True)
    assert (damaged.value.code, unknown.value.code) == ("LIST_DAMAGED", "BAD_MARKER")
    assert (damaged.value.who, unknown.value.who) == ("destination owner", "")
