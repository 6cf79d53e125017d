"""Lines of agents, however they are cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.control import AgentEvent, encode
from protocol.errors import ProtocolError
from relay.transfer.event_stream import MAX_LINE, LineReader


class Piece(bytes):
    """What comes at a time; must not be put behind a copy of all that was there before it."""

    def __radd__(self, other: bytes) -> bytes:
        raise AssertionError(f"{len(other)} bytes are copied for {len(self)}")


def event(number: int, size: int = 0) -> AgentEvent:
    return AgentEvent(n=number, kind="event", time="", description="x" * size)


@given(st.lists(st.integers(0, 50), max_size=8), st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_lines_are_the_same_however_they_are_cut(sizes: list[int], cuts: list[int]) -> None:
    events = [event(number, size) for number, size in enumerate(sizes)]
    whole = b"".join(encode(one) + b"\n\n" for one in events)
    reader, found, at = LineReader(), list[AgentEvent](), 0
    while at < len(whole):
        cut = cuts[at % len(cuts)]
        found += reader.feed_untrusted(Piece(whole[at : at + cut]))
        at += cut
    assert found == events


def test_a_line_in_very_many_pieces_is_not_copied_for_each() -> None:
    """A megabyte in pieces of a byte took the relay minutes, and its sender a moment."""
    reader = LineReader()
    line = encode(event(1, 100_000))
    for byte in line:
        assert reader.feed_untrusted(Piece(bytes([byte]))) == []
    assert reader.feed_untrusted(Piece(b"\n")) == [event(1, 100_000)]


@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("piece", [1024, MAX_LINE + 1])
def test_a_line_that_does_not_end_is_refused(piece: int, end: bytes) -> None:
    reader = LineReader()
    with pytest.raises(ProtocolError, match="is longer than"):
        for _ in range(MAX_LINE // piece + 2):
            reader.feed_untrusted(b"x" * piece)
        reader.feed_untrusted(end)
