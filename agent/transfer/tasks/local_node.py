"""This node as its tasks and sessions know it: who it is, what its owner allows, where things are kept."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import trio

from agent.config.keys import AgentConfig, CollectionConfig
from agent.connect.network import Network
from agent.limits.allotment import Allotment
from agent.log_lines import form_now
from agent.policy import Policy, UnknownCollection
from agent.state_files import make_folder
from agent.storage.disks import Disk
from agent.storage.mounts import Mark
from agent.transfer.basis.lane_keys import KEY_RECORDS
from agent.transfer.processes.channel import Common, WorkerCollection
from agent.transfer.processes.spawn import session_processes
from agent.transfer.processes.worker_process import Workers
from agent.transfer.tasks.order_check import check_order, check_session_order
from agent.transfer.tasks.outbox import Outbox
from agent.transfer.tasks.places import Places
from agent.transfer.tasks.task_store import open_or_begin
from agent.transfer.tasks.turns import Claim
from protocol.control import SessionOrder, TaskOrder
from protocol.identity import NodeKey
from protocol.ticket import Ticket, TicketVerifier

logger = logging.getLogger("towpath.tasks")


class LocalNode:
    """Shared by the service, its tasks and its sessions; none of them needs to know the others for it.

    Opens the list of tasks below ``state_dir``; whoever makes this closes ``store``. ``key_records`` is after how many
    TLS records a lane is followed by another one, with new keys.
    """

    def __init__(
        self,
        state_dir: Path,
        config: AgentConfig,
        identity: NodeKey,
        node_id: str,
        verifier: TicketVerifier,
        policy: Policy,
        relay_root: str,
        network: Network | None = None,
        expected_mark: Callable[[CollectionConfig], Mark | None] = lambda _collection: None,
        key_records: int = KEY_RECORDS,
        known_disks: Callable[[CollectionConfig], tuple[Disk, ...]] = lambda _collection: (),
        own_places: tuple[str, ...] = (),
    ) -> None:
        self.directory = state_dir / "tasks"
        make_folder(self.directory)
        self.config = config
        self.identity = identity
        self.node_id = node_id
        self.verifier = verifier
        self.policy = policy
        self.network = network or Network(
            relay=None, advertise=config.data.advertise, allow_loopback=config.data.allow_loopback
        )
        self._relay_root = relay_root
        self._expected_mark = expected_mark
        self._known_disks = known_disks
        self._own_places = own_places
        self._key_records = key_records
        self.store, begun_anew = open_or_begin(self.directory / "tasks.sqlite")
        if begun_anew:
            logger.error(
                "The list of tasks was damaged or gone; it is begun anew, and what was there is kept as "
                "tasks.sqlite.damaged. The relay gives the tasks again, and they go on from their journals."
            )
        self.outbox = Outbox(self.store)
        self.places = Places()
        self.allotment = Allotment(lambda: self.config.limits)
        self.workers = Workers(
            spare=config.limits.spare_worker, processes=session_processes(config.limits.workers_per_session)
        )
        # All tasks wait for the moment (on battery, for example); nothing of this is remembered.
        self.holds_back = False
        # Set when the first lane has got its connection since the start.
        self.lane_begun = trio.Event()
        # Set, and replaced by a new one, at every change of what decides whose turn it is.
        self.change = trio.Event()

    def turn_changed(self) -> None:
        """A task came, ended, began to wait or goes on: others may have its turn, or must wait for theirs."""
        self.change.set()
        self.change = trio.Event()

    def check_task(self, order: TaskOrder, now: float) -> None:
        """Whether a task may run here. Raises `TowpathError` when ticket, policy or the order itself forbid it."""
        check_order(order, self.verifier, self.policy, self.node_id, self.identity.fingerprint, now)

    def check_session(self, order: SessionOrder, now: float) -> Ticket:
        """The ticket of a session to be served from here. Raises `TowpathError` when ticket or policy forbid it."""
        return check_session_order(order, self.verifier, self.policy, self.node_id, self.identity.fingerprint, now)

    def named_claim(self, order: TaskOrder) -> Claim:
        """The places a task writes to, as it names them."""
        return self.places.named(order, self._collection(order))

    async def claim(self, order: TaskOrder) -> Claim:
        """The places a task writes to, as they are now on the disks."""
        return await self.places.look(order, self._collection(order))

    def _collection(self, order: TaskOrder) -> CollectionConfig | None:
        """The destination of a task, None for one that is not offered."""
        try:
            return self.policy.collection(order.destination.collection_id)
        except UnknownCollection:
            return None

    def common(self) -> Common:
        """What every worker is told."""
        return Common(
            node_id=self.node_id,
            node_key=self.identity.private_key_pem,
            relay_id=self.verifier.relay_id,
            relay_root=self._relay_root,
            collections=[
                WorkerCollection(
                    id=row.id,
                    root=row.root,
                    read_only=row.read_only,
                    home=row.home,
                    hidden=row.hidden,
                    read_twice=row.read_twice,
                    numbered_accounts=row.numbered_accounts,
                    mark=self._expected_mark(row),
                    disks=self._known_disks(row),
                )
                for row in self.policy.collections
            ],
            own_places=self._own_places,
            key_records=self._key_records,
            log_form=form_now(),
            log_level=logging.root.level,
        )
