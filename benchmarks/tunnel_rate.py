"""How fast the relay's tunnel is beside a direct lane, and what it costs the relay.

    python benchmarks/tunnel_rate.py [--size MiB] [--lanes N] [--runs N] [--websocket 0|1|2]

A sender and a receiver process with one blocking TLS 1.3 socket each (a lane as the transfer engine has it), memory to
memory, once directly over loopback and once through a relay's port and its moving process, with none, one or both of
the two legs inside WebSocket. Prints medians, the ratio, and CPU seconds per GiB of the relay's processes: the moving
one, and with WebSocket the carrying one. Both ends and the relay share this machine's cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import ssl
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.relay.tunnel_world import CA, LEAF, tunnel_world

PIECE = 1024 * 1024


def send(descriptor: int, size: int) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    LEAF.configure_cert(context)
    plain = socket.socket(fileno=descriptor)
    plain.setblocking(True)
    with context.wrap_socket(plain, server_side=True) as sock:
        sock.recv(1)
        piece = memoryview(bytes(PIECE))
        for _ in range(size // PIECE):
            sock.sendall(piece)
        sock.recv(1)


def receive(descriptor: int, size: int, answer: multiprocessing.SimpleQueue[float]) -> None:
    context = ssl.create_default_context(cadata=CA.cert_pem.bytes().decode())
    plain = socket.socket(fileno=descriptor)
    plain.setblocking(True)
    with context.wrap_socket(plain, server_hostname="localhost") as sock:
        view = memoryview(bytearray(PIECE))
        sock.send(b"g")
        started = time.perf_counter()
        left = size
        while left:
            left -= sock.recv_into(view[: min(PIECE, left)])
        answer.put(time.perf_counter() - started)
        sock.send(b"d")


def run_pairs(pairs: list[tuple[int, int]], size: int) -> float:
    """Seconds for all lanes together, each moving its share of ``size``."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    share = size // len(pairs) // PIECE * PIECE
    processes = [context.Process(target=send, args=(a, share)) for a, _ in pairs]
    processes += [context.Process(target=receive, args=(b, share, answers)) for _, b in pairs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return max(float(answers.get()) for _ in pairs)


def direct(size: int, lanes: int) -> float:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pairs = []
        for _ in range(lanes):
            one = socket.create_connection(listener.getsockname())
            other, _ = listener.accept()
            pairs.append((one.detach(), other.detach()))
    try:
        return run_pairs(pairs, size)
    finally:
        for pair in pairs:
            for descriptor in pair:
                socket.close(descriptor)


async def tunnelled(size: int, lanes: int, inside: int, proxied: bool) -> tuple[float, float, float]:
    async with tunnel_world(websocket=inside, handed_over=not proxied) as world:
        async with trio.open_nursery() as nursery:
            pairs: list[tuple[int, int]] = []
            done = trio.Event()

            async def enter() -> None:
                async with world.pair() as (a, b):
                    pairs.append((socket.dup(a.socket.fileno()), socket.dup(b.socket.fileno())))
                    if len(pairs) == lanes:
                        done.set()
                    await done.wait()

            for _ in range(lanes):
                nursery.start_soon(enter)
        await trio.sleep(1.2)
        # This process is the relay's own; while lanes run in others it does nothing else.
        before = world.service.statistics().cpu, world.relay.statistics().cpu + time.process_time()
        seconds = await trio.to_thread.run_sync(run_pairs, pairs, size)
        for pair in pairs:
            for descriptor in pair:
                socket.close(descriptor)
        await trio.sleep(1.5)
        moving, carrying = world.service.statistics().cpu, world.relay.statistics().cpu + time.process_time()
        return seconds, moving - before[0], carrying - before[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="MiB for each run")
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--websocket", type=int, default=0, choices=(0, 1, 2), help="legs inside WebSocket")
    parser.add_argument(
        "--proxied", action="store_true", help="as behind a reverse proxy: the relay carries them itself"
    )
    arguments = parser.parse_args()
    size = arguments.size * PIECE
    plain, through, cpu, carried = [], [], [], []
    for _ in range(arguments.runs):
        plain.append(size / direct(size, arguments.lanes) / 1e6)
        seconds, spent, carrying = trio.run(
            partial(tunnelled, size, arguments.lanes, arguments.websocket, arguments.proxied)
        )
        through.append(size / seconds / 1e6)
        cpu.append(spent / (size / 2**30))
        carried.append(carrying / (size / 2**30))
    fast, slow = statistics.median(plain), statistics.median(through)
    print(f"direct   {fast:7.0f} MB/s ({min(plain):.0f}-{max(plain):.0f}), {arguments.lanes} lane(s)")
    print(f"tunnel   {slow:7.0f} MB/s ({min(through):.0f}-{max(through):.0f})")
    print(f"ratio    {slow / fast:7.2f}")
    print(f"relay    {statistics.median(cpu):7.2f} CPU s/GiB in the moving process")
    if arguments.websocket:
        print(f"         {statistics.median(carried):7.2f} CPU s/GiB in what carries WebSocket")


if __name__ == "__main__":
    main()
