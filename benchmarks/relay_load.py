"""A relay under load: many agents' links, calls through them, a restart, and tunnels beside.

    python benchmarks/relay_load.py [--links 18000] [--tunnels 200] [--seconds 10]

Starts a real relay process with as many enrolled nodes, one process with the ends of 200 agents that are called
(`agent.link.Link` as an agent runs it, with a small application behind), and two with the ends of all others
(`light_agents`: real links, made as cheaply as they can be, so that the load does not take the relay's share of the
processor). Prints: time until all are linked, the relay's memory for each link, calls a second through links, time
until all are back after kill -9 and a new start, and how long API requests take with and without tunnels moving bytes.
Everything on loopback; both sides share this machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import hashlib
import math
import multiprocessing
import os
import random
import signal
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, MutableMapping
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import httpx
import psutil
import trio
from sqlalchemy import Connection, insert

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from light_agents import NO_TASKS, hold

from agent.connect import link_connection
from agent.connect.relay_way import tls_context
from agent.connect.tunnel import dial_plain, open_tunnel, tunnel_context
from agent.demo.free_port import free_port
from agent.link import Link
from protocol.identity import NodeKey
from protocol.link import HelloFields
from relay.auth.clients import add_client, new_digest
from relay.auth.identities import add_identity
from relay.auth.scopes import TRANSFER_ALL, TRANSFER_SERVER
from relay.auth.tokens import issue, open_session
from relay.initialise import initialise
from relay.settings import load
from relay.store import transfer_tables as tables
from relay.store.database import Store
from relay.store.migrate import upgrade

CALLED = 200
# Long enough for every link to have been pinged.
IDLE_SECONDS = 30.0
LISTING = b'{"path":"/","absolute_path":"/","entries":[],"total":0}'


# --- the agents' ends ----------------------------------------------------------------------------------------


async def application(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
    """What a linked agent answers: an endless event stream, an empty directory, nothing else."""
    path = scope["path"]
    if path == "/link/events":
        headers = [(b"content-type", b"application/x-ndjson")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        await trio.sleep_forever()
    body = LISTING if path.endswith("/ls") else NO_TASKS if path == "/link/task-list" else b""
    await send({"type": "http.response.start", "status": 200 if body else 204, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def hold_links(
    rows: list[tuple[str, str, bytes]], port: int, ca: str, relay_id: str, root: str, up: Synchronized[int]
) -> None:
    """Be these agents until the process ends; ``up`` counts those that are linked."""
    # The same contexts for all: real agents have their own, in processes of their own.
    vars(link_connection)["tls_context"] = functools.cache(tls_context)
    links: list[Link] = []
    async with trio.open_nursery() as nursery:
        for number, (node_id, endpoint_id, key) in enumerate(rows):
            identity = NodeKey.from_pem(key)
            link = Link(
                f"https://localhost:{port}",
                ca,
                identity,
                node_id,
                endpoint_id,
                relay_id,
                root,
                application,
                lambda: HelloFields(version="load", tasks=0),
            )
            links.append(link)
            nursery.start_soon(link.run)
            if number % 50 == 0:
                await trio.sleep(0.02)
        while True:
            await trio.sleep(0.25)
            up.value = sum(link.statistics().connected for link in links)


def agents(*arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import logging

    logging.disable(logging.CRITICAL)
    trio.run(hold_links, *arguments)


# --- the relay -----------------------------------------------------------------------------------------------


class RelayUnderLoad:
    """A relay's directory, its enrolled nodes, and its process."""

    def __init__(self, directory: Path, links: int) -> None:
        self.port = free_port()
        self.directory = directory
        initialise(directory, host="127.0.0.1", port=self.port, url=f"https://localhost:{self.port}", name="load")
        self.settings = load(directory / "relay.yaml")
        self.ca = (directory / "tls" / "ca.pem").read_text()
        self.rows: list[tuple[str, str, bytes]] = []
        self.collections: list[str] = []
        self.token = ""
        self.owner = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._fill(links)

    def _fill(self, links: int) -> None:
        store = Store(self.settings.database_url)
        upgrade(store.writing_engine)
        now = time.time()
        with store.writing_engine.begin() as connection:
            owner = add_identity(connection, username="load@example.org", now=now, provider_id="p")
            self.owner = owner.id
            client, _ = add_client(connection, name="load", now=now, digest=new_digest()[1])
            session = open_session(connection, identity_id=owner.id, client_id=client.id, now=now)
            issued = issue(
                connection,
                session_id=session,
                identity_id=owner.id,
                client_id=client.id,
                scopes={TRANSFER_SERVER: [TRANSFER_ALL]},
                now=now,
                access_life=self.settings.sign_in.access_token_life,
                refresh_life=None,
            )
            self.token = issued[0].access_token
            self._enrol(connection, links, owner.id, now)
            for node_id, endpoint_id, _ in self.rows[:CALLED]:
                self.collections.append(str(uuid.uuid4()))
                connection.execute(
                    insert(tables.collections).values(
                        **collection_values(),
                        id=self.collections[-1],
                        owner_id=owner.id,
                        created=now,
                        endpoint_id=endpoint_id,
                        node_id=node_id,
                    )
                )
        store.close()

    def _enrol(self, connection: Connection, links: int, owner_id: str, now: float) -> None:
        nodes, endpoints = [], []
        for _ in range(links):
            key = NodeKey.generate()
            node_id, endpoint_id = str(uuid.uuid4()), str(uuid.uuid4())
            self.rows.append((node_id, endpoint_id, key.private_key_pem))
            endpoints.append({"id": endpoint_id, "owner_id": owner_id, "created": now})
            nodes.append(
                {
                    "id": node_id,
                    "endpoint_id": endpoint_id,
                    "certificate": key.certificate_pem,
                    "fingerprint": key.fingerprint,
                    "hostname": "load",
                    "version": "",
                    "created": now,
                    "journal": "",
                    "last_event": 0,
                    "paused": False,
                }
            )
        connection.execute(insert(tables.endpoints), endpoints)
        connection.execute(insert(tables.nodes), nodes)

    def start(self) -> None:
        log = (self.directory / "log").open("ab")
        size = log.tell()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "relay.cli", "--config", str(self.directory / "relay.yaml"), "serve"], stderr=log
        )
        while b"Ready:" not in (self.directory / "log").read_bytes()[size:]:
            assert self._process.poll() is None, (self.directory / "log").read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def process(self) -> psutil.Process:
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def memory(self) -> float:
        """MiB of the relay's own process."""
        return float(self.process().memory_info().rss) / 2**20

    def cpu(self) -> float:
        """CPU seconds of the relay's own process so far."""
        times = self.process().cpu_times()
        return float(times.user + times.system)

    def certificate(self) -> str:
        """What the relay's port shows (PEM)."""
        text = (self.directory / "tls" / "server.pem").read_text()
        return text[text.index("-----BEGIN CERTIFICATE") :].partition("-----END CERTIFICATE-----")[0] + (
            "-----END CERTIFICATE-----\n"
        )

    def http(self) -> httpx.AsyncClient:
        context = ssl.create_default_context(cadata=self.ca)
        return httpx.AsyncClient(
            base_url=f"https://localhost:{self.port}",
            verify=context,
            timeout=60,
            headers={"Authorization": f"Bearer {self.token}"},
            limits=httpx.Limits(max_connections=64),
        )


