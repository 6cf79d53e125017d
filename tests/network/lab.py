"""The lab: a relay and two agents, each in a network namespace, joined by the emulator. Needs root and /dev/net/tun."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import globus_sdk
import trio

from agent import local_socket
from agent.cli.profile import Profile
from agent.cli.relay_client import Relay
from agent.demo.children import Child, Warden, run_tool, warden
from agent.demo.world import clean_environment, program

RELAY_ADDRESS = "203.0.113.100"
RELAY_ADDRESS_6 = "2001:db8::100"
HERE = Path(__file__).parent
# One leg's delay, one way: 30 ms from an agent to the relay and back, 60 ms between two agents.
DELAY = 0.015
# The relay's own leg. As long as the agents' legs, it puts all three equally far from one another.
RELAY_DELAY = 0.0
READY = 40.0
TRANSFER = 60.0
_CLONE_NEWNET = 0x40000000

T = TypeVar("T")


def why_not() -> str:
    """Why the lab cannot be had here; empty when it can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "the network lab needs root"
    if shutil.which("ip") is None:
        return "the network lab needs the program ip (Debian: iproute2)"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "the network lab needs /dev/net/tun"
    name = f"twp-try-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "network namespaces cannot be made here"
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return ""


def inside(namespace: str, work: Callable[[], T]) -> T:
    """Run something in a thread of its own whose network is a namespace's."""
    answer: list[T] = []
    failure: list[BaseException] = []

    def enter() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            with open(f"/run/netns/{namespace}") as file:
                if libc.setns(file.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            answer.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return answer[0]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


@dataclass
class Host:
    """A namespace with one TUN device."""

    name: str
    namespace: str
    device: str
    addresses: list[str] = field(default_factory=list)

    def create(self) -> None:
        """Make the namespace; the device exists already, outside of it."""
        _run("ip", "netns", "add", self.namespace)
        _run("ip", "link", "set", self.device, "netns", self.namespace)
        _run("ip", "-n", self.namespace, "link", "set", "lo", "up")
        _run("ip", "-n", self.namespace, "link", "set", self.device, "mtu", "1500", "txqueuelen", "200", "up")

    def use(self, addresses: list[str], gateway: str | None = None) -> None:
        """Have these addresses and no others, with the default route through the device."""
        if addresses == self.addresses:
            return
        _run("ip", "-n", self.namespace, "addr", "flush", "dev", self.device)
        for address in addresses:
            nodad = ["nodad"] if ":" in address else []
            prefix = "/128" if ":" in address else "/32"
            _run("ip", "-n", self.namespace, "addr", "add", address + prefix, "dev", self.device, *nodad)
            family = "-6" if ":" in address else "-4"
            route = ["default", "dev", self.device]
            if gateway is not None and ":" not in address:
                _run("ip", family, "-n", self.namespace, "route", "replace", gateway, "dev", self.device)
                route = ["default", "via", gateway, "dev", self.device]
            _run("ip", family, "-n", self.namespace, "route", "replace", *route)
        self.addresses = addresses

    def remove(self) -> None:
        """Remove the namespace and all in it."""
        subprocess.run(["ip", "netns", "del", self.namespace], capture_output=True, check=False)


class Emulator:
    """The emulator's process. ``many``: packets of many segments, which it carries ten times as fast."""

    def __init__(self, devices: list[str], *, many: bool = False) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "emulator.py"), *(["--large"] if many else []), *devices],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._expect("ready")

    def _expect(self, word: str) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith(word):
            raise RuntimeError(f"the emulator said {line!r}")
        return line[len(word) :].strip()

    def use(self, description: Mapping[str, Any]) -> dict[str, dict[str, int]]:
        """A whole new network; returns what the last one dropped."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(description) + "\n")
        self.process.stdin.flush()
        found: dict[str, dict[str, int]] = json.loads(self._expect("ok"))
        return found

    def close(self) -> None:
        """End the process; the devices go with it."""
        self.process.terminate()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@dataclass
class Site:
    """One agent of the lab."""

    host: Host
    collection_id: str
    root: Path
    config_file: Path
    state_dir: Path
    child: Child

    def status(self) -> dict[str, Any]:
        """What `towpath status --format json` prints; a Unix socket knows no network namespaces."""
        return local_socket.ask(self.state_dir, "GET", "/status")


@dataclass
class Lab:
    """The running lab."""

    directory: Path
    emulator: Emulator
    relay_host: Host
    relay: Child
    sites: dict[str, Site]
    client: Relay
    networks: int = 0

    async def call(self, question: Callable[[Relay], T]) -> T:
        """Ask the relay from its own namespace."""
        return await trio.to_thread.run_sync(inside, self.relay_host.namespace, lambda: question(self.client))

    def describe(self, boxes: Mapping[str, list[dict[str, Any]]], **options: Any) -> dict[str, Any]:
        """The network in which each site is behind its boxes (innermost first)."""
        rows: dict[str, dict[str, Any]] = {}
        relay = self.relay_host
        hosts = [{"device": relay.device, "addresses": relay.addresses, "parent": None, "delay": RELAY_DELAY}]
        for name, site in self.sites.items():
            chain = [box["name"] for box in boxes[name]]
            for box, parent in zip(boxes[name], [*chain[1:], None][: len(chain)], strict=True):
                rows[box["name"]] = {**box, "parent": parent}
            hosts.append(
                {
                    "device": site.host.device,
                    "addresses": site.host.addresses,
                    "parent": chain[0] if chain else None,
                    "delay": DELAY,
                }
            )
        self.networks += 1
        return {"boxes": list(rows.values()), "hosts": hosts, "number": self.networks, **options}

    async def until_connected(self, name: str) -> None:
        """Wait until the agent is linked to the relay."""
        site = self.sites[name]
        with trio.move_on_after(READY):
            while True:
                site.child.raise_if_ended()
                try:
                    document = await self.call(lambda relay: relay.transfer.get_endpoint(site.collection_id).data)
                except globus_sdk.NetworkError:
                    # The relay is starting.
                    document = {}
                if document.get("gcp_connected"):
                    return
                await trio.sleep(0.1)
        raise AssertionError(f"{name} did not connect\n{site.child.log_tail()}\n{self.relay.log_tail()}")

    async def start(self) -> None:
        """Start both agents, and wait for their links."""
        for site in self.sites.values():
            await site.child.start()
        for name in self.sites:
            await self.until_connected(name)

    async def stop(self) -> None:
        """Stop both agents."""
        async with trio.open_nursery() as nursery:
            for site in self.sites.values():
                nursery.start_soon(site.child.stop)

    async def submit(self, source: str, destination: str, name: str, **options: Any) -> str:
        """Transfer a file from one site's root to the other's; returns the task id."""
        ids = self.sites[source].collection_id, self.sites[destination].collection_id

        def send(relay: Relay) -> str:
            document = {
                "DATA_TYPE": "transfer",
                "submission_id": relay.transfer.get_submission_id()["value"],
                "source_endpoint": ids[0],
                "destination_endpoint": ids[1],
                "DATA": [{"DATA_TYPE": "transfer_item", "source_path": f"/{name}", "destination_path": f"/{name}"}],
                **options,
            }
            return str(relay.transfer.submit_transfer(document)["task_id"])

        return await self.call(send)

    async def finished(self, task_id: str, seconds: float = TRANSFER) -> dict[str, Any]:
        """The task, once it has ended."""
        with trio.move_on_after(seconds):
            while True:
                task = await self.call(lambda relay: dict(relay.transfer.get_task(task_id).data))
                if task["status"] in ("SUCCEEDED", "FAILED"):
                    return task
                await trio.sleep(0.1)
        logs = "\n".join(site.child.log_tail() for site in self.sites.values())
        status = {name: site.status().get("tasks") for name, site in self.sites.items()}
        raise AssertionError(f"the task did not end: {task}\n{status}\n{logs}\n{self.relay.log_tail()}")

    async def doctor(self, name: str, *checks: str) -> list[dict[str, Any]]:
        """What `towpath doctor` says of a site's network."""
        site = self.sites[name]
        wanted = checks or ("relay", "nat")
        command = [program("towpath"), "doctor", *wanted, "--config", str(site.config_file), "--format", "json"]
        printed = await run_tool(_in(site.host.namespace, command), clean_environment(os.environ))
        found: list[dict[str, Any]] = json.loads(printed)["checks"]
        return found

    def path_of(self, destination: str, task_id: str) -> str:
        """How the task's data went, as the destination's agent says."""
        tasks = self.sites[destination].status()["tasks"]
        return next(str(task["path"]) for task in tasks if task["task_id"] == task_id)


