"""The data port: strangers who say nothing keep nobody out."""

from __future__ import annotations

import ssl

import trio

from agent.connect import listener
from agent.connect.listener import DataPort, bind
from protocol.session import ALPN_LANE, SNI_SUFFIX


async def test_one_caller_with_idle_connections_keeps_nobody_else_out() -> None:
    delivered: list[tuple[str, str]] = []
    come = trio.Event()

    async def deliver(session_id: str, kind: str, _sock: trio.socket.SocketType) -> None:
        await trio.lowlevel.checkpoint()
        delivered.append((session_id, kind))
        come.set()

    port = DataPort(bind("127.0.0.1", 0), deliver)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(port.serve)
        idle = [await trio.open_tcp_stream("127.0.0.1", port.port) for _ in range(listener.MAX_STRANGERS + 16)]
        with trio.fail_after(5):
            # The last of them is turned away.
            assert await idle[-1].receive_some(1) == b""
        # Linux has all of 127.0.0.0/8.
        raw = await trio.open_tcp_stream("127.0.0.1", port.port, local_address="127.0.0.2")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols([ALPN_LANE])
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname="session" + SNI_SUFFIX)
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            await raw.send_all(outgoing.read())
        with trio.fail_after(5):
            await come.wait()
        assert delivered == [("session", "lane")]
        for stream in (raw, *idle):
            await stream.aclose()
        nursery.cancel_scope.cancel()