def collection_values() -> dict[str, Any]:
    """What a collection needs beside its ids."""
    values: dict[str, Any] = {}
    for column in tables.collections.columns:
        if column.nullable or column.name in ("id", "owner_id", "created"):
            continue
        kind = column.type.python_type
        values[column.name] = {str: "load", bool: False, int: 0, float: 0.0}[kind]
    return values | {"available": True}


# --- measuring -----------------------------------------------------------------------------------------------


def wait_for(counts: list[Synchronized[int]], wanted: int, what: str, patience: float) -> float:
    started = time.monotonic()
    shown = 0.0
    while (up := sum(count.value for count in counts)) < wanted:
        if time.monotonic() - started > patience:
            print(f"{what}: only {up} of {wanted} after {patience:.0f} s")
            return time.monotonic() - started
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            print(f"  … {up} linked", flush=True)
        time.sleep(0.1)
    return time.monotonic() - started


def settle(relay: RelayUnderLoad) -> float:
    """Wait until the relay has done what new links give it to do: its use of the processor has come to rest."""
    started = time.monotonic()
    last = math.inf
    while time.monotonic() - started < 120:
        before = relay.cpu()
        time.sleep(3)
        used = relay.cpu() - before
        if used > 0.7 * last:
            break
        last = used
    return time.monotonic() - started


