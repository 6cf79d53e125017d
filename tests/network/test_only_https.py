"""Networks that let out nothing but real HTTPS, or nothing but what goes to an HTTP proxy; and one without IPv4."""

from __future__ import annotations

import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import yaml

sys.path.insert(0, str(Path(__file__).parent))

import lab as laboratory
import matrix
from test_matrix import arrange

from agent.demo.children import Child, ChildFailed, warden
from agent.identity_file import CA_FILE
from protocol.errors import TowpathError

WHY_NOT = laboratory.why_not()
# In the default run, tests/agent/test_relay_way.py stands for these.
pytestmark = [pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT), pytest.mark.soak, pytest.mark.timeout(170)]

SIZE = 600_000
PASSWORD = "user:swordfish"


async def moved(lab: laboratory.Lab, source: str, destination: str) -> str:
    """Transfer a new file; the path it took."""
    name = f"{source}-{destination}.bin"
    content = random.Random(name).randbytes(SIZE)
    (lab.sites[source].root / name).write_bytes(content)
    task_id = await lab.submit(source, destination, name)
    task = await lab.finished(task_id)
    assert task["status"] == "SUCCEEDED", task
    assert (lab.sites[destination].root / name).read_bytes() == content
    path = lab.path_of(destination, task_id)
    print(f"{source} → {destination}  {path}")
    return path


def configure(lab: laboratory.Lab, name: str, **relay: str) -> None:
    file = lab.sites[name].config_file
    document = yaml.safe_load(file.read_text())
    document["relay"] = (document.get("relay") or {}) | relay
    file.write_text(yaml.safe_dump(document))


@asynccontextmanager
async def proxy(lab: laboratory.Lab, *options: str) -> AsyncIterator[None]:
    """An HTTP proxy on the relay's machine, which ``a`` is told of."""
    command = [sys.executable, str(Path(__file__).parent / "proxy.py"), str(matrix.PROXY_PORT), PASSWORD, *options]
    command = ["ip", "netns", "exec", lab.relay_host.namespace, *command]
    configure(lab, "a", proxy=f"http://{PASSWORD}@{laboratory.RELAY_ADDRESS}:{matrix.PROXY_PORT}")
    async with warden() as guard:
        child = Child("proxy", command, {}, lab.directory / "proxy.log", guard)
        await child.start()
        try:
            yield
        finally:
            await child.stop()


async def test_only_real_https_gets_out(tmp_path: Path) -> None:
    async with laboratory.open_lab(tmp_path) as lab:
        arrange(lab, {"a": "https", "b": "none"})
        await lab.start()
        assert lab.sites["a"].status()["link"]["wrapping"] == "websocket"
        assert lab.sites["b"].status()["link"]["wrapping"] == "raw"
        path = await moved(lab, "b", "a")
        assert path.startswith("tunnel over WebSocket")


async def test_only_real_https_gets_out_of_both(tmp_path: Path) -> None:
    async with laboratory.open_lab(tmp_path) as lab:
        arrange(lab, {"a": "https", "b": "https"})
        await lab.start()
        for source, destination in (("a", "b"), ("b", "a")):
            assert (await moved(lab, source, destination)).startswith("tunnel over WebSocket")


@pytest.mark.parametrize("options", [(), ("inspect",)])
async def test_only_a_proxy_with_a_password_gets_out(tmp_path: Path, options: tuple[str, ...]) -> None:
    async with laboratory.open_lab(tmp_path) as lab, proxy(lab, *options):
        arrange(lab, {"a": "proxy", "b": "port"})
        await lab.start()
        wanted = "tunnel over WebSocket" if options else "tunnel tcp"
        for source, destination in (("a", "b"), ("b", "a")):
            path = await moved(lab, source, destination)
            assert path.startswith(wanted if destination == "a" else "tunnel")


@pytest.mark.parametrize("trusted", [False, True])
async def test_a_proxy_that_opens_encrypted_connections_is_named_and_learns_nothing(
    tmp_path: Path, trusted: bool
) -> None:
    """Where its authority is trusted, as on machines of companies, the relay's proof names another certificate."""
    authority = tmp_path / "authority.pem"
    async with laboratory.open_lab(tmp_path) as lab, proxy(lab, f"resign={authority}"):
        arrange(lab, {"a": "proxy", "b": "none"})
        site = lab.sites["a"]
        with trio.fail_after(20):
            while not authority.exists():
                await trio.sleep(0.05)
        if trusted:
            (site.state_dir / CA_FILE).write_bytes(authority.read_bytes())
        await site.child.start()
        with trio.fail_after(30):
            while True:
                try:
                    link = site.status()["link"]
                except TowpathError:
                    # It is starting.
                    link = {"last_error": ""}
                assert not link.get("connected")
                if "intercepts" in link["last_error"] or "opens encrypted connections" in link["last_error"]:
                    break
                await trio.sleep(0.1)
        print(link["last_error"])
        assert ("intercepts" in link["last_error"]) is trusted
        if not trusted:
            # The doctor fails, and says why.
            with pytest.raises(ChildFailed, match="opens encrypted connections"):
                await lab.doctor("a", "relay")
        document = await lab.call(lambda relay: relay.transfer.get_endpoint(site.collection_id).data)
        assert not document["gcp_connected"]


@pytest.mark.parametrize("kind", ["none", "firewall"])
async def test_without_ipv4(tmp_path: Path, kind: str) -> None:
    async with laboratory.open_lab(tmp_path, version=6) as lab:
        chains = {site: matrix.boxes(site, kind) for site in lab.sites}
        for number, site in enumerate(lab.sites.values(), 11):
            site.host.use([f"2001:db8::{number}"])
        lab.emulator.use(lab.describe(chains))
        await lab.start()
        for source, destination in (("a", "b"), ("b", "a")):
            path = await moved(lab, source, destination)
            assert path.startswith(("direct", "reversed") if kind == "none" else ("punched", "quic"))
            assert "2001:db8" in path
