"""What became of a task's files, page by page, as the relay asks for it: read from the task's manifests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from agent.transfer.books.manifest import (
    SKIPPED_LIST,
    TRANSFERRED_LIST,
    ManifestDamaged,
    RowType,
    SkippedRow,
    TransferredRow,
    read_page,
)
from protocol.control import Page, SkippedError, SuccessfulTransfer
from protocol.errors import ItemFailed
from protocol.names import format_path, split_path
from protocol.session import DIRECTORY, SYMLINK

# Rows in one page, however many are asked for.
MAX_PAGE = 1000


class ReadPage(Protocol):
    """`successful_page` or `skipped_page`."""

    def __call__(self, directory: Path, marker: str | None, limit: int, *, complete: bool) -> Page:
        """At most ``limit`` rows from ``marker`` on (None: from the first), of the task whose folder this is.
        ``complete``: nothing is added any more. Blocks. Raises `ItemFailed` BAD_MARKER and LIST_DAMAGED."""
        ...


def successful_page(directory: Path, marker: str | None, limit: int, *, complete: bool) -> Page:
    """A page of what was transferred. See `ReadPage`."""
    return _page(directory / TRANSFERRED_LIST, TransferredRow, _successful, marker, limit, complete=complete)


def skipped_page(directory: Path, marker: str | None, limit: int, *, complete: bool) -> Page:
    """A page of what was left out, and why. See `ReadPage`."""
    return _page(directory / SKIPPED_LIST, SkippedRow, _skipped, marker, limit, complete=complete)


def _successful(row: TransferredRow) -> SuccessfulTransfer:
    return SuccessfulTransfer(
        source_path=_shown(row.source),
        destination_path=_shown(row.destination),
        size=row.size,
        checksum=row.checksum,
        checksum_algorithm=row.algorithm,
    )


def _skipped(row: SkippedRow) -> SkippedError:
    return SkippedError(
        source_path=_shown(row.source),
        destination_path=_shown(row.destination),
        error_code=row.code,
        error_details=row.details,
        error_time=row.time,
        is_directory=row.kind == DIRECTORY,
        is_symlink=row.kind == SYMLINK,
        is_delete_destination_extra=row.extra,
        external_checksum=row.checksum,
        checksum_algorithm=row.algorithm,
    )


def _shown(path: bytes) -> str:
    return format_path(split_path(path))


def _page(
    path: Path,
    kind: type[RowType],
    told: Callable[[RowType], SuccessfulTransfer | SkippedError],
    marker: str | None,
    limit: int,
    *,
    complete: bool,
) -> Page:
    try:
        page = read_page(path, kind, marker, min(limit, MAX_PAGE), complete=complete)
    except ManifestDamaged as error:
        raise ItemFailed(
            "From here on the task's list of files is damaged on the agent's disk and cannot be shown. What was "
            "transferred is not concerned; a transfer with a sync level checks it.",
            code="LIST_DAMAGED",
            who="destination owner",
        ) from error
    except ValueError as error:
        raise ItemFailed(str(error), code="BAD_MARKER") from error
    return Page(rows=[msgspec.to_builtins(told(row)) for row in page.rows], next_marker=page.next_marker)
