"""A long, lossy path between two network namespaces, for benchmarks. Needs root, /dev/net/tun and the program ip.

Two TUN devices are joined by a process that limits the rate, loses packets, queues what fits in one bandwidth-delay
product and delays everything by half the round-trip time each way. No netem is needed; no packet leaves the machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 1, 0x1000
_CLONE_NEWNET = 0x40000000
ADDRESSES = ("10.98.0.1", "10.98.0.2")
# A queue holds this much in any case (bytes).
LEAST_QUEUE = 64 * 1024


def why_not() -> str:
    """Why there can be no such path here; empty when there can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the program ip is missing (Debian: iproute2)"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun is missing"
    return ""


@dataclass(frozen=True)
class Shape:
    """What the path is like: round-trip time in seconds, rate in bits a second, and the part of packets that is lost in
    either direction."""

    rtt: float
    rate: float
    loss: float


# --- the process that carries packets ------------------------------------------------------------------------


class _Direction:
    """One way: a queue in front of a link of a certain rate, then a delay."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self._byte_time = 8 / shape.rate
        self._delay = shape.rtt / 2
        self._loss = shape.loss
        self._most = max(LEAST_QUEUE, shape.rate * shape.rtt / 8) * self._byte_time
        self._free = 0.0
        self._random = random.Random(seed).random
        self.waiting: deque[tuple[float, bytes]] = deque()
        self.lost = self.full = 0

    def take(self, packet: bytes, now: float) -> None:
        if self._loss and self._random() < self._loss:
            self.lost += 1
            return
        start = max(self._free, now)
        if start - now > self._most:
            self.full += 1
            return
        self._free = start + len(packet) * self._byte_time
        self.waiting.append((self._free + self._delay, packet))


def carry(names: list[str], shape: Shape) -> None:
    """Open both devices, say ``ready`` and carry packets until standard input ends."""
    devices = [_open_tun(name) for name in names]
    print("ready", flush=True)
    ways = [_Direction(shape, seed) for seed in (1, 2)]
    while True:
        dues = [way.waiting[0][0] for way in ways if way.waiting]
        patience = max(0.0, min(dues) - time.monotonic()) if dues else None
        readable, _, _ = select.select([*devices, 0], [], [], patience)
        if 0 in readable and not os.read(0, 4096):
            print(f"lost {sum(way.lost for way in ways)}, queue full {sum(way.full for way in ways)}", file=sys.stderr)
            return
        for here, there in ((0, 1), (1, 0)):
            way = ways[here]
            if devices[here] in readable:
                now = time.monotonic()
                # A device that has gone for good says so too.
                with contextlib.suppress(OSError):
                    for _ in range(64):
                        way.take(os.read(devices[here], 65536), now)
            now = time.monotonic()
            while way.waiting and way.waiting[0][0] <= now:
                # A device that is down or full loses packets, as any network does.
                with contextlib.suppress(OSError):
                    os.write(devices[there], way.waiting[0][1])
                way.waiting.popleft()


def _open_tun(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return descriptor


# --- namespaces ----------------------------------------------------------------------------------------------


def namespace(side: int) -> str:
    """Name of a namespace of this process."""
    return f"towpath-wan-{os.getpid()}-{side}"


@contextlib.contextmanager
def long_path(shape: Shape, congestion_control: str) -> Iterator[None]:
    """Both namespaces, joined by the path; ``ADDRESSES`` are their ends. Programs that choose no congestion control of
    their own get the given one. Everything is removed afterwards."""
    names = [f"twan{os.getpid() % 100000}{side}" for side in "ab"]
    arguments = [str(shape.rtt), str(shape.rate), str(shape.loss)]
    carrier = subprocess.Popen(
        [sys.executable, str(Path(__file__)), *names, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert carrier.stdout is not None
        if carrier.stdout.readline().strip() != b"ready":
            raise RuntimeError("the TUN devices could not be opened")
        for side, name in enumerate(names):
            _ip("netns", "add", namespace(side))
            # What `ip netns exec` puts in the place of the system's: some programs want a name for every address.
            hosts = _etc(side) / "hosts"
            hosts.parent.mkdir(parents=True, exist_ok=True)
            near = f"{ADDRESSES[side]} {socket.gethostname()} here\n{ADDRESSES[1 - side]} there\n"
            hosts.write_text("127.0.0.1 localhost\n" + near)
            _ip("link", "set", name, "netns", namespace(side))
            inside = ["-n", namespace(side)]
            _ip(*inside, "addr", "add", f"{ADDRESSES[side]}/32", "peer", ADDRESSES[1 - side], "dev", name)
            _ip(*inside, "link", "set", name, "mtu", "1500", "txqueuelen", "4000", "up")
            _ip(*inside, "link", "set", "lo", "up")
            for key, value in (
                ("tcp_no_metrics_save", "1"),
                ("tcp_congestion_control", congestion_control),
                # Room for the bandwidth-delay product, as administrators of such machines set it.
                ("tcp_rmem", "4096 131072 67108864"),
                ("tcp_wmem", "4096 131072 67108864"),
            ):
                within(side, partial(Path(f"/proc/sys/net/ipv4/{key}").write_text, value))
        yield
    finally:
        for side in (0, 1):
            subprocess.run(["ip", "netns", "del", namespace(side)], capture_output=True, check=False)
            shutil.rmtree(_etc(side), ignore_errors=True)
        carrier.communicate(timeout=10)


def _etc(side: int) -> Path:
    return Path("/etc/netns") / namespace(side)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def enter(side: int) -> None:
    """Have the calling thread (and what it starts) use a namespace's network from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/run/netns/{namespace(side)}").open() as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


def within(side: int, work: Callable[[], object]) -> None:
    """Do something in a namespace, from a thread of its own."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            enter(side)
            work()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


if __name__ == "__main__":
    carry(sys.argv[1:3], Shape(*(float(argument) for argument in sys.argv[3:6])))
