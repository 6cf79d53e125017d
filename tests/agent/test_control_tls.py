"""TLS of control streams: with sources of this release and of older ones, with strangers, and with peers that leave."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from agent.connect import control_tls, tls
from agent.connect.control_tls import ControlStream
from agent.connect.tls import check_peer, session_context
from protocol.errors import AccessDenied
from protocol.identity import NodeKey
from protocol.session import ALPN_CONTROL, ALPN_CONTROL_AHEAD, ALPNS_CONTROL
from tests.protocol.key_updates import KeyUpdates

MINE, THEIRS, STRANGER = (NodeKey.generate() for _ in range(3))
NAME = "session.example"
CONTENT = bytes(range(256)) * 12_345


def _served(
    stream: Any, identity: NodeKey, peer: NodeKey, alpn: tuple[str, ...] = ALPNS_CONTROL, log: Path | None = None
) -> Any:
    context = session_context(identity, peer.certificate_pem, server_side=True, alpn=alpn)
    if log is not None:
        context.keylog_filename = str(log)
    return trio.SSLStream(stream, context, server_side=True, https_compatible=True)


@asynccontextmanager
async def ends(
    pair: Any = trio.testing.memory_stream_pair, alpn: tuple[str, ...] = ALPNS_CONTROL, log: Path | None = None
) -> AsyncIterator[tuple[ControlStream, Any]]:
    """Both ends, after their handshakes."""
    near, far = pair()
    ours = ControlStream(near, MINE, THEIRS.certificate_pem, server_name=NAME, alpn=ALPNS_CONTROL)
    theirs = _served(far, THEIRS, MINE, alpn, log)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(theirs.do_handshake)
            await ours.do_handshake()
        yield ours, theirs
    await trio.aclose_forcefully(ours)
    await trio.aclose_forcefully(theirs)


async def _take(stream: Any, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await stream.receive_some()
        assert more, "it ended early"
        data += more
    return data


async def test_its_keys_never_protect_too_much() -> None:
    async with ends() as (ours, theirs):
        check_peer(theirs.getpeercert(binary_form=True), MINE.fingerprint)
        assert ours.cipher() == "TLS_CHACHA20_POLY1305_SHA256"
        assert theirs.cipher()[0] == ours.cipher()
        assert ours.selected_alpn_protocol() == ALPN_CONTROL_AHEAD


async def test_a_source_of_an_older_release_takes_what_it_always_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "_PRIORITIZE_CHACHA", 0)
    async with ends(alpn=(ALPN_CONTROL,)) as (ours, theirs):
        assert ours.cipher() == "TLS_AES_256_GCM_SHA384"
        assert ours.selected_alpn_protocol() == ALPN_CONTROL
        await ours.send_all(b"greeting")
        assert await _take(theirs, 8) == b"greeting"


async def test_both_ends_may_send_at_once_and_neither_waits_for_the_other() -> None:
    # Nothing is sent before it is taken.
    async with ends(trio.testing.lockstep_stream_pair) as (ours, theirs):
        taken: dict[str, bytes] = {}

        async def take(name: str, stream: Any) -> None:
            taken[name] = await _take(stream, len(CONTENT))

        async with trio.open_nursery() as nursery:
            for name, stream in (("ours", ours), ("theirs", theirs)):
                nursery.start_soon(stream.send_all, CONTENT)
                nursery.start_soon(take, name, stream)
        assert taken == {"ours": CONTENT, "theirs": CONTENT}


async def test_a_source_that_asks_and_takes_no_answers_has_little_kept_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(control_tls, "_MOST_OTHER", 20_000)
    log = tmp_path / "keys"
    async with ends(log=log) as (ours, theirs):
        keys = KeyUpdates(log, "SERVER", theirs.cipher()[0])
        raw = theirs.transport_stream
        # While the source takes what we say, its changes of keys are answered, however many they are.
        for _ in range(2000):
            await raw.send_all(keys.update() + keys.content(b"."))
            assert await ours.receive_some() == b"."

        async def stuck(_data: bytes) -> None:
            await trio.sleep_forever()

        monkeypatch.setattr(ours.transport_stream, "send_all", stuck)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.send_all, b"nobody takes this")
            await trio.testing.wait_all_tasks_blocked()
            await raw.send_all(b"".join(keys.update() for _ in range(700)) + keys.content(b"."))
            assert await ours.receive_some() == b"."
            with pytest.raises(trio.BrokenResourceError):
                for _ in range(10):
                    await raw.send_all(b"".join(keys.update() for _ in range(100)))
                    with trio.move_on_after(0.01):
                        await ours.receive_some()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("who", ["source", "destination"])
async def test_a_stranger_is_refused(who: str) -> None:
    near, far = trio.testing.memory_stream_pair()
    mine, served_by = (STRANGER, THEIRS) if who == "destination" else (MINE, STRANGER)
    ours = ControlStream(near, mine, THEIRS.certificate_pem, server_name=NAME, alpn=ALPNS_CONTROL)
    theirs = _served(far, served_by, MINE)

    async def serve() -> None:
        try:
            await theirs.do_handshake()
        except trio.BrokenResourceError:
            await trio.aclose_forcefully(far)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            # In TLS 1.3 a destination learns only from what it reads that it was refused.
            with pytest.raises((trio.BrokenResourceError, AccessDenied)):
                try:
                    await ours.do_handshake()
                    assert await ours.receive_some() == b""
                    raise trio.BrokenResourceError("refused")
                finally:
                    await trio.aclose_forcefully(near)


@pytest.mark.parametrize("says_so", [True, False])
async def test_a_peer_that_leaves_ends_what_is_received(says_so: bool) -> None:
    async with ends() as (ours, theirs):
        await theirs.send_all(b"last words")
        assert await _take(ours, 10) == b"last words"
        async with trio.open_nursery() as nursery:
            if says_so:
                nursery.start_soon(theirs.aclose)
            else:
                nursery.start_soon(theirs.transport_stream.aclose)
            assert await ours.receive_some() == b""
        with pytest.raises(trio.BrokenResourceError):
            await ours.send_all(b"anybody there?")


async def test_one_that_leaves_during_the_handshake_is_noticed() -> None:
    near, far = trio.testing.memory_stream_pair()
    ours = ControlStream(near, MINE, THEIRS.certificate_pem, server_name=NAME, alpn=ALPNS_CONTROL)
    await far.aclose()
    with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
        await ours.do_handshake()


async def test_what_is_no_tls_breaks_it() -> None:
    async with ends() as (ours, theirs), trio.open_nursery() as nursery:
        nursery.start_soon(theirs.transport_stream.send_all, b"\x17\x03\x03\x00\x10" + bytes(16))
        with pytest.raises(trio.BrokenResourceError):
            await ours.receive_some()


def test_the_option_is_the_one_of_openssl() -> None:
    """`ssl` has no name for it; a server's context keeps it."""
    context = session_context(MINE, THEIRS.certificate_pem, server_side=True, alpn=ALPNS_CONTROL)
    assert context.options & tls._PRIORITIZE_CHACHA
    assert context.options & ssl.OP_CIPHER_SERVER_PREFERENCE
