"""Meetings: whatever is shown, by whom and when, both sides are told at most once, and only what was seen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.stun import PortNote
from relay.rendezvous import meetings as module
from relay.rendezvous.meetings import Meeting, Meetings


def opened(subject: Meetings, now: float = 100.0, session: str = "session", count: int = 2) -> Meeting:
    return subject.open(now, session, "task", "destination", "source", count, ([], []))


SHOWN = st.lists(
    st.tuples(st.sampled_from(["destination", "source", "stranger"]), st.integers(0, 4), st.integers(1, 3)), max_size=30
)


@given(SHOWN, st.integers(1, 3))
def test_a_meeting_is_complete_once_with_the_first_sight_of_each_port(
    shown: list[tuple[str, int, int]], count: int
) -> None:
    subject = Meetings()
    meeting = opened(subject, count=count)
    words = {"destination": meeting.words[0], "source": meeting.words[1], "stranger": "ab" * 16}
    first: dict[tuple[str, int], tuple[str, int]] = {}
    complete = 0
    for side, slot, port in shown:
        endpoint = "192.0.2.1", port
        found = subject.seen(100.0, PortNote(bytes.fromhex(words[side]), slot), endpoint)
        if (side == "source" and slot == 0) or (side == "destination" and 0 < slot <= count):
            first.setdefault((side, slot), endpoint)
        if found is not None:
            complete += 1
            assert len(first) == count + 1
            assert [(row.host, row.port) for row in found.for_destination()] == [first["source", 0]]
            told = {row.slot: (row.host, row.port) for row in found.for_source()}
            assert told == {slot: first["destination", slot] for slot in range(1, count + 1)}
    assert complete == (1 if len(first) == count + 1 else 0)
    assert len(subject) == 1 - complete


def test_what_is_shown_too_late_counts_no_more() -> None:
    subject = Meetings()
    meeting = opened(subject, count=1)
    word = [bytes.fromhex(text) for text in meeting.words]
    assert subject.seen(100.0, PortNote(word[1], 0), ("192.0.2.1", 1)) is None
    assert subject.seen(100.1 + module.LIFE, PortNote(word[0], 1), ("192.0.2.2", 2)) is None


def test_the_meetings_that_wait_are_bounded() -> None:
    subject = Meetings()
    made = [opened(subject, session=str(number)) for number in range(module.MAX_MEETINGS + 3)]
    assert len(subject) == module.MAX_MEETINGS
    assert subject.seen(100.0, PortNote(bytes.fromhex(made[0].words[1]), 0), ("192.0.2.1", 1)) is None
    assert made[0].source_seen is None
    opened(subject, 101.0 + module.LIFE)
    assert len(subject) == 1


def test_a_meeting_of_which_one_word_was_forgotten_already_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MEETINGS", 2)
    subject = Meetings()
    first = opened(subject, count=1)
    assert subject.seen(100.0, PortNote(bytes.fromhex(first.words[0]), 1), ("192.0.2.1", 1)) is None
    for number in range(2):
        opened(subject, session=str(number))
    assert first.words[0] not in subject._waiting
    assert subject.seen(100.0, PortNote(bytes.fromhex(first.words[1]), 0), ("192.0.2.2", 2)) is first
    assert subject.seen(100.0, PortNote(bytes.fromhex(first.words[1]), 0), ("192.0.2.2", 2)) is None
