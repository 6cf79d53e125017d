"""The least a checked, encrypted transfer can cost in Python: one TLS 1.3 connection between two processes, file to
file, each MiB digested (BLAKE3) at both ends. No requests, no resume, no metadata, no sync: a ceiling, not a system.

    python benchmarks/lane_reference.py SOURCE DESTINATION

Prints seconds and CPU-seconds of both ends as JSON. The engine is held against it.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import ssl
import sys
import time
from pathlib import Path

from blake3 import blake3

from agent.connect.tls import session_context
from protocol.identity import NodeKey

BLOCK = 1024 * 1024


def send(sock: ssl.SSLSocket, source: Path) -> None:
    buffer = memoryview(bytearray(BLOCK))
    with source.open("rb", buffering=0) as file:
        offset = 0
        while count := os.preadv(file.fileno(), [buffer], offset):
            sock.sendall(blake3(buffer[:count]).digest())
            sock.sendall(buffer[:count])
            offset += count


def receive(sock: ssl.SSLSocket, destination: Path, size: int) -> None:
    buffer = memoryview(bytearray(32 + BLOCK))
    descriptor = os.open(destination, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    offset = 0
    while offset < size:
        length = 32 + min(BLOCK, size - offset)
        got = 0
        while got < length:
            got += sock.recv_into(buffer[got:length]) or sys.exit("the sender closed early")
        if blake3(buffer[32:length]).digest() != bytes(buffer[:32]):
            sys.exit("a block does not match its digest")
        os.pwrite(descriptor, buffer[32:length], offset)
        offset += length - 32
    os.close(descriptor)


def run(source: Path, destination: Path) -> dict[str, float]:
    """One run; the sender is a child of this process."""
    ours, theirs = NodeKey.generate(), NodeKey.generate()
    size = source.stat().st_size
    with socket.create_server(("127.0.0.1", 0)) as server:
        child = os.fork()
        if child == 0:
            accepted, _ = server.accept()
            context = session_context(theirs, ours.certificate_pem, server_side=True, alpn="reference")
            with context.wrap_socket(accepted, server_side=True) as secured:
                send(secured, source)
                secured.recv(1)
            os._exit(0)
        before = resource.getrusage(resource.RUSAGE_SELF)
        context = session_context(ours, theirs.certificate_pem, server_side=False, alpn="reference")
        with context.wrap_socket(socket.create_connection(server.getsockname())) as secured:
            started = time.monotonic()
            receive(secured, destination, size)
            seconds = time.monotonic() - started
            secured.sendall(b".")
    _, status, child_usage = os.wait4(child, 0)
    if status:
        sys.exit("the sender failed")
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu": cpu + child_usage.ru_utime + child_usage.ru_stime}


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), Path(sys.argv[2]))))
