"""The least a checked, encrypted transfer can cost in Python: one TLS 1.3 connection between two processes, file to
file, each MiB digested (BLAKE3) at both ends. No requests, no resume, no metadata, no sync: a ceiling, not a system.

    python benchmarks/lane_reference.py SOURCE DESTINATION [--ssl]

Prints seconds and CPU-seconds of both ends as JSON. The engine is held against it. Its TLS is that of the lanes;
with ``--ssl`` it is that of Python's `ssl`, to see what the one is worth against the other.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import ssl
import sys
import time
from pathlib import Path

from blake3 import blake3

from agent.connect.lane_tls import SecuredLane, secure_lane
from agent.connect.tls import session_context
from protocol.identity import NodeKey

BLOCK = 1024 * 1024


def secured(
    sock: socket.socket, own: NodeKey, peer: NodeKey, *, server: bool, plain_ssl: bool
) -> SecuredLane | ssl.SSLSocket:
    if plain_ssl:
        context = session_context(own, peer.certificate_pem, server_side=server, alpn=("reference",))
        return context.wrap_socket(sock, server_side=server)
    name = None if server else "reference"
    return secure_lane(sock, own, peer.certificate_pem, server_name=name, alpn="reference")


def send(sock: SecuredLane | ssl.SSLSocket, source: Path) -> None:
    buffer = memoryview(bytearray(BLOCK))
    with source.open("rb", buffering=0) as file:
        offset = 0
        while count := os.preadv(file.fileno(), [buffer], offset):
            sock.sendall(blake3(buffer[:count]).digest())
            sock.sendall(buffer[:count])
            offset += count


def receive(sock: SecuredLane | ssl.SSLSocket, destination: Path, size: int) -> None:
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


def run(source: Path, destination: Path, *, plain_ssl: bool = False) -> dict[str, float]:
    """One run; the sender is a child of this process."""
    ours, theirs = NodeKey.generate(), NodeKey.generate()
    size = source.stat().st_size
    with socket.create_server(("127.0.0.1", 0)) as server:
        child = os.fork()
        if child == 0:
            accepted, _ = server.accept()
            lane = secured(accepted, theirs, ours, server=True, plain_ssl=plain_ssl)
            send(lane, source)
            lane.recv(1)
            os._exit(0)
        before = resource.getrusage(resource.RUSAGE_SELF)
        dialled = socket.create_connection(server.getsockname())
        lane = secured(dialled, ours, theirs, server=False, plain_ssl=plain_ssl)
        started = time.monotonic()
        receive(lane, destination, size)
        seconds = time.monotonic() - started
        lane.sendall(b".")
        lane.close()
    _, status, child_usage = os.wait4(child, 0)
    if status:
        sys.exit("the sender failed")
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu": cpu + child_usage.ru_utime + child_usage.ru_stime}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--ssl", action="store_true")
    options = parser.parse_args()
    print(json.dumps(run(options.source, options.destination, plain_ssl=options.ssl)))
