"""Towpath's engine under measurement: two agents' transfer services in this process, their workers as in real life.

What is left out is the relay: this process orders the task and answers for it. `little_world.py` has the whole.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.config.keys import AgentConfig, CollectionConfig, DataConfig, LimitsConfig
from agent.policy import Policy
from agent.transfer.tasks.local_node import LocalNode
from agent.transfer.tasks.service import TransferService
from protocol.control import (
    FINAL_STATES,
    Compression,
    Party,
    SessionOrder,
    TaskItem,
    TaskObserved,
    TaskOptions,
    TaskOrder,
)
from protocol.identity import NodeKey
from protocol.ticket import Grant, RelayRoot, Ticket, TicketSigner, TicketVerifier

RELAY = "benchmark"


class Agent:
    """One end."""

    def __init__(
        self,
        directory: Path,
        root: Path,
        relay_root: RelayRoot,
        limits: LimitsConfig,
        address: str,
        *,
        read_twice: bool = False,
        numbered_accounts: bool = False,
    ) -> None:
        self.root, self.directory = root, directory
        self.key = NodeKey.generate()
        self.id, self.collection = str(uuid.uuid4()), str(uuid.uuid4())
        directory.mkdir(parents=True)
        collection = CollectionConfig(
            id=self.collection,
            name="benchmark",
            root=str(root),
            read_twice=read_twice,
            numbered_accounts=numbered_accounts,
        )
        config = AgentConfig(
            state_dir=directory,
            collections=(collection,),
            data=DataConfig(listen=address, advertise=(address,), allow_loopback=True),
            limits=limits,
        )
        verifier = TicketVerifier(RELAY, relay_root.public_pem)
        policy, root_pem = Policy([collection]), relay_root.public_pem
        self.service = TransferService(LocalNode(directory, config, self.key, self.id, verifier, policy, root_pem))

    @property
    def party(self) -> Party:
        return Party(
            endpoint_id=self.id, node_id=self.id, collection_id=self.collection, certificate=self.key.certificate_pem
        )

    def grant(self, access: Literal["r", "rw"]) -> Grant:
        return Grant(
            node_id=self.id,
            fingerprint=self.key.fingerprint,
            collection_id=self.collection,
            paths=["/"],
            access=access,
        )


class Engine:
    """A source, a destination, and what a relay would do for them."""

    def __init__(
        self,
        directory: Path,
        source: Path,
        destination: Path,
        limits: LimitsConfig,
        address: str,
        *,
        read_twice: bool = False,
        numbered_accounts: bool = False,
    ) -> None:
        root = RelayRoot.generate()
        key, now = Ed25519PrivateKey.generate(), time.time()
        self._signer = TicketSigner(RELAY, key, root.certify(key.public_key(), "k", now - 100, now + 86400), "k")
        self.source = Agent(directory / "source", source, root, limits, address, read_twice=read_twice)
        self.destination = Agent(
            directory / "destination", destination, root, limits, "127.0.0.1", numbered_accounts=numbered_accounts
        )
        self._sessions: dict[str, SessionOrder] = {}

    async def answer(self) -> None:
        """Give the destination a session at the source whenever it wants one."""
        async with self.destination.service.events(0) as lines:
            async for line in lines:
                if line.kind == "session_wanted" and line.task_id in self._sessions:
                    answer = await self.source.service.put_session(self._sessions[line.task_id])
                    await self.destination.service.put_session_answer(line.task_id, answer)

    async def transfer(
        self,
        source: str,
        destination: str,
        *,
        recursive: bool,
        sync_level: int | None = None,
        verify_checksum: bool = True,
        compression: Compression = "auto",
        preserve_hard_links: bool = False,
        preserve_xattrs: bool = False,
        preserve_acls: bool = False,
        mirror: bool = False,
    ) -> str:
        """Submit; the task's id."""
        task, session, now = str(uuid.uuid4()), str(uuid.uuid4()), time.time()
        ticket = self._signer.sign(
            Ticket(
                relay_id=RELAY,
                ticket_id=str(uuid.uuid4()),
                session_id=session,
                task_id=task,
                source=self.source.grant("r"),
                destination=self.destination.grant("rw"),
                policy_epoch=0,
                issued=now,
                expires=now + 7200,
            )
        )
        order = SessionOrder(session_id=session, task_id=task, ticket=ticket, peer=self.destination.party)
        self._sessions[task] = order
        answer = await self.source.service.put_session(order)
        await self.destination.service.put_task(
            TaskOrder(
                task_id=task,
                revision=1,
                desired="run",
                type="TRANSFER",
                ticket=ticket,
                session_id=session,
                session=answer,
                destination=self.destination.party,
                source=self.source.party,
                owner_id="benchmark",
                options=TaskOptions(
                    verify_checksum=verify_checksum,
                    preserve_timestamp=True,
                    sync_level=sync_level,
                    compression=compression,
                    preserve_hard_links=preserve_hard_links,
                    preserve_xattrs=preserve_xattrs,
                    preserve_acls=preserve_acls,
                    delete_destination_extra=mirror,
                ),
                items=[TaskItem(source_path=source, destination_path=destination, recursive=recursive)],
            )
        )
        return task

    async def wait(self, task: str, every: float = 0.01) -> TaskObserved:
        """Until it is over. Raises RuntimeError unless it succeeded."""
        while (observed := self.destination.service.get_task(task)).state not in FINAL_STATES:
            await trio.sleep(every)
        if observed.state != "SUCCEEDED":
            raise RuntimeError(f"the task ended as {observed.state}: {observed.status_sentence}")
        return observed

    async def rest(self) -> None:
        """Until workers wait at both ends: the state an agent is in when nothing runs."""
        await trio.sleep(3.5)
        for node in (self.source, self.destination):
            while node.service is not None and not node.service._node.workers.ready:
                await trio.sleep(0.1)


@asynccontextmanager
async def engine(
    directory: Path,
    source: Path,
    destination: Path,
    lanes: int = 4,
    *,
    address: str = "127.0.0.1",
    prepare: Callable[[Engine], None] = lambda _made: None,
    read_twice: bool = False,
    numbered_accounts: bool = False,
    workers_per_session: int | Literal["as the environment says"] | None = "as the environment says",
) -> AsyncIterator[Engine]:
    """Both agents, up and linked, each with its spare worker. ``address`` is where the source listens; ``prepare`` is
    called before they start; ``read_twice`` is the source's owner's choice, ``numbered_accounts`` the destination's.
    ``workers_per_session`` as in the configuration, None for auto; else the environment's WORKERS_PER_SESSION, or auto,
    as agents have it."""
    if workers_per_session == "as the environment says":
        said = os.environ.get("WORKERS_PER_SESSION", "auto")
        workers_per_session = None if said == "auto" else int(said)
    limits = LimitsConfig(lanes=lanes, workers_per_session=workers_per_session)
    made = Engine(
        directory, source, destination, limits, address, read_twice=read_twice, numbered_accounts=numbered_accounts
    )
    prepare(made)
    async with trio.open_nursery() as nursery:
        await nursery.start(made.source.service.run)
        await nursery.start(made.destination.service.run)
        nursery.start_soon(made.answer)
        await made.rest()
        yield made
        nursery.cancel_scope.cancel()
