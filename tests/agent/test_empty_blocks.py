"""A block of nothing behind the end of a file, which no honest source sends: it would count as one of the file's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.storage.handed import Handed
from agent.transfer.lane_processes.lane_writing import GivenLargeFile, RangeOrder, Writing
from protocol import lane
from protocol.errors import ProtocolError
from tests.agent.test_end_game import BLOCK, CONTENT, DIGEST, Scene, _Job

END = _Job.row.size
NOTHING = lane.Block(2, END, lane.digest(b""), last=True)


def test_a_lane_takes_no_empty_block() -> None:
    scene = Scene(honours_abandon=True)
    scene.file.job = _Job  # type: ignore[assignment]
    scene.open(1)
    scene.fetcher.submit_range(scene.file, END - BLOCK, BLOCK)
    (request,) = scene.fetcher.outstanding(1)
    receiver = scene.receivers[1]
    receiver._block(lane.Block(request.r, END - BLOCK, DIGEST), memoryview(CONTENT))
    with pytest.raises(ProtocolError):
        receiver._block(lane.Block(request.r, END, NOTHING.digest, last=True), memoryview(b""))
    assert list(scene.file.unchecked) == [END // BLOCK - 1]


def test_a_lane_process_takes_no_empty_block(tmp_path: Path) -> None:
    writing = Writing(Handed(), 8)
    descriptor = os.open(tmp_path / "temporary", os.O_RDWR | os.O_CREAT)
    writing.files[1] = GivenLargeFile(descriptor, END, BLOCK)
    order = RangeOrder(1, END - BLOCK, BLOCK)
    writing.block(1, lane.Block(2, END - BLOCK, DIGEST), order, memoryview(CONTENT), lambda _doing: None)
    with pytest.raises(ProtocolError):
        writing.block(1, NOTHING, order, memoryview(b""), lambda _doing: None)
    writing.close()
    assert (tmp_path / "temporary").stat().st_size == END