def _in(namespace: str, command: list[str]) -> list[str]:
    return ["ip", "netns", "exec", namespace, *command]


@asynccontextmanager
async def open_lab(directory: Path, version: int = 4, *, dual: bool = False, many: bool = False) -> AsyncIterator[Lab]:
    """Build everything below a directory; on leaving, processes and namespaces are gone. ``version`` is that of the
    only Internet Protocol there is; a ``dual`` relay can be reached over both; ``many`` as in `Emulator`."""
    tag = f"{os.getpid() % 100_000}"
    hosts = {name: Host(name, f"twp{tag}-{name}", f"t{tag}{name}") for name in ("relay", "a", "b")}
    emulator = Emulator([host.device for host in hosts.values()], many=many)
    try:
        for host in hosts.values():
            host.create()
        async with warden() as guard, _running(directory, hosts, emulator, guard, version, dual) as lab:
            yield lab
    finally:
        emulator.close()
        for host in hosts.values():
            host.remove()


@asynccontextmanager
async def _running(
    directory: Path, hosts: dict[str, Host], emulator: Emulator, guard: Warden, version: int, dual: bool
) -> AsyncIterator[Lab]:
    environment = clean_environment(os.environ)
    url, command = await _init_relay(directory, hosts["relay"], environment, version, dual)
    serve = _in(hosts["relay"].namespace, [*command, "serve"])
    relay = Child("relay", serve, environment, directory / "relay.log", guard)
    await relay.start()
    client: Relay | None = None
    sites: dict[str, Site] = {}
    try:
        await run_tool([*command, "user", "add", "researcher", "--json"], environment)
        made = json.loads(
            await run_tool([*command, "client", "add", "lab", "--owner", "researcher", "--json"], environment)
        )
        ca_file = str(directory / "relay" / "tls" / "ca.pem")
        client = Relay(Profile(url, made["client_id"], made["client_secret"], ca_file), http_timeout=20.0)
        lab = Lab(directory, emulator, hosts["relay"], relay, sites, client)
        for number, name in enumerate(("a", "b"), 50):
            hosts[name].use([f"203.0.113.{number}" if version == 4 else f"2001:db8::{number}"])
            options = ("--owner", "researcher", "--grant", f"{made['client_id']}:administrator", "--json")
            key = json.loads(await run_tool([*command, "collection", "add", name, *options], environment))
            sites[name] = _site(directory / name, hosts[name], key["collection_id"], environment, guard)
            emulator.use(lab.describe({site: [] for site in sites}))
            await _set_up(sites[name], key["setup_key"], environment)
        yield lab
    finally:
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for site in sites.values():
                    nursery.start_soon(site.child.stop)
            await relay.stop()
        if client is not None:
            client.close()


