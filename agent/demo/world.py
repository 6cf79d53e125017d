"""The little world of the demonstration: a relay, two agents, a user and a client, all below one directory."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from agent import local_socket
from agent.demo.children import Child, ChildFailed, run_tool
from protocol.errors import TowpathError
from protocol.identity import write_private_file

UP_TIMEOUT = 30.0
USER = "researcher"


@dataclass
class AgentOfWorld:
    """One of the two agents."""

    name: str
    root: Path
    config_file: Path
    state_dir: Path
    collection_id: str
    child: Child


@dataclass
class World:
    """Everything that runs, and how to reach it."""

    directory: Path
    relay_url: str
    ca_file: Path
    user: str
    client_id: str
    client_secret: str
    relay: Child
    alpha: AgentOfWorld
    beta: AgentOfWorld

    def document(self) -> dict[str, Any]:
        """What ``--json`` writes."""
        return {
            "relay_url": self.relay_url,
            "ca_file": str(self.ca_file),
            "client_id": self.client_id,
            "client_secret": self.client_secret,
            "user": self.user,
            "endpoints": {
                agent.name: {
                    "collection_id": agent.collection_id,
                    "root": str(agent.root),
                    "config_file": str(agent.config_file),
                    "state_dir": str(agent.state_dir),
                    "pid": agent.child.pid,
                }
                for agent in (self.alpha, self.beta)
            },
        }

    def exports(self) -> dict[str, str]:
        """Variables with which ``towpath`` and the real ``globus`` command work in another terminal."""
        services = ("TRANSFER", "GROUPS", "SEARCH", "TIMER", "FLOWS")
        return {
            "TOWPATH_RELAY_URL": self.relay_url,
            "TOWPATH_CA_FILE": str(self.ca_file),
            "TOWPATH_CLIENT_ID": self.client_id,
            "TOWPATH_CLIENT_SECRET": self.client_secret,
            # The final slash matters: clients append to it.
            "GLOBUS_SDK_SERVICE_URL_AUTH": f"{self.relay_url}/",
            **{f"GLOBUS_SDK_SERVICE_URL_{name}": self.relay_url for name in services},
            "GLOBUS_SDK_VERIFY_SSL": str(self.ca_file),
            "GLOBUS_CLI_CLIENT_ID": self.client_id,
            "GLOBUS_CLI_CLIENT_SECRET": self.client_secret,
            "GLOBUS_PROFILE": "towpath-demo",
            "ALPHA": self.alpha.collection_id,
            "BETA": self.beta.collection_id,
        }

    def write_document(self, file: Path) -> None:
        """Write the document, whole and readable by its owner alone: it holds a secret."""
        write_private_file(file, json.dumps(self.document(), indent=2).encode() + b"\n")


def _tool(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    if not beside.exists():
        raise ChildFailed(f"The command {name} is not installed beside {sys.executable}.")
    return str(beside)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(**more: str) -> dict[str, str]:
    dropped = ("TOWPATH_", "GLOBUS_", "NOTIFY_SOCKET")
    return {**{key: value for key, value in os.environ.items() if not key.startswith(dropped)}, **more}


@asynccontextmanager
async def little_world(directory: Path, roots: tuple[Path, Path] | None) -> AsyncIterator[World]:
    """Bring everything up; on the way out every process is ended, whatever happened."""
    relay_dir = directory / "relay"
    relay = Child(
        "relay",
        [_tool("towpath-relay"), "--config", str(relay_dir / "relay.yaml"), "serve"],
        _environment(),
        directory / "relay.log",
    )
    children = [relay]
    try:
        yield await _bring_up(directory, roots, relay, children)
    finally:
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for child in children:
                    nursery.start_soon(child.stop)


async def _bring_up(directory: Path, roots: tuple[Path, Path] | None, relay: Child, children: list[Child]) -> World:
    port = _free_port()
    url = f"https://127.0.0.1:{port}"
    config = directory / "relay" / "relay.yaml"
    tool = [_tool("towpath-relay")]
    init = ["init", "--directory", str(config.parent), "--host", "127.0.0.1", "--port", str(port), "--url", url]
    await run_tool([*tool, *init], _environment())
    await relay.start()
    await wait_listening(relay, port)
    tool += ["--config", str(config)]
    user = json.loads(await run_tool([*tool, "user", "add", USER, "--json"], _environment()))
    username = user["username"]
    client = json.loads(await run_tool([*tool, "client", "add", "demo", "--owner", username, "--json"], _environment()))
    agents = []
    for index, name in enumerate(("alpha", "beta")):
        root = roots[index] if roots else directory / name / "root"
        agent = await _agent(
            directory / name,
            name,
            root,
            [
                *tool,
                "collection",
                "add",
                name,
                "--owner",
                username,
                "--grant",
                f"{client['client_id']}:administrator",
                "--json",
            ],
        )
        children.append(agent.child)
        agents.append(agent)
    for agent in agents:
        await agent.child.start()
    for agent in agents:
        await wait_linked(agent)
    return World(
        directory=directory,
        relay_url=url,
        ca_file=config.parent / "tls" / "ca.pem",
        user=username,
        client_id=client["client_id"],
        client_secret=client["client_secret"],
        relay=relay,
        alpha=agents[0],
        beta=agents[1],
    )


async def _agent(directory: Path, name: str, root: Path, add: list[str]) -> AgentOfWorld:
    config, state = directory / "agent.yaml", directory / "state"
    await trio.to_thread.run_sync(_prepare, name, root, config, state)
    made = json.loads(await run_tool(add, _environment()))
    setup = [_tool("towpath"), "setup", "--root", str(root), "--config", str(config)]
    # The key travels in the environment: arguments can be read by everybody on the machine.
    await run_tool(setup, _environment(TOWPATH_SETUP_KEY=made["setup_key"]))
    child = Child(name, [_tool("towpath"), "run", "--config", str(config)], _environment(), directory / "agent.log")
    return AgentOfWorld(name, root, config, state, made["collection_id"], child)


def _prepare(name: str, root: Path, config: Path, state: Path) -> None:
    config.parent.mkdir(parents=True, exist_ok=True)
    root.mkdir(parents=True, exist_ok=True)
    config.write_text(
        f"# The {name} agent of the demonstration: everything stays on this machine.\n"
        f"state_dir: {json.dumps(str(state))}\n"
        "data:\n  listen: 127.0.0.1\n  advertise: [127.0.0.1]\n  allow_loopback: true\n"
    )


async def wait_listening(child: Child, port: int) -> None:
    """Wait until a port answers. Raises `ChildFailed`."""
    with trio.move_on_after(UP_TIMEOUT):
        while True:
            child.raise_if_ended()
            try:
                await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
            except OSError:
                await trio.sleep(0.05)
            else:
                return
    raise ChildFailed(f"The {child.name} did not come up.\n{child.log_tail()}")


async def wait_linked(agent: AgentOfWorld) -> None:
    """Wait until an agent says that it is linked to the relay. Raises `ChildFailed`."""
    with trio.move_on_after(UP_TIMEOUT):
        while True:
            agent.child.raise_if_ended()
            status = await status_of(agent)
            if status is not None and status["link"]["connected"]:
                return
            await trio.sleep(0.1)
    raise ChildFailed(f"The agent {agent.name} did not connect.\n{agent.child.log_tail()}")


async def status_of(agent: AgentOfWorld) -> dict[str, Any] | None:
    """What a running agent says of itself, or None while it does not answer."""
    try:
        return await trio.to_thread.run_sync(local_socket.ask, agent.state_dir, "GET", "/status")
    except TowpathError:
        return None
