"""Two agents' transfer services in one process, with real worker processes and sockets, and the test as their relay."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from agent.config.keys import AgentConfig, CollectionConfig, DataConfig, LimitsConfig
from agent.policy import Policy
from agent.storage.disks import Disk
from agent.transfer.basis.lane_keys import KEY_RECORDS
from agent.transfer.tasks.local_node import LocalNode
from agent.transfer.tasks.service import TransferService
from protocol.control import (
    FINAL_STATES,
    AgentEvent,
    Party,
    SessionAnswer,
    SessionOrder,
    TaskItem,
    TaskObserved,
    TaskOptions,
    TaskOrder,
)
from protocol.identity import NodeKey
from protocol.ticket import Grant, RelayRoot, Ticket, TicketSigner, TicketVerifier

RELAY = "relay-under-test"


@dataclass
class Node:
    """One agent, without daemon and link."""

    name: str
    root: Path
    state: Path
    key: NodeKey = field(default_factory=NodeKey.generate)
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    collection: str = field(default_factory=lambda: str(uuid.uuid4()))
    read_only: bool = False
    numbered_accounts: bool = False
    # What its workers are told to be mounted below the root, when they start.
    disks: tuple[Disk, ...] = ()
    service: TransferService | None = None
    # Set when what `World.start` has begun is over.
    ended: trio.Event = field(default_factory=trio.Event)
    policy: Policy = field(default_factory=lambda: Policy([]))

    @property
    def party(self) -> Party:
        return Party(
            endpoint_id=self.id, node_id=self.id, collection_id=self.collection, certificate=self.key.certificate_pem
        )

    def grant(self, access: str, paths: list[str], reach: list[str] | None = None) -> Grant:
        return Grant(
            node_id=self.id,
            fingerprint=self.key.fingerprint,
            collection_id=self.collection,
            paths=paths,
            access=access,  # type: ignore[arg-type]
            reach=reach,
        )


class World:
    """Two nodes and what a relay would do for them."""

    def __init__(
        self,
        directory: Path,
        nursery: trio.Nursery,
        workers_per_session: int | None = 1,
        key_records: int = KEY_RECORDS,
        lanes: int = 2,
    ) -> None:
        self.nursery = nursery
        self.lanes = lanes
        self.key_records = key_records
        self.workers_per_session = workers_per_session
        self.relay_root = RelayRoot.generate()
        key = Ed25519PrivateKey.generate()
        now = time.time()
        certificate = self.relay_root.certify(key.public_key(), "k", now - 100, now + 86400)
        self.signer = TicketSigner(RELAY, key, certificate, "k")
        self.alpha = self._node(directory, "alpha")
        self.beta = self._node(directory, "beta")
        self.events: list[AgentEvent] = []
        self.sessions: dict[str, SessionOrder] = {}
        # What stands between the agents: where alpha's candidates lead instead.
        self.detour: Callable[[SessionAnswer], SessionAnswer] = lambda answer: answer

    @staticmethod
    def _node(directory: Path, name: str) -> Node:
        node = Node(name, directory / name / "root", directory / name / "state")
        node.root.mkdir(parents=True, exist_ok=True)
        node.state.mkdir(parents=True)
        return node

    async def start(self, node: Node) -> trio.CancelScope:
        """Bring a node up; cancelling the scope is a clean end."""
        collection = CollectionConfig(
            id=node.collection,
            name=node.name,
            root=str(node.root),
            read_only=node.read_only,
            numbered_accounts=node.numbered_accounts,
        )
        config = AgentConfig(
            state_dir=node.state,
            collections=(collection,),
            data=DataConfig(listen="127.0.0.1", advertise=("127.0.0.1",), allow_loopback=True),
            limits=LimitsConfig(
                workers=2, lanes=self.lanes, spare_worker=False, workers_per_session=self.workers_per_session
            ),
        )
        node.policy = Policy([collection])
        service = TransferService(
            LocalNode(
                node.state,
                config,
                node.key,
                node.id,
                TicketVerifier(RELAY, self.relay_root.public_pem),
                node.policy,
                self.relay_root.public_pem,
                key_records=self.key_records,
                known_disks=lambda _: node.disks,
            )
        )
        node.service = service
        node.ended = ended = trio.Event()
        scope = trio.CancelScope()

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            with scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(service.run)
                    nursery.start_soon(self._be_relay, node, service)
                    task_status.started()
            ended.set()

        await self.nursery.start(run)
        return scope

    async def _be_relay(self, node: Node, service: TransferService) -> None:
        async with service.events(0) as lines:
            async for line in lines:
                self.events.append(line)
                if line.kind == "session_wanted" and line.task_id in self.sessions:
                    order = self.sessions[line.task_id]
                    assert self.alpha.service is not None
                    answer = await self.alpha.service.put_session(order)
                    await service.put_session_answer(line.task_id, self.detour(answer))

    def ticket(self, task: str, session: str, source: Grant | None, destination: Grant, **changes: Any) -> str:
        now = time.time()
        fields: dict[str, Any] = {
            "relay_id": RELAY,
            "ticket_id": str(uuid.uuid4()),
            "session_id": session,
            "task_id": task,
            "source": source,
            "destination": destination,
            "policy_epoch": 0,
            "issued": now,
            "expires": now + 3600,
        }
        return self.signer.sign(Ticket(**{**fields, **changes}))

    async def submit(
        self, items: list[TaskItem], options: TaskOptions | None = None, *, paths: str = "/", into: str = ""
    ) -> str:
        """What a relay does with a transfer from alpha to beta, or to another collection of beta's."""
        task, session = str(uuid.uuid4()), str(uuid.uuid4())
        order = self.order(task, session, items, options, paths=paths, into=into)
        self.sessions[task] = SessionOrder(session_id=session, task_id=task, ticket=order.ticket, peer=self.beta.party)
        assert self.beta.service is not None
        await self.beta.service.put_task(order)
        return task

    def order(
        self,
        task: str,
        session: str,
        items: list[TaskItem],
        options: TaskOptions | None = None,
        *,
        paths: str = "/",
        into: str = "",
    ) -> TaskOrder:
        """A relay's first order for a transfer from alpha to beta."""
        party, grant = self.beta.party, self.beta.grant("rw", ["/"])
        if into:
            party, grant = replace(party, collection_id=into), replace(grant, collection_id=into)
        return TaskOrder(
            task_id=task,
            revision=1,
            desired="run",
            type="TRANSFER",
            ticket=self.ticket(task, session, self.alpha.grant("r", [paths]), grant),
            session_id=session,
            destination=party,
            source=self.alpha.party,
            owner_id="somebody",
            options=options or TaskOptions(verify_checksum=True, preserve_timestamp=True),
            items=items,
        )

    async def wait(self, task: str, *, states: frozenset[str] = FINAL_STATES, seconds: float = 60) -> TaskObserved:
        assert self.beta.service is not None
        with trio.fail_after(seconds):
            while True:
                observed = self.beta.service.get_task(task)
                if observed.state in states:
                    return observed
                await trio.sleep(0.02)


@asynccontextmanager
async def world(
    directory: Path, workers_per_session: int | None = 1, key_records: int = KEY_RECORDS, lanes: int = 2
) -> AsyncIterator[World]:
    """Two nodes that are up; everything ends with the block."""
    async with trio.open_nursery() as nursery:
        made = World(directory, nursery, workers_per_session, key_records, lanes)
        await made.start(made.alpha)
        await made.start(made.beta)
        yield made
        nursery.cancel_scope.cancel()
