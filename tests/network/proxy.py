"""An HTTP proxy for the lab, in a namespace of its own process: ``python proxy.py PORT user:password [OPTION]``.

With ``inspect`` it looks at what is sent through it, and lets pass only TLS greetings that name HTTP. With
``resign=FILE`` it opens encrypted connections with certificates of an authority of its own, which it writes there.
"""

from __future__ import annotations

import ssl
import sys
from pathlib import Path

import trio
import trustme

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

from nat import is_https

from relay.dispatch import peek_client_hello
from tests.agent.proxy_server import ProxyServer


class Inspecting(ProxyServer):
    """Cuts connections that begin otherwise than HTTPS does."""

    async def begin(self, stream: trio.SocketStream, onward: trio.SocketStream) -> bool:
        data = b""
        while (verdict := is_https(data) if data else None) is None:
            more = await stream.receive_some(4096)
            if not more:
                return False
            data += bytes(more)
        if verdict:
            await onward.send_all(data)
        return verdict


class Resigning(ProxyServer):
    """Reads and passes on what is inside of TLS, as proxies of companies do."""

    authority: trustme.CA

    async def begin(self, stream: trio.SocketStream, onward: trio.SocketStream) -> bool:
        hello = await peek_client_hello(stream.socket)
        shown, asked = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        host = str(onward.socket.getpeername()[0])
        self.authority.issue_cert(host).configure_cert(shown)
        asked.check_hostname, asked.verify_mode = False, ssl.CERT_NONE
        for context in (shown, asked):
            context.set_alpn_protocols(list(hello.alpn))
        inner = trio.SSLStream(stream, shown, server_side=True, https_compatible=True)
        outer = trio.SSLStream(onward, asked, server_hostname=host, https_compatible=True)
        try:
            await inner.do_handshake()
            await outer.do_handshake()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pass_on, inner, outer)
                nursery.start_soon(pass_on, outer, inner)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            # Whoever does not trust the authority hangs up.
            pass
        return False


async def pass_on(source: trio.SSLStream[trio.SocketStream], target: trio.SSLStream[trio.SocketStream]) -> None:
    """One direction, to its end; then both are closed."""
    while data := await source.receive_some(65536):
        await target.send_all(data)
    await target.aclose()


def server_of(port: int, credentials: str, option: str) -> ProxyServer:
    if option == "inspect":
        return Inspecting(port, credentials)
    if not option:
        return ProxyServer(port, credentials)
    made = Resigning(port, credentials)
    made.authority = trustme.CA(organization_name="A company that reads along")
    made.authority.cert_pem.write_to_path(option.removeprefix("resign="))
    return made


async def main(port: int, credentials: str, option: str) -> None:
    """Serve until killed."""
    server = server_of(port, credentials, option)
    await trio.serve_tcp(server.serve, port, host=None)


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]), sys.argv[2], "".join(sys.argv[3:]))