async def _init_relay(
    directory: Path, host: Host, environment: dict[str, str], version: int, dual: bool
) -> tuple[str, list[str]]:
    """Make a relay: its address, and the command that operates it."""
    address = RELAY_ADDRESS if version == 4 else RELAY_ADDRESS_6
    host.use([RELAY_ADDRESS, RELAY_ADDRESS_6] if dual else [address])
    url = f"https://{address}" if version == 4 else f"https://[{address}]"
    everywhere = "0.0.0.0" if version == 4 and not dual else "::"
    place, command = directory / "relay", [program("towpath-relay")]
    where = ("--directory", str(place), "--host", everywhere, "--port", "443", "--url", url)
    await run_tool([*command, "init", *where, "--name", "lab"], environment)
    if dual:
        with (place / "relay.yaml").open("a") as file:
            file.write(f'tls:\n  names: ["{RELAY_ADDRESS}", "{RELAY_ADDRESS_6}"]\n')
    return url, [*command, "--config", str(place / "relay.yaml")]


def _site(home: Path, host: Host, collection_id: str, environment: dict[str, str], guard: Warden) -> Site:
    """A machine with an agent that is not set up yet."""
    (home / "data").mkdir(parents=True)
    config_file = home / "agent.yaml"
    config_file.write_text("state_dir: state\n")
    command = _in(host.namespace, [program("towpath"), "run", "--config", str(config_file)])
    child = Child(host.name, command, environment, home.with_suffix(".log"), guard)
    return Site(host, collection_id, home / "data", config_file, home / "state", child)


async def _set_up(site: Site, setup_key: str, environment: dict[str, str]) -> None:
    arguments = ("setup", "--config", str(site.config_file), "--root", str(site.root), "--name", site.host.name)
    command = _in(site.host.namespace, [program("towpath"), *arguments])
    await run_tool(command, {**environment, "TOWPATH_SETUP_KEY": setup_key})
