"""What every pair of networks can have, as measured with plain sockets; the lab holds the agents to it.

``D`` direct TCP: somebody can be reached or has a port mapping. ``P`` punched, TCP and UDP both could. ``T`` punched,
TCP alone. ``R`` through the relay only. ``Q``: UDP alone could, over QUIC. ``E``: either; what lets in any port of an
address, or everybody, can simply be connected to, unless its own SYN comes in the way first. The relay listens on 443.
Kinds outside of the table: ``https``, which lets out only TLS that names HTTP, and ``proxy``, only an HTTP proxy.
"""

from __future__ import annotations

from typing import Any

TABLE = """
              none  firewall  cone  address  port  symmetric  mapped  double  no-udp  443  no-crossing
none          D     D         D     D        D     D          D       D       D       R    D
firewall      .     P         P     P        P     R          D       P       T       R    Q
cone          .     .         P     P        P     P          D       P       T       R    E
address       .     .         .     P        P     P          D       P       T       R    E
port          .     .         .     .        P     R          D       P       T       R    Q
symmetric     .     .         .     .        .     R          D       R       R       R    R
mapped        .     .         .     .        .     .          D       D       D       R    D
double        .     .         .     .        .     .          .       P       T       R    Q
no-udp        .     .         .     .        .     .          .       .       T       R    R
443           .     .         .     .        .     .          .       .       .       R    R
no-crossing   .     .         .     .        .     .          .       .       .       .    Q
"""

# Where the lab's HTTP proxy listens, beside the relay.
PROXY_PORT = 3128

# What `path` of a task may begin with, by the letter of the cell.
PATHS = {
    "D": ("direct", "reversed"),
    "P": ("punched",),
    "T": ("punched",),
    "R": ("tunnel",),
    "Q": ("quic",),
    "E": ("punched", "quic"),
}


def cells() -> dict[tuple[str, str], str]:
    """(kind of one site, kind of the other) → letter, each pair once."""
    lines = [line.split() for line in TABLE.strip().splitlines()]
    kinds = lines[0]
    found = {}
    for row in lines[1:]:
        for kind, letter in zip(kinds, row[1:], strict=True):
            if letter != ".":
                found[(row[0], kind)] = letter
    return found


def boxes(site: str, kind: str) -> list[dict[str, Any]]:
    """The middleboxes of a site (``a`` or ``b``), innermost first, as the emulator takes them."""
    number = {"a": 1, "b": 2}[site]
    nat = {"name": f"nat-{site}", "outside": f"203.0.113.{number}0", "gateway": f"192.168.{number}.1"}
    changes: dict[str, dict[str, Any]] = {
        "firewall": {"mapping": "none"},
        "cone": {"filtering": "none"},
        "address": {"filtering": "address"},
        "port": {},
        "symmetric": {"mapping": "symmetric"},
        "mapped": {"mapper": {"nat-pmp": True}},
        "no-udp": {"udp": False},
        "443": {"udp": False, "tcp_ports": [443]},
        "https": {"udp": False, "tcp_ports": [443], "inspects": True},
        "proxy": {"udp": False, "tcp_ports": [PROXY_PORT]},
        "no-crossing": {"crossing": False},
        "reset": {"resets": True},
    }
    if kind == "none":
        return []
    if kind == "double":
        inner = {**nat, "name": f"home-{site}", "outside": f"100.64.{number}.2"}
        return [inner, nat]
    return [{**nat, **changes[kind]}]


def address(site: str, kind: str) -> str:
    """The host's own address: public where nothing translates it."""
    number = {"a": 1, "b": 2}[site]
    return f"203.0.113.{number}1" if kind in ("none", "firewall") else f"192.168.{number}.10"
