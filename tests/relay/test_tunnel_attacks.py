"""Who does not get into a tunnel: check 28 with counts. Every attack runs while an honest pair exchanges bytes."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ProtocolError, TowpathError
from protocol.ticket import RelayRoot, TicketSigner, TicketVerifier
from protocol.tunnel.greeting import LineReader, presented_untrusted, verdict_untrusted
from protocol.tunnel.token import LIFE, Half, TunnelRefused, half_untrusted, sign_half
from relay.rendezvous.tunnel import pairing
from relay.rendezvous.tunnel.pairing import PairingTable, TunnelBusy
from tests.relay.tunnel_world import RELAY, ROOT, SESSION, SIGNER, USER, TunnelWorld, dial, tunnel_world

COUNT = 100
SEED = 20261124


def a_half(**changes: object) -> Half:
    now = time.time()
    half = Half(
        relay_node=str(uuid.uuid4()),
        pair_id=str(uuid.uuid4()),
        session_id=SESSION,
        side="source",
        user=USER,
        issued=now,
        expires=now + LIFE,
    )
    return msgspec.structs.replace(half, **changes)


@asynccontextmanager
async def besides_an_honest_pair() -> AsyncIterator[TunnelWorld]:
    async with tunnel_world() as world, world.pair() as (source, destination):
        yield world
        with trio.fail_after(10):
            await source.send_all(b"undisturbed")
            assert await destination.receive_some() == b"undisturbed"


async def refused(world: TunnelWorld, token: str) -> str:
    with trio.fail_after(20):
        try:
            stream = await world.enter(token)
        except TowpathError as error:
            return error.code
    await stream.aclose()
    raise AssertionError("a stranger was joined")


async def all_refused(world: TunnelWorld, tokens: list[str]) -> set[str]:
    codes: set[str] = set()
    limiter = trio.CapacityLimiter(16)

    async def one(token: str) -> None:
        async with limiter:
            codes.add(await refused(world, token))

    before = world.service.acceptor.refused
    async with trio.open_nursery() as nursery:
        for token in tokens:
            nursery.start_soon(one, token)
    assert world.service.acceptor.refused - before == len(tokens)
    return codes


async def enter(world: TunnelWorld, token: str, streams: list[trio.SocketStream]) -> None:
    streams.append(await world.enter(token))


async def test_guessed_and_altered_tokens() -> None:
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    async with besides_an_honest_pair() as world:
        good = world.service.issue(SESSION, USER)[0]
        tokens = []
        for _ in range(COUNT):
            position = chance.randrange(len(good))
            letter = chance.choice([c for c in "abcXYZ019-_." if c != good[position]])
            altered = good[:position] + letter + good[position + 1 :]
            # The last character of each base64 part carries bits that mean nothing; some changes alter nothing.
            if position + 1 == len(good) or good[position + 1] == ".":
                altered = letter + good
            tokens.append(altered)
        tokens += [chance.randbytes(40).hex() for _ in range(20)]
        assert await all_refused(world, tokens) <= {"PROTOCOL_ERROR", "TUNNEL_REFUSED"}


async def test_tokens_of_other_relays_and_other_processes_of_this_one() -> None:
    key = Ed25519PrivateKey.generate()
    root = RelayRoot.generate()
    stranger = TicketSigner(RELAY, key, root.certify(key.public_key(), "k", time.time() - 9, time.time() + 9999), "k")
    async with besides_an_honest_pair() as world:
        here = world.service.relay_node
        foreign = [sign_half(stranger, a_half(relay_node=here)) for _ in range(COUNT // 4)]
        assert await all_refused(world, foreign) == {"PROTOCOL_ERROR"}
        earlier = [sign_half(SIGNER, a_half()) for _ in range(COUNT // 4)]
        assert await all_refused(world, earlier) == {"TUNNEL_REFUSED"}


async def test_expired_tokens_and_tokens_for_other_purposes() -> None:
    async with besides_an_honest_pair() as world:
        here = world.service.relay_node
        past = time.time() - LIFE - 1
        late = [sign_half(SIGNER, a_half(relay_node=here, issued=past, expires=past + LIFE)) for _ in range(10)]
        assert await all_refused(world, late) == {"TUNNEL_EXPIRED"}
        now = int(time.time())
        other = [
            SIGNER.sign_claims({"iss": RELAY, "aud": audience, "sid": SESSION, "iat": now, "exp": now + 60})
            for audience in ("", "towpath-enrol", "towpath-link")
        ]
        other.append(
            SIGNER.sign_claims({"iss": RELAY, "aud": "towpath-tunnel", "node": here, "iat": now, "exp": now + 60})
        )
        assert await all_refused(world, other) == {"PROTOCOL_ERROR"}


async def test_replayed_tokens_after_a_pair_was_joined_and_while_one_waits() -> None:
    async with besides_an_honest_pair() as world:
        for _ in range(10):
            offers = world.service.issue(SESSION, USER)
            streams: list[trio.SocketStream] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(enter, world, offers[0], streams)
                while not world.service.statistics().waiting:
                    await trio.sleep(0.005)
                # The same side again, while the first one waits: the first is not disturbed.
                assert await all_refused(world, [offers[0]] * 3) == {"TUNNEL_REPLAYED"}
                nursery.start_soon(enter, world, offers[1], streams)
            assert await all_refused(world, [offers[0], offers[1]] * 2) == {"TUNNEL_REPLAYED"}
            for stream in streams:
                await stream.aclose()
        assert world.service.statistics().replayed == 70


async def test_two_halves_of_one_side_or_of_different_sessions_are_not_joined() -> None:
    async with besides_an_honest_pair() as world:
        here = world.service.relay_node
        for changes in ({"session_id": str(uuid.uuid4())}, {"user": str(uuid.uuid4())}):
            half = a_half(relay_node=here)
            other = msgspec.structs.replace(half, side="destination", **changes)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(enter, world, sign_half(SIGNER, half), [])
                while not world.service.statistics().waiting:
                    await trio.sleep(0.005)
                assert await refused(world, sign_half(SIGNER, other)) == "TUNNEL_REFUSED"
                nursery.cancel_scope.cancel()
            while world.service.statistics().waiting:
                await trio.sleep(0.005)


async def test_those_who_say_nothing_too_much_or_go_away() -> None:
    async with besides_an_honest_pair() as world:
        said: list[bytes] = [b"", b"\n", b"{}\n", b"x" * 9000, b'{"token":1}\n', b'{"token":"a"}\nmore', b"\x00\xff\n"]
        for words in said * 5:
            raw = await dial("localhost", world.port)
            stream = trio.SSLStream(raw, world.context(), server_hostname="localhost", https_compatible=True)
            with trio.fail_after(10):
                await stream.send_all(words or b" ")
                if words:
                    assert b'"joined":false' in await stream.receive_some(10_000)
            await trio.aclose_forcefully(stream)
        # Halves whose agents go away are given up at once, not when their time is over.
        offers = [world.service.issue(SESSION, USER)[0] for _ in range(20)]
        with trio.move_on_after(0.3):
            async with trio.open_nursery() as nursery:
                for offer in offers:
                    nursery.start_soon(world.enter, offer)
        with trio.fail_after(10):
            while world.service.statistics().waiting:
                await trio.sleep(0.01)


def test_waiting_halves_are_bounded_for_each_user_and_in_all() -> None:
    table: PairingTable[int] = PairingTable(max_waiting=50, max_waiting_user=10)
    accepted = 0
    for user in range(20):
        for number in range(20):
            half = a_half(user=f"user{user}")
            try:
                table.present(half, number, half.issued)
                accepted += 1
            except TunnelBusy:
                continue
    assert accepted == 50
    assert table.statistics().busy == 350


def test_halves_that_came_and_went_leave_the_bounds_as_they_were() -> None:
    table: PairingTable[None] = PairingTable(max_waiting=50, max_waiting_user=3)
    for number in range(20):
        half = a_half(pair_id=f"gone {number}")
        table.present(half, None, half.issued)
        table.gone(half)
        table.gone(half)
    waiting = [a_half(pair_id=f"waits {number}") for number in range(4)]
    for half in waiting[:3]:
        assert table.present(half, None, half.issued) is None
    with pytest.raises(TunnelBusy):
        table.present(waiting[3], None, waiting[3].issued)
    # One that is joined makes room for one more.
    other = msgspec.structs.replace(waiting[0], side="destination")
    assert table.present(other, None, other.issued) is not None
    assert table.present(waiting[3], None, waiting[3].issued) is None


def test_what_is_kept_of_spent_tokens_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "MAX_SPENT", 10)
    table: PairingTable[None] = PairingTable()
    halves = [a_half(pair_id=str(number)) for number in range(11)]
    for half in halves[:10]:
        table.present(half, None, half.issued)
        if half is not halves[0]:
            table.gone(half)
    with pytest.raises(TunnelBusy):
        table.present(halves[10], None, halves[10].issued)
    # The other half of one that waits is no new pair.
    other = msgspec.structs.replace(halves[0], side="destination")
    assert table.present(other, None, other.issued) is not None
    # Tokens that have run out make room again.
    late = halves[0].expires + 1
    fresh = a_half(pair_id="fresh", issued=late, expires=late + LIFE)
    assert table.present(fresh, None, late) is None


@given(st.data())
def test_only_the_two_halves_of_one_pair_ever_meet(data: st.DataObject) -> None:
    table: PairingTable[tuple[str, str]] = PairingTable(max_waiting=5, max_waiting_user=4)
    now = 1000.0
    seen: set[tuple[str, str]] = set()
    for _ in range(data.draw(st.integers(1, 60))):
        now += data.draw(st.sampled_from([0.0, 1.0, 70.0]))
        half = a_half(
            pair_id=data.draw(st.sampled_from("abcdefgh")),
            side=data.draw(st.sampled_from(["source", "destination"])),
            session_id=data.draw(st.sampled_from(["s", "t"])),
            user=data.draw(st.sampled_from(["u", "v"])),
            issued=now,
            expires=now + 10_000,
        )
        if data.draw(st.booleans()):
            table.gone(half)
            continue
        try:
            other = table.present(half, (half.pair_id, half.side), now)
        except (TunnelRefused, TunnelBusy):
            continue
        assert (half.pair_id, half.side) not in seen
        seen.add((half.pair_id, half.side))
        if other is not None:
            assert other.connection == (half.pair_id, "source" if half.side == "destination" else "destination")
            assert (other.half.session_id, other.half.user) == (half.session_id, half.user)
        assert table.statistics().waiting <= 5


def test_spent_tokens_are_forgotten_after_they_expired() -> None:
    table: PairingTable[None] = PairingTable()
    for number in range(1000):
        half = a_half(pair_id=str(number), issued=float(number), expires=number + LIFE)
        table.present(half, None, float(number))
        table.gone(half)
    assert table.statistics().spent < LIFE + 2


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_lines_of_strangers_raise_only_the_protocol_error(data: bytes) -> None:
    for read in (presented_untrusted, verdict_untrusted):
        try:
            read(data)
        except TowpathError:
            continue
    reader = LineReader()
    for start in range(0, len(data), 7):
        reader.feed_untrusted(data[start : start + 7])


@given(st.text(max_size=300))
def test_tokens_of_strangers_raise_only_the_protocol_error(token: str) -> None:
    with pytest.raises(ProtocolError):
        half_untrusted(token, TicketVerifier(RELAY, ROOT.public_pem), relay_node="x", now=time.time())


@given(st.dictionaries(st.sampled_from(["node", "pair", "sid", "side", "user"]), st.none() | st.integers() | st.text()))
def test_signed_nonsense_is_no_half(claims: dict[str, object]) -> None:
    now = time.time()
    token = SIGNER.sign_claims({"iss": RELAY, "aud": "towpath-tunnel", "iat": now, "exp": now + 60, **claims})
    with pytest.raises(TowpathError):
        half_untrusted(token, TicketVerifier(RELAY, ROOT.public_pem), relay_node="x", now=now)
