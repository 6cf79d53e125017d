"""IPv6: stateful firewalls are punched in every pair, and each pair gets what its two networks have in common."""

from __future__ import annotations

import random
import sys
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

import lab as laboratory
import matrix

from agent.config.layers import overlay_file

WHY_NOT = laboratory.why_not()
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.soak, pytest.mark.timeout(600)]

# Whom a firewall lets in: who was written to at that port, or any port of whoever was written to.
FILTERING = ("port", "address")
PATHS = {"tcp": ("punched tcp",), "quic": ("quic quic",)}
# Once both have punched, boxes that look at addresses alone also let in who dials the other's listening port: whichever
# SYN is first.
BY_ADDRESS = {"tcp": ("punched tcp", "direct tcp", "reversed tcp"), "quic": ("quic quic",)}


def boxes(site: str, filtering: str, crossing: bool) -> list[dict[str, Any]]:
    """A box that maps IPv4 symmetrically, so that nothing is punched there, and filters IPv6 as it is told."""
    return [{**matrix.boxes(site, "symmetric")[0], "filtering": filtering, "crossing": crossing}]


async def path_taken(lab: laboratory.Lab, name: str) -> str:
    """Move a file of this name from a to b with the lab as it is described, and tell which way it went in the end."""
    await lab.start()
    try:
        content = random.Random(name).randbytes(2_000_000)
        (lab.sites["a"].root / name).write_bytes(content)
        # Slow enough for the path that was looked for to take over from the relay's tunnel.
        task_id = await lab.submit("a", "b", name, towpath_bandwidth_limit=300_000)
        task = await lab.finished(task_id)
        assert task["status"] == "SUCCEEDED", task
        assert (lab.sites["b"].root / name).read_bytes() == content
        return lab.path_of("b", task_id)
    finally:
        await lab.stop()


@pytest.mark.parametrize("transport", ["tcp", "quic"])
async def test_every_pair_of_firewalls_is_punched(tmp_path: Path, transport: str) -> None:
    wrong = []
    async with laboratory.open_lab(tmp_path) as lab:
        for pair in combinations_with_replacement(FILTERING, 2):
            name = f"{transport}-{'-'.join(pair)}"
            # What is to go over UDP goes so by itself where crossing SYNs are dropped.
            chains = {site: boxes(site, kind, transport == "tcp") for site, kind in zip(("a", "b"), pair, strict=True)}
            for number, site in enumerate(("a", "b"), 1):
                addresses = [matrix.address(site, "symmetric"), f"2001:db8:{number}::10"]
                lab.sites[site].host.use(addresses, str(chains[site][0]["gateway"]))
            lab.emulator.use(lab.describe(chains))
            path = await path_taken(lab, name)
            print(f"{' ↔ '.join(pair):20} {path}")
            kinds = (BY_ADDRESS if set(pair) == {"address"} else PATHS)[transport]
            if not path.startswith(tuple(f"{kind} [2001:db8:1::10]" for kind in kinds)):
                wrong.append(f"{name}: {path}")
    assert not wrong, wrong


# Which protocols two sites have, and which one their path takes; none where it goes through the relay.
# Firewalls are stateful, and over IPv4 they are NATs that let in only whom they know.
MIXED = {
    ("v4", "v4"): "4",
    ("v4", "v6"): "",
    ("v4", "dual"): "4",
    ("v6", "v6"): "6",
    ("v6", "dual"): "6",
    ("dual", "dual"): "6",
}


def connect_site(lab: laboratory.Lab, site: str, protocols: str, firewalled: bool) -> list[dict[str, Any]]:
    """Give a site the addresses of its protocols, and a relay that it can reach; its boxes."""
    number = {"a": 1, "b": 2}[site]
    kind = "port" if firewalled else "none"
    addresses = {"v4": matrix.address(site, kind), "v6": f"2001:db8:{number}::10"}
    chain = matrix.boxes(site, kind)
    wanted = [addresses[name] for name in ("v4", "v6") if protocols in (name, "dual")]
    lab.sites[site].host.use(wanted, str(chain[0]["gateway"]) if chain else None)
    relay = f"[{laboratory.RELAY_ADDRESS_6}]" if protocols == "v6" else laboratory.RELAY_ADDRESS
    # What `towpath setup` wrote counts more than the owner's file.
    overlay = overlay_file(lab.sites[site].config_file)
    document = yaml.safe_load(overlay.read_text())
    document["relay"]["url"] = f"https://{relay}"
    overlay.write_text(yaml.safe_dump(document))
    return chain


@pytest.mark.parametrize("firewalled", [False, True], ids=["open", "firewalled"])
async def test_a_pair_gets_what_its_two_have_in_common(tmp_path: Path, firewalled: bool) -> None:
    """Over the protocol that both have, IPv6 before IPv4; through the relay where they have none."""
    wrong = []
    async with laboratory.open_lab(tmp_path, dual=True) as lab:
        for pair, version in MIXED.items():
            name = f"{'firewalled' if firewalled else 'open'}-{'-'.join(pair)}"
            chains = {
                site: connect_site(lab, site, protocols, firewalled)
                for site, protocols in zip(("a", "b"), pair, strict=True)
            }
            lab.emulator.use(lab.describe(chains))
            path = await path_taken(lab, name)
            print(f"{name:30} {path}")
            letter = "R" if not version else "P" if firewalled else "D"
            # Punched, both protocols are tried at once, and the first one is taken.
            found = "" if not version else "6" if "2001:db8:" in path else "4"
            either = firewalled and pair == ("dual", "dual")
            if not path.startswith(matrix.PATHS[letter]) or (found != version and not either):
                wrong.append(f"{name}: {path}")
    assert not wrong, wrong