async def requests(relay: RelayUnderLoad, seconds: float, at_once: int) -> tuple[float, list[float]]:
    """Directory listings of random agents: how many a second, and how long each took (ms)."""
    taken: list[float] = []
    errors = 0
    chance = random.Random(1)
    async with relay.http() as http:
        end = time.monotonic() + seconds

        async def worker() -> None:
            nonlocal errors
            while time.monotonic() < end:
                collection = chance.choice(relay.collections)
                begun = time.monotonic()
                answer = await http.get(f"/v0.10/operation/endpoint/{collection}/ls", params={"path": "/"})
                if answer.status_code == 200:
                    taken.append((time.monotonic() - begun) * 1000)
                else:
                    errors += 1
                    if errors == 1:
                        print(answer.status_code, answer.text[:300])

        begun = time.monotonic()
        await asyncio.gather(*[worker() for _ in range(at_once)])
        return len(taken) / (time.monotonic() - begun), taken


def show(name: str, rate: float, taken: list[float]) -> None:
    taken.sort()
    middle, late = statistics.median(taken), taken[int(len(taken) * 0.99)]
    print(f"{name:36s} {rate:7.0f} a second, median {middle:.1f} ms, 99 % under {late:.1f} ms")


async def busy_tunnels(relay: RelayUnderLoad, number: int, during: Callable[[], None]) -> None:
    """So many tunnels whose sources send as fast as they can while ``during`` runs in a thread."""
    context = tunnel_context(relay.ca)
    moved = 0
    async with trio.open_nursery() as nursery:
        limiter = trio.CapacityLimiter(20)

        async def side(token: str, *, sends: bool) -> None:
            nonlocal moved
            async with limiter if sends else contextlib.nullcontext():
                sock = await open_tunnel(dial_plain, "localhost", relay.port, context, token)
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
            async with stream:
                while True:
                    if sends:
                        await stream.send_all(bytes(256 * 1024))
                    else:
                        moved += len(await stream.receive_some(1 << 20))

        for tokens in tunnel_tokens(relay, number):
            nursery.start_soon(lambda token: side(token, sends=True), tokens[0])
            nursery.start_soon(lambda token: side(token, sends=False), tokens[1])
            await trio.sleep(0.02)
        await trio.sleep(2)
        begun, before = time.monotonic(), moved
        await trio.to_thread.run_sync(during)
        print(f"{'':36s} {(moved - before) / (time.monotonic() - begun) / 1e6:7.0f} MB/s moved meanwhile")
        nursery.cancel_scope.cancel()


