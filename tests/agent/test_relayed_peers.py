"""Which peers are remembered to be reached through the relay only, and for how long."""

from __future__ import annotations

from typing import Any

import trio
import trio.testing

from agent.connect import relayed_peers as module
from agent.connect.network import Network
from agent.connect.relayed_peers import RelayedPeers
from agent.connect.running_race import RunningRace
from protocol.candidates import Arrangement
from tests.agent.paths_world import world

PEER = "192.0.2.7"


def test_it_is_remembered_for_a_while_and_until_something_better_was_found() -> None:
    subject = RelayedPeers()
    assert not subject.has(0.0, PEER)
    subject.note(100.0, PEER, relayed=True)
    assert subject.has(99.0 + module.LIFE, PEER)
    assert not subject.has(100.0 + module.LIFE, PEER)
    subject.note(101.0, PEER, relayed=False)
    assert not subject.has(102.0, PEER)
    subject.note(101.0, "", relayed=True)
    assert len(subject) == 0


def test_it_is_bounded_and_forgotten_in_another_network() -> None:
    network = Network(relay=None)
    for number in range(module.MOST + 3):
        network.relayed.note(0.0, f"peer {number}", relayed=True)
    assert len(network.relayed) == module.MOST
    assert not network.relayed.has(1.0, "peer 0")
    network.announce_change()
    assert len(network.relayed) == 0


async def test_a_race_remembers_what_its_end_says(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as made:
        relayed = made.destination.network.relayed
        arranged = Arrangement(token="ab" * 16, count=1, peer_observed=PEER)

        async def race(best: str) -> RunningRace:
            running = RunningRace(made.finder, [], True, tunnel=True, arranged=arranged)
            running._race._best = best

            async def nothing(*_: Any) -> None:
                await trio.lowlevel.checkpoint()

            running._run = nothing  # type: ignore[method-assign]
            await running.run()
            return running

        assert (await race("tunnel"))._race.tunnel_hold > 0
        assert relayed.has(trio.current_time(), PEER)
        # It is not remembered for longer because it was expected.
        await trio.sleep(module.LIFE - 1)
        assert (await race("tunnel"))._race.tunnel_hold == 0
        await trio.sleep(2)
        assert not relayed.has(trio.current_time(), PEER)
        await race("tunnel")
        await race("punched")
        assert not relayed.has(trio.current_time(), PEER)
