"""A little world on one machine: a relay and two agents, each its own process with its own state directory.

Everything is set up through the same commands a user would type. The agent's code never imports the relay's; the
relay is the program ``towpath-relay`` found beside the running Python.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import trio

from agent.cli.profile import Profile
from agent.cli.relay_client import Relay
from agent.demo.children import Child, ChildFailed, Warden, leaves, run_tool
from agent.demo.free_port import free_port

HOST = "127.0.0.1"
USER = "researcher"
READY_SECONDS = 30.0
CALL_SECONDS = 10.0
AGENTS = ("alpha", "beta")
# What globus-sdk looks for at Globus unless it is named. AUTH, which needs a slash, is not among them.
_SERVICES = ("TRANSFER", "GROUPS", "SEARCH", "TIMER", "FLOWS", "COMPUTE")

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Site:
    """One agent of the world and what it offers."""

    name: str
    collection_id: str
    root: Path
    config_file: Path
    state_dir: Path
    child: Child


@dataclass(frozen=True)
class World:
    """The running world. `call` asks the relay as the demonstration's client."""

    directory: Path
    profile: Profile
    user: str
    relay: Child
    sites: Mapping[str, Site]
    client: Relay

    @property
    def children(self) -> list[Child]:
        """All processes, in the order in which they were started."""
        return [self.relay, *(site.child for site in self.sites.values())]

    async def call(self, question: Callable[[Relay], T]) -> T:
        """Ask the relay without holding up anything else. Raises what globus-sdk raises."""
        return await trio.to_thread.run_sync(question, self.client, abandon_on_cancel=True)

    def document(self) -> dict[str, Any]:
        """The world as a document for other programs; holds the client's secret."""
        return {
            "relay_url": self.profile.relay_url,
            "ca_file": self.profile.ca_file,
            "client_id": self.profile.client_id,
            "client_secret": self.profile.client_secret,
            "user": self.user,
            "endpoints": {
                name: {
                    "collection_id": site.collection_id,
                    "root": str(site.root),
                    "config_file": str(site.config_file),
                    "state_dir": str(site.state_dir),
                    "pid": site.child.pid,
                }
                for name, site in self.sites.items()
            },
        }

    def exports(self) -> str:
        """Shell lines after which ``towpath`` and Globus's own tools speak to this world."""
        url, profile = self.profile.relay_url, self.profile
        variables = {
            "TOWPATH_RELAY_URL": url,
            "TOWPATH_CA_FILE": profile.ca_file or "",
            "TOWPATH_CLIENT_ID": profile.client_id,
            "TOWPATH_CLIENT_SECRET": profile.client_secret,
            # Clients join this one with their paths by plain concatenation, so it needs the slash.
            "GLOBUS_SDK_SERVICE_URL_AUTH": url + "/",
            **{f"GLOBUS_SDK_SERVICE_URL_{name}": url for name in _SERVICES},
            "GLOBUS_SDK_VERIFY_SSL": profile.ca_file or "true",
            "GLOBUS_CLI_CLIENT_ID": profile.client_id,
            "GLOBUS_CLI_CLIENT_SECRET": profile.client_secret,
            # Globus's tools keep tokens by profile, not by address; this keeps theirs and ours apart.
            "GLOBUS_PROFILE": f"towpath-demo-{profile.client_id[:8]}",
            **{site.name.upper(): site.collection_id for site in self.sites.values()},
        }
        return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items())

    async def until_connected(self, name: str) -> None:
        """Wait until the relay says that an agent is connected. Raises `ChildFailed` after a while."""
        site = self.sites[name]
        collection_id = site.collection_id
        with trio.move_on_after(READY_SECONDS):
            while not await self._is_connected(collection_id):
                site.child.raise_if_ended()
                await trio.sleep(0.1)
            return
        raise ChildFailed(f"{name} did not connect to the relay in {READY_SECONDS:.0f} s.\n{site.child.log_tail()}")

    async def _is_connected(self, collection_id: str) -> bool:
        document = await self.call(lambda relay: relay.transfer.get_endpoint(collection_id).data)
        return isinstance(document, Mapping) and bool(document.get("gcp_connected"))


def program(name: str) -> str:
    """One of this installation's programs, beside the running Python. Raises `ChildFailed` when it is missing."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise ChildFailed(f"{name} is not installed beside {sys.executable}; install Towpath into one environment.")
    return str(path)


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for the children: nothing of it may lead them to another relay, nor make
    them report to whoever started us."""
    dropped = ("TOWPATH_", "GLOBUS_", "NOTIFY_SOCKET")
    kept = {name: value for name, value in environment.items() if not name.startswith(dropped)}
    return {**kept, "PYTHONUNBUFFERED": "1"}


