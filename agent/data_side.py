"""The part of the agent that moves data: collections, tasks, sessions, and the ways to other agents.

It needs neither the relay nor its owner to go on with what was ordered, and so it is loaded and started before the rest
of the daemon (`agent.start`). Composition only.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from urllib.parse import urlsplit

import trio

from agent.collections import MARKS_FILE, Collections, Marks
from agent.config.keys import AgentConfig
from agent.connect.network import Network
from agent.connect.proxy import Dialer
from agent.connect.quic.engine import EngineMissing
from agent.connect.quic.observe import udp_candidates, udp_targets
from agent.connect.quic.transport import QuicTransport
from agent.connect.relay_way import RelayWay
from agent.connect.transport import Transports
from agent.connect.tunnel import TunnelTransport
from agent.identity_file import Identity, NotSetUp
from agent.policy import Pause, Policy
from agent.transfer.processes.spawn import Spawned
from agent.transfer.tasks.local_node import LocalNode
from agent.transfer.tasks.service import TransferService
from protocol.errors import TowpathError
from protocol.identity import NodeKey
from protocol.ticket import TicketVerifier
from protocol.websocket.carrier import Carrier

# The owner has paused this machine; a file in the state directory, so that it outlives restarts. It is empty, or holds
# the word when what has begun may finish (to versions of before it is a pause of everything).
PAUSED_FILE, DRAINS = "paused", b"drain\n"


class DataSide:
    """See the module. Its parts are for the daemon to use, which also sets `network.relay_up`. ``first`` is a worker
    that waits for work already, ``own_places`` where the agent's own files are."""

    def __init__(
        self,
        config: AgentConfig,
        identity: Identity,
        key: NodeKey,
        first: Spawned | None = None,
        own_places: tuple[str, ...] = (),
    ) -> None:
        self.config = config
        self.key = key
        self.policy = Policy(config.collections)
        self.policy.pause = recall_pause(config.state_dir)
        marks = Marks(config.state_dir / MARKS_FILE)
        self.collections = Collections(marks, own_places)
        self.relay_url = config.relay.url or identity.relay_url
        self.authority = _authority(config)
        self.dialer = Dialer(config.relay.proxy, os.environ)
        self.way = RelayWay(config.relay.transport, lambda: self.network.interfaces.addresses)
        self.carrier = Carrier()
        self.network = self._make_network()
        self.node = LocalNode(
            config.state_dir,
            config,
            key,
            identity.node_id,
            TicketVerifier(identity.relay_id, identity.relay_root),
            self.policy,
            identity.relay_root,
            self.network,
            marks.expected,
            known_disks=marks.disks,
            own_places=own_places,
        )
        if first is not None:
            self.node.workers.adopt(first)
        self.tasks = TransferService(self.node)
        self.quic = self._make_quic()

    def _make_network(self) -> Network:
        data = self.config.data
        tunnel = TunnelTransport(self.relay_url, self.authority, self.dialer.dial, self.way, self.carrier)
        return Network(
            relay=_place_of(self.relay_url, self.dialer),
            transports=Transports(tunnel=tunnel),
            advertise=data.advertise,
            allow_loopback=data.allow_loopback,
            relay_policy=data.relay,
            # Until there is a link.
            relay_up=lambda: False,
        )

    def _make_quic(self) -> QuicTransport | None:
        network = self.network
        try:
            transport = QuicTransport(
                self.key,
                self.tasks.peer_certificate,
                functools.partial(udp_candidates, network),
                functools.partial(udp_targets, network),
                instance=network.instance,
            )
        except EngineMissing as error:
            network.transports.absent["quic"] = error.sentence
            return None
        network.transports.quic = transport
        return transport

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Move data until cancelled; workers settle what arrived before this returns."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.tasks.run)
            task_status.started()
            nursery.start_soon(self.carrier.run)
            if self.quic is not None:
                nursery.start_soon(self.quic.run)
                nursery.start_soon(self._move_quic, self.quic)

    async def _move_quic(self, quic: QuicTransport) -> None:
        while True:
            await self.network.changed.wait()
            await quic.moved()

    def moves_data(self) -> bool:
        """Whether a task runs here, or somebody reads from here."""
        return self.tasks.sessions.count > 0 or any(task.state == "ACTIVE" for task in self.tasks.tasks())


def recall_pause(state_dir: Path) -> Pause:
    """What the owner said before a restart. A mark that cannot be read is a pause of everything."""
    try:
        return "new" if (state_dir / PAUSED_FILE).read_bytes() == DRAINS else "all"
    except FileNotFoundError:
        return "none"
    except OSError:
        return "all"


def _place_of(url: str, dialer: Dialer) -> tuple[str, int] | None:
    """Where the relay can be asked how we are seen; nowhere when it is only reached through a proxy."""
    parts = urlsplit(url)
    if parts.hostname is None:
        return None
    place = parts.hostname, parts.port or 443
    try:
        return None if dialer.proxy_for(*place) is not None else place
    except TowpathError:
        # The link says what is wrong with the proxy.
        return None


def _authority(config: AgentConfig) -> str | None:
    file = config.relay.ca_file
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NotSetUp(f"The relay's CA certificate {file} cannot be read; run `towpath setup` again.") from error
