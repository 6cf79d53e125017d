"""What a source does with offers: which it refuses, and that nothing of an old one stays."""

from __future__ import annotations

import errno

import msgspec
import pytest
import trio
import trio.testing

from protocol.candidates import Candidate, PathGo, PathOffer
from protocol.errors import ProtocolError
from tests.agent.paths_world import SESSION, TASK, world


async def test_an_old_generation_is_refused_and_an_old_go_ignored() -> None:
    async with world() as made:
        offer = PathOffer(session_id=SESSION, task_id=TASK, generation=5, token="0" * 32, count=1)
        await made.source.introductions.offer(offer, own=False)
        stale = PathOffer(session_id=SESSION, task_id=TASK, generation=4, token="0" * 32, count=1)
        with pytest.raises(ProtocolError) as caught:
            await made.source.introductions.offer(stale, own=False)
        assert caught.value.code == "STALE_OFFER"
        made.source.introductions.go(PathGo(session_id=SESSION, generation=4, start_in=0.0))
        made.finder.take_go(PathGo(session_id=SESSION, generation=4, start_in=0.0))


async def test_an_offer_whose_caller_leaves_keeps_nothing_of_the_one_before() -> None:
    async with world() as made:
        offer = PathOffer(
            session_id=SESSION,
            task_id=TASK,
            generation=1,
            token="0" * 32,
            count=1,
            candidates=[Candidate(kind="mapped-tcp", host="127.0.0.1", port=9, slot=1)],
        )
        await made.source.introductions.offer(offer, own=False)
        kept = made.source.network._observation
        assert kept is not None
        with trio.CancelScope() as scope:
            scope.cancel()
            await made.source.introductions.offer(msgspec.structs.replace(offer, generation=2), own=False)
        made.source.introductions.cut(SESSION)
        assert kept.users == 0
        assert made.source.network._observation is None


async def test_a_source_that_can_start_no_process_for_a_way_goes_on() -> None:
    class NoProcess:
        async def answer(self, _offer: PathOffer) -> list[Candidate]:
            await trio.lowlevel.checkpoint()
            return []

        async def serve(self, _offer: PathOffer, _go: PathGo, _greet: object) -> None:
            served.set()
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    served = trio.Event()
    async with world() as made:
        made.source.network.transports.quic = NoProcess()  # type: ignore[assignment]
        offer = PathOffer(
            session_id=SESSION, task_id=TASK, generation=1, token="0" * 32, count=1, transports=["tcp", "quic"]
        )
        await made.source.introductions.offer(offer, own=False)
        made.source.introductions.go(PathGo(session_id=SESSION, generation=1, start_in=0.0))
        await served.wait()
        await trio.testing.wait_all_tasks_blocked()
        again = await made.source.introductions.offer(msgspec.structs.replace(offer, generation=2), own=False)
        assert again.transports == ["tcp", "quic"]


@pytest.mark.parametrize(("token", "count"), [("", 1), ("x" * 32, 1), ("0" * 32, 0), ("0" * 32, 99)])
async def test_malformed_offers_are_refused(token: str, count: int) -> None:
    async with world() as made:
        offer = PathOffer(session_id=SESSION, task_id=TASK, generation=1, token=token, count=count)
        with pytest.raises(ProtocolError):
            await made.source.introductions.offer(offer, own=False)