@asynccontextmanager
async def open_world(directory: Path, roots: Mapping[str, Path], warden: Warden, say: Say) -> AsyncIterator[World]:
    """Build the world below an existing directory and run it; on leaving, every process of it is ended."""
    environment = clean_environment(os.environ)
    children: list[Child] = []
    client: Relay | None = None
    try:
        say("Setting up a relay, a user and a client.")
        url = f"https://{HOST}:{free_port()}"
        configured = await _make_relay(directory, url, environment)
        relay = Child("relay", [*configured, "serve"], environment, directory / "relay.log", warden)
        children.append(relay)
        await relay.start()
        user = await _json(*configured, "user", "add", USER, "--json", environment=environment)
        made = await _json(*configured, "client", "add", "demo", "--owner", USER, "--json", environment=environment)
        profile = Profile(url, made["client_id"], made["client_secret"], str(directory / "relay" / "tls" / "ca.pem"))
        await _until_listening(relay, url)
        say("Setting up the agents.")
        sites = await _set_up_agents(directory, roots, (configured, profile.client_id), environment, warden)
        for site in sites.values():
            children.append(site.child)
            await site.child.start()
        client = Relay(profile, http_timeout=CALL_SECONDS)
        world = World(directory, profile, user["username"], relay, sites, client)
        for name in AGENTS:
            await world.until_connected(name)
        yield world
    finally:
        # Whatever has happened, nothing stays behind: agents first, so that they can say goodbye to the relay.
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for child in children[1:]:
                    nursery.start_soon(child.stop)
            for child in children[:1]:
                await child.stop()
        if client is not None:
            client.close()


async def _json(*command: str, environment: Mapping[str, str]) -> dict[str, Any]:
    document = json.loads(await run_tool(command, environment))
    if not isinstance(document, dict):
        raise ChildFailed(f"{Path(command[0]).name} printed something else than a JSON object.")
    return document


async def _make_relay(directory: Path, url: str, environment: Mapping[str, str]) -> list[str]:
    """Initialise a relay; returns the command with its configuration."""
    relay = program("towpath-relay")
    port = url.rpartition(":")[2]
    where = ("--directory", str(directory / "relay"), "--host", HOST, "--port", port, "--url", url)
    await run_tool([relay, "init", *where, "--name", "Towpath demonstration"], environment)
    return [relay, "--config", str(directory / "relay" / "relay.yaml")]


async def _until_listening(relay: Child, url: str) -> None:
    port = int(url.rpartition(":")[2])
    with trio.move_on_after(READY_SECONDS):
        while True:
            relay.raise_if_ended()
            try:
                stream = await trio.open_tcp_stream(HOST, port)
            except OSError:
                await trio.sleep(0.1)
            else:
                await stream.aclose()
                return
    raise ChildFailed(f"The relay did not listen within {READY_SECONDS:.0f} s.\n{relay.log_tail()}")


async def _set_up_agents(
    directory: Path,
    roots: Mapping[str, Path],
    relay: tuple[Sequence[str], str],
    environment: Mapping[str, str],
    warden: Warden,
) -> dict[str, Site]:
    """Both at once, since most of it is the start of programs. ``relay``: its command, and the id of the client that
    becomes an administrator of what the agents offer."""
    configured, client_id = relay
    made: dict[str, Site] = {}

    async def set_up(name: str) -> None:
        key = await _json(
            *(*configured, "collection", "add", name, "--owner", USER),
            *("--grant", f"{client_id}:administrator", "--json"),
            environment=environment,
        )
        made[name] = await _make_agent(directory, name, roots[name], key, environment, warden)

    failures: list[Exception] = []
    try:
        async with trio.open_nursery() as nursery:
            for name in AGENTS:
                nursery.start_soon(set_up, name)
    except* ChildFailed as group:
        failures = leaves(group)
    # One sentence for the user; the other agent's would be the same.
    for failure in failures:
        raise failure
    return {name: made[name] for name in AGENTS}


async def _make_agent(
    directory: Path, name: str, root: Path, key: Mapping[str, Any], environment: Mapping[str, str], warden: Warden
) -> Site:
    home = directory / name
    home.mkdir(mode=0o700)
    config_file, state_dir = home / "agent.yaml", home / "state"
    # Both agents are on this machine, so they must meet on its loopback address.
    lines = ["state_dir: state", "data:", f"  listen: {HOST}", f"  advertise: [{HOST}]", "  allow_loopback: true"]
    config_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    towpath = program("towpath")
    options = ("--config", str(config_file), "--root", str(root), "--name", name)
    # The key goes through the environment: command lines are visible to every user of the machine.
    await run_tool([towpath, "setup", *options], {**environment, "TOWPATH_SETUP_KEY": str(key["setup_key"])})
    child = Child(name, [towpath, "run", "--config", str(config_file)], environment, directory / f"{name}.log", warden)
    return Site(name, str(key["collection_id"]), root, config_file, state_dir, child)
