"""TLS of links: nothing lost or turned around whatever the pieces, and every kind of end told."""

from __future__ import annotations

import random
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
import trustme

from relay.link_stream import MOST_OTHER, READ, LinkStream
from tests.protocol.key_updates import KeyUpdates

CA = trustme.CA()
SERVER = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
CA.issue_cert("relay.example").configure_cert(SERVER)
SERVER.num_tickets = 0
CLIENT = ssl.create_default_context()
CA.configure_trust(CLIENT)


def pair() -> tuple[LinkStream, trio.SocketStream]:
    """The relay's end of a connection, and a socket that is the agent's."""
    ours, theirs = socket.socketpair()
    streams = []
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        sock.setblocking(False)
        streams.append(trio.SocketStream(trio.socket.from_stdlib_socket(sock)))
    return LinkStream(streams[0], SERVER), streams[1]


@asynccontextmanager
async def linked(
    context: ssl.SSLContext = CLIENT,
) -> AsyncIterator[tuple[LinkStream, trio.SSLStream[trio.SocketStream]]]:
    ours, raw = pair()
    theirs = trio.SSLStream(raw, context, server_hostname="relay.example", https_compatible=True)
    async with ours, raw:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.do_handshake)
            nursery.start_soon(theirs.do_handshake)
        with trio.fail_after(10):
            yield ours, theirs


async def received(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await stream.receive_some()
        assert more, f"ended after {len(data)} bytes"
        data += more
    return data


async def test_much_goes_both_ways_at_once_through_a_small_socket() -> None:
    content = random.Random(1).randbytes(1_000_000)
    async with linked() as (ours, theirs), trio.open_nursery() as nursery:
        nursery.start_soon(ours.send_all, content)
        nursery.start_soon(theirs.send_all, content[::-1])
        assert await received(theirs, len(content)) == content
        assert await received(ours, len(content)) == content[::-1]


async def test_a_sender_is_held_back_and_can_be_cancelled() -> None:
    async with linked() as (ours, theirs):
        with trio.move_on_after(0.05) as scope:
            await ours.send_all(bytes(1_000_000))
        assert scope.cancelled_caught
        # What TLS has taken goes on with the next word.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.send_all, b"last")
            assert (await received(theirs, 1_000_004))[-4:] == b"last"


async def test_content_that_comes_with_the_end_of_the_handshake_is_not_missed() -> None:
    ours, raw = pair()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = CLIENT.wrap_bio(incoming, outgoing, server_hostname="relay.example")
    async with ours, raw, trio.open_nursery() as nursery:
        nursery.start_soon(ours.do_handshake)
        while True:
            try:
                theirs.do_handshake()
                break
            except ssl.SSLWantReadError:
                await raw.send_all(outgoing.read())
                incoming.write(await raw.receive_some())
        theirs.write(b"at once")
        await raw.send_all(outgoing.read())
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(5):
            assert await ours.receive_some() == b"at once"
            # And byte by byte, which wakes the reader for nothing.
            theirs.write(b"slowly")
            nursery.start_soon(dribble, raw, outgoing.read())
            assert await ours.receive_some(3) == b"slo"
            assert await ours.receive_some(3) == b"wly"


async def dribble(raw: trio.SocketStream, data: bytes) -> None:
    for number in range(len(data)):
        await raw.send_all(data[number : number + 1])
        await trio.testing.wait_all_tasks_blocked()


@pytest.mark.parametrize("goodbye", [True, False])
async def test_the_end_is_an_end_with_and_without_goodbye(goodbye: bool) -> None:
    async with linked() as (ours, theirs):
        await theirs.send_all(b"last words")
        if goodbye:
            await theirs.aclose()
        await theirs.transport_stream.aclose()
        assert await received(ours, 10) == b"last words"
        assert await ours.receive_some() == b""


async def test_what_is_no_tls_breaks_the_handshake_and_is_told_so() -> None:
    ours, raw = pair()
    async with ours, raw:
        await raw.send_all(b"\x16\x03\x01\x00\x05hello")
        with pytest.raises(trio.BrokenResourceError):
            await ours.do_handshake()
        # A record of the alert protocol (RFC 8446, section 6).
        assert (await raw.receive_some())[0] == 21


async def test_damage_breaks_the_link() -> None:
    async with linked() as (ours, theirs):
        await theirs.transport_stream.send_all(b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises(trio.BrokenResourceError):
            await ours.receive_some()


async def test_who_changes_keys_and_says_nothing_is_cut_off(tmp_path: Path) -> None:
    log = tmp_path / "keys"
    context = ssl.create_default_context()
    CA.configure_trust(context)
    context.keylog_filename = str(log)
    async with linked(context) as (ours, theirs), trio.open_nursery() as nursery:
        keys = KeyUpdates(log, "CLIENT", theirs.cipher()[0])
        raw = theirs.transport_stream
        sent = 0

        async def listen() -> None:
            while await raw.receive_some():
                pass

        async def change() -> None:
            nonlocal sent
            while True:
                records = b"".join(keys.update() for _ in range(100))
                await raw.send_all(records)
                sent += len(records)

        nursery.start_soon(listen)
        for _ in range(30):
            # Now and then it may.
            await raw.send_all(b"".join(keys.update() for _ in range(100)) + keys.content(bytes(100)))
            assert await ours.receive_some() == bytes(100)
        nursery.start_soon(change)
        with pytest.raises(trio.BrokenResourceError):
            await ours.receive_some()
        assert sent < 2 * MOST_OTHER
        nursery.cancel_scope.cancel()


async def test_a_caller_that_leaves_in_the_handshake_breaks_it() -> None:
    ours, raw = pair()
    async with ours:
        await raw.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await ours.do_handshake()


async def test_closing_wakes_the_reader_and_nothing_is_sent_afterwards() -> None:
    async with linked() as (ours, _), trio.open_nursery() as nursery:

        async def read() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await ours.receive_some()

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        await ours.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await ours.send_all(b"too late")


async def test_others_have_their_turn_while_much_comes() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with linked() as (ours, theirs), trio.open_nursery() as nursery:
        nursery.start_soon(theirs.send_all, bytes(READ))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(count)
        reads, size = 0, 0
        while size < READ:
            size += len(await ours.receive_some(100))
            reads += 1
        assert turns >= reads - 1
        nursery.cancel_scope.cancel()
