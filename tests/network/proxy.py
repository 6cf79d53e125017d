"""An HTTP proxy for the lab, in a namespace of its own process: ``python proxy.py PORT user:password [inspect]``.

With ``inspect`` it looks at what is sent through it, and lets pass only TLS greetings that name HTTP.
"""

from __future__ import annotations

import sys
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

from nat import is_https

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


async def main(port: int, credentials: str, inspect: bool) -> None:
    """Serve until killed."""
    server = (Inspecting if inspect else ProxyServer)(port, credentials)
    await trio.serve_tcp(server.serve, port, host=None)


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]), sys.argv[2], "inspect" in sys.argv[3:])
