"""IPv6 between stateful firewalls: every pair is punched, over TCP and UDP, where IPv4 has only the relay."""

from __future__ import annotations

import random
import sys
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import lab as laboratory
import matrix

WHY_NOT = laboratory.why_not()
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.soak, pytest.mark.timeout(600)]

# Whom a firewall lets in: who was written to at that port, or any port of whoever was written to.
FILTERING = ("port", "address")
PATHS = {"tcp": "punched tcp", "quic": "quic quic"}


def boxes(site: str, filtering: str, crossing: bool) -> list[dict[str, Any]]:
    """A box that maps IPv4 symmetrically, so that nothing is punched there, and filters IPv6 as it is told."""
    return [{**matrix.boxes(site, "symmetric")[0], "filtering": filtering, "crossing": crossing}]


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
            await lab.start()
            try:
                content = random.Random(name).randbytes(2_000_000)
                (lab.sites["a"].root / name).write_bytes(content)
                # Slow enough for the path that was looked for to take over from the relay's tunnel.
                task_id = await lab.submit("a", "b", name, towpath_bandwidth_limit=300_000)
                task = await lab.finished(task_id)
                assert task["status"] == "SUCCEEDED", task
                assert (lab.sites["b"].root / name).read_bytes() == content
                path = lab.path_of("b", task_id)
            finally:
                await lab.stop()
            print(f"{' ↔ '.join(pair):20} {path}")
            if not path.startswith(f"{PATHS[transport]} [2001:db8:1::10]"):
                wrong.append(f"{name}: {path}")
    assert not wrong, wrong
