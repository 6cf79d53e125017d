"""Which datagram may begin a QUIC connection: every one is judged, and tokens are good for one place and time."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from agent.connect.quic.door import Answer, Begin, Door, Pass, initial_untrusted
from tests.agent.quic_flood import PEER, STRANGER, initial, real_initial


@given(st.binary(max_size=1500), st.binary(max_size=40))
def test_any_datagram_is_judged(data: bytes, head: bytes) -> None:
    door = Door("aioquic")
    for each in (data, (head + bytes(1300))[:1300]):
        verdict = door.judge_untrusted(each, PEER, 0.0)
        assert verdict is None or isinstance(verdict, Begin | Pass | Answer)


@given(st.data())
def test_a_token_is_good_for_its_address_its_connection_and_its_time(data: st.DataObject) -> None:
    door, real = Door("aioquic"), real_initial()
    chance = random.Random(data.draw(st.integers(0, 1000)))
    assert isinstance(door.judge_untrusted(initial(chance), PEER, 0.0), Begin)
    answer = door.judge_untrusted(real, PEER, 0.0)
    assert isinstance(answer, Answer)
    packet = answer.data
    at = 6 + packet[5]
    retry_source, token = packet[at + 1 : at + 1 + packet[at]], packet[at + 1 + packet[at] : -16]

    def shown(token: bytes, destination: bytes, address: tuple[str, int], now: float) -> object:
        first = initial_untrusted(real)
        assert first is not None
        head = real[:5] + bytes([len(destination)]) + destination + bytes([len(first.source)]) + first.source
        forged = head + (0x4000 | len(token)).to_bytes(2, "big") + token + bytes(1200)
        return door.judge_untrusted(forged, address, now)

    changed = bytearray(token)
    changed[data.draw(st.integers(0, len(token) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert isinstance(shown(bytes(changed), retry_source, PEER, 1.0), Answer)
    assert isinstance(shown(token, chance.randbytes(8), PEER, 1.0), Answer)
    assert isinstance(shown(token, retry_source, STRANGER, 1.0), Answer)
    assert isinstance(shown(token, retry_source, PEER, 60.0), Answer)
    first = initial_untrusted(real)
    assert first is not None
    assert shown(token, retry_source, PEER, 1.0) == Begin(first.destination, retry_source)
