"""A port for a server that will be stopped and started again."""

from __future__ import annotations

import random
import socket

# Below the range that Linux (32768), macOS and Windows (49152) take the ports of outgoing connections from: while such
# a server is away, no connection can sit on its port by chance.
LOWEST, HIGHEST = 20_000, 32_767
_ATTEMPTS = 200


def free_port(host: str = "127.0.0.1") -> int:
    """A port on which nobody listens at the moment, over TCP or UDP. Raises OSError when none is found."""
    # Drawn by the system's own chance: a test's seed must not give two processes the same port.
    chance = random.SystemRandom()
    for _ in range(_ATTEMPTS):
        port = chance.randint(LOWEST, HIGHEST)
        if all(_is_free(host, port, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)):
            return port
    raise OSError(f"No free port from {LOWEST} to {HIGHEST} was found on {host}.")


def _is_free(host: str, port: int, kind: socket.SocketKind) -> bool:
    with socket.socket(socket.AF_INET, kind) as sock:
        try:
            sock.bind((host, port))
        except OSError:
            return False
    return True
