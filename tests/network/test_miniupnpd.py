"""The port mapper against miniupnpd, as most home routers run it: granted, used from outside, renewed, given back.

Three network namespaces: a home, its router (nftables, masquerading), and somebody outside. Needs root, ip, nft and
miniupnpd (Debian: nftables, miniupnpd-nftables).
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

sys.path.insert(0, str(Path(__file__).parent))

import lab as laboratory

from agent.connect import port_control
from agent.connect.listener import DataPort, bind
from agent.connect.network import Network
from agent.connect.portmap import PortMapping
from protocol.errors import ProtocolError

LAN, HOME = "192.168.7.1", "192.168.7.10"
# miniupnpd takes addresses that are reserved for documentation for private ones.
WAN, OUTSIDE = "9.80.70.1", "9.80.70.9"
LIFE = 6
# What is asked before each of the three.
BETTER = {"PCP": (), "NAT-PMP": ("_pcp",), "UPnP": ("_pcp", "_nat_pmp")}
RULES = """
table inet towpath {
  chain forward { type filter hook forward priority 0; policy drop;
    ct state established,related accept; iifname "lan" accept; jump mapped; }
  chain mapped { }
  chain prerouting { type nat hook prerouting priority -100; jump redirected; }
  chain redirected { }
  chain postrouting { type nat hook postrouting priority 100; oifname "wan" masquerade; }
  chain returned { }
}
"""
CONFIGURATION = f"""
ext_ifname=wan
listening_ip=lan
http_port=5000
enable_natpmp=yes
enable_upnp=yes
secure_mode=yes
min_lifetime={LIFE}
system_uptime=yes
uuid=33333333-3333-4333-8333-333333333333
upnp_table_name=towpath
upnp_nat_table_name=towpath
upnp_forward_chain=mapped
upnp_nat_chain=redirected
upnp_nat_postrouting_chain=returned
allow 1024-65535 192.168.7.0/24 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
"""


def why_not() -> str:
    missing = laboratory.why_not()
    for name in ("nft", "miniupnpd"):
        if not missing and shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
            missing = f"the program {name} is not installed (Debian: nftables, miniupnpd-nftables)"
    return missing


WHY_NOT = why_not()
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.soak, pytest.mark.timeout(120)]


def run(*command: str, given: str | None = None) -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert not done.returncode, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


@dataclass
class Street:
    """The namespaces' names."""

    home: str
    router: str
    outside: str

    def rules(self) -> str:
        return run("ip", "netns", "exec", self.router, "nft", "list", "chain", "inet", "towpath", "redirected")

    def reaches(self, port: int) -> bool:
        """Whether somebody outside reaches a port of the router's."""

        def knock() -> bool:
            with suppress(OSError), socket.create_connection((WAN, port), timeout=1.0):
                return True
            return False

        return laboratory.inside(self.outside, knock)


@contextmanager
def street(directory: Path) -> Iterator[Street]:
    tag = f"twm{os.getpid() % 100_000}"
    made = Street(*(f"{tag}-{name}" for name in ("home", "router", "outside")))
    daemon: subprocess.Popen[bytes] | None = None
    try:
        for name in (made.home, made.router, made.outside):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        for other, inside, addresses in ((made.home, "lan", (LAN, HOME)), (made.outside, "wan", (WAN, OUTSIDE))):
            run("ip", "-n", made.router, "link", "add", inside, "type", "veth", "peer", "name", "line", "netns", other)
            for name, device, address in ((made.router, inside, addresses[0]), (other, "line", addresses[1])):
                run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", device)
                run("ip", "-n", name, "link", "set", device, "up")
        run("ip", "-n", made.home, "route", "add", "default", "via", LAN)
        within = ("ip", "netns", "exec", made.router)
        run(*within, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        run(*within, "nft", "-f", "-", given=RULES)
        (directory / "miniupnpd.conf").write_text(CONFIGURATION)
        command = [*within, "miniupnpd", "-d", "-f", str(directory / "miniupnpd.conf"), "-P", str(directory / "pid")]
        with (directory / "miniupnpd.log").open("wb") as log:
            daemon = subprocess.Popen(command, stdout=log, stderr=log)
        until = time.monotonic() + 10
        while "Listening for NAT-PMP/PCP" not in (directory / "miniupnpd.log").read_text():
            assert time.monotonic() < until, (directory / "miniupnpd.log").read_text()
            time.sleep(0.05)
        yield made
    finally:
        if daemon is not None:
            daemon.terminate()
            daemon.wait()
            print((directory / "miniupnpd.log").read_text()[-3000:])
        for name in (made.home, made.router, made.outside):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@dataclass
class Home:
    """The agent's part, in a thread whose network is the home's."""

    wanted: str
    place: str
    ready: threading.Event = field(default_factory=threading.Event)
    leave: threading.Event = field(default_factory=threading.Event)
    port: int = 0
    sentence: str = ""

    def live(self) -> None:
        laboratory.inside(self.place, lambda: trio.run(self._live))

    async def _live(self) -> None:
        async def deliver(_session_id: str, _kind: str, _sock: trio.socket.SocketType) -> None:
            await trio.lowlevel.checkpoint()

        network = Network(relay=None)
        network.data_port = DataPort(bind("0.0.0.0", 0), deliver)
        mapping = PortMapping(network, lambda: LAN)
        for way in BETTER[self.wanted]:
            setattr(mapping, way, _silent)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(network.data_port.serve)
            nursery.start_soon(mapping.run)
            with trio.move_on_after(15):
                while not network.mappings:
                    await trio.sleep(0.05)
            self.sentence = mapping.sentence
            self.port = network.mappings[0].port if network.mappings else 0
            self.ready.set()
            await trio.to_thread.run_sync(self.leave.wait)
            nursery.cancel_scope.cancel()


async def _silent(*_asked: object) -> None:
    raise ProtocolError("Not asked here.")


@pytest.mark.parametrize("protocol", list(BETTER))
def test_a_mapping_is_granted_used_renewed_and_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    monkeypatch.setattr(port_control, "LIFE", LIFE)
    monkeypatch.setattr(port_control, "SHORTEST", LIFE)
    with street(tmp_path) as made:
        home = Home(protocol, made.home)
        thread = threading.Thread(target=home.live)
        thread.start()
        try:
            assert home.ready.wait(30)
            assert f"({protocol})" in home.sentence
            assert WAN in home.sentence
            assert made.reaches(home.port)
            assert f"dport {home.port}" in made.rules()
            # Longer than it was granted for.
            until = time.monotonic() + 2.5 * LIFE
            while time.monotonic() < until:
                assert made.reaches(home.port)
                time.sleep(0.5)
        finally:
            home.leave.set()
            thread.join()
        assert f"dport {home.port}" not in made.rules()
        assert not made.reaches(home.port)