def tunnel_tokens(relay: RelayUnderLoad, number: int) -> list[tuple[str, str]]:
    """Halves signed with the relay's own key. The relay's process name is in its log."""
    from protocol.tunnel.token import LIFE, Half, sign_half
    from relay.keys import RelayKeys

    keys = RelayKeys(relay.directory / "keys")
    node = next(
        line.rsplit(" ", 1)[1]
        for line in reversed((relay.directory / "log").read_text().splitlines())
        if "tunnel processes of relay node" in line
    ).rstrip(".")
    found = []
    for count in range(number):
        now = time.time()
        # Ten sessions of every user.
        common = {
            "relay_node": node,
            "pair_id": str(uuid.uuid4()),
            "session_id": str(uuid.uuid4()),
            "user": f"user{count // 10}",
            "issued": now,
            "expires": now + LIFE,
        }
        halves = [Half(side=side, **common) for side in ("source", "destination")]  # type: ignore[arg-type]
        found.append((sign_half(keys.signer, halves[0]), sign_half(keys.signer, halves[1])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", type=int, default=18_000)
    parser.add_argument("--tunnels", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--away", type=float, default=0.0, help="seconds between kill and start")
    parser.add_argument("--patience", type=float, default=180.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="towpath-load-") as name:
        print(f"Enrolling {arguments.links} nodes …", flush=True)
        relay = RelayUnderLoad(Path(name) / "relay", arguments.links)
        relay.start()
        run(relay, arguments)


def run(relay: RelayUnderLoad, arguments: argparse.Namespace) -> None:
    base = relay.memory()
    context = multiprocessing.get_context("spawn")
    channel = hashlib.sha256(ssl.PEM_cert_to_DER_cert(relay.certificate())).hexdigest()
    relay_id = (relay.directory / "keys" / "relay-id").read_text().strip()
    root = (relay.directory / "keys" / "root-public.pem").read_text()
    counts = [context.Value("i", 0) for _ in range(3)]
    spending = [context.Value("d", 0.0) for _ in range(2)]
    real, light = relay.rows[:CALLED], relay.rows[CALLED:]
    holders = [context.Process(target=agents, args=(real, relay.port, relay.ca, relay_id, root, counts[0]))]
    for part in range(2):
        if rows := light[part::2]:
            holders.append(
                context.Process(target=hold, args=(rows, relay.port, channel, counts[1 + part], spending[part]))
            )
    try:
        started_with = relay.cpu()
        for holder in holders:
            holder.start()
        seconds = wait_for(counts, arguments.links, "linking", arguments.patience)
        linked = sum(count.value for count in counts)
        light_spent = sum(value.value for value in spending)
        spent = relay.cpu() - started_with
        print(f"{'linked':36s} {linked:7d} in {seconds:.1f} s, relay CPU {spent * 1000 / max(linked, 1):.1f} ms a link")
        print(f"{'the load itself':36s} {light_spent * 1000 / max(len(light), 1):7.1f} ms CPU a link")
        settled = settle(relay)
        print(
            f"{'everything stored and quiet':36s} {settled:7.1f} s later, relay CPU until then "
            f"{(relay.cpu() - started_with) * 1000 / max(linked, 1):.1f} ms a link"
        )
        each = (relay.memory() - base) * 1024 / max(linked, 1)
        print(f"{'relay memory':36s} {relay.memory():7.0f} MiB, {base:.0f} before: {each:.0f} KiB a link")
        use_links(relay, arguments)
        restart(relay, counts, arguments)
    finally:
        for holder in holders:
            holder.kill()
            holder.join()
        relay.kill()


def use_links(relay: RelayUnderLoad, arguments: argparse.Namespace) -> None:
    """What links cost that are idle, and how long calls take through them, alone and beside tunnels."""
    before = relay.cpu()
    time.sleep(IDLE_SECONDS)
    idle = (relay.cpu() - before) / IDLE_SECONDS * 100
    print(f"{'relay CPU with all links idle':36s} {idle:7.1f} % of a core")
    show("calls through links, 32 at once", *asyncio.run(requests(relay, arguments.seconds, 32)))
    show("calls through links, one at a time", *asyncio.run(requests(relay, arguments.seconds / 2, 1)))
    if arguments.tunnels:

        def during() -> None:
            show("the same beside tunnels", *asyncio.run(requests(relay, arguments.seconds / 2, 1)))

        trio.run(busy_tunnels, relay, arguments.tunnels, during)


def restart(relay: RelayUnderLoad, counts: list[Synchronized[int]], arguments: argparse.Namespace) -> None:
    """How long it takes until all links are back after a kill."""
    linked = sum(count.value for count in counts)
    relay.kill()
    while sum(count.value for count in counts) > linked // 100:
        time.sleep(0.05)
    time.sleep(arguments.away)
    started = time.monotonic()
    relay.start()
    print(f"{'killed and started again':36s} {time.monotonic() - started:7.1f} s until it was ready", flush=True)
    seconds = wait_for(counts, linked, "coming back", arguments.patience)
    spent = relay.cpu() * 1000 / max(linked, 1)
    print(
        f"{'all back after a start':36s} {seconds:7.1f} s, relay CPU {spent:.1f} ms a link, "
        f"memory {relay.memory():.0f} MiB"
    )


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent.parent)
    main()
