"""A relay whose agents are in memory: people, collections, tasks, and both ends of every story in one hand."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import jwt
import trio
from sqlalchemy import Connection

from protocol.control import CollectionReport, EnrolAnswer, EnrolRequest
from protocol.identity import NodeKey
from protocol.ticket import TicketVerifier
from relay.api.enrol import router as enrol_router
from relay.api.transfer_routers import ROUTERS
from relay.app import create_app
from relay.audit.recorder import Recorder
from relay.auth.identities import Identity
from relay.services import Services
from relay.store.database import Store, _transact, companion
from relay.transfer import setup_keys
from relay.transfer.enrolment import AUDIENCE, RelayName, create_mapped_collection, redeem
from relay.transfer.steward import Steward
from tests.relay.fake_agents import FakeAgent, FakeRegistry

T = TypeVar("T")


class InlineStore(Store):
    """The real database without threads, so that a virtual clock knows when nothing is going on."""

    async def read(self, work: Callable[[Connection], T]) -> T:
        await trio.lowlevel.checkpoint()
        return _transact(self._reader, work)

    async def write(self, work: Callable[[Connection], T], *, aside: bool = False) -> T:
        await trio.lowlevel.checkpoint()
        return _transact(self._writer, work, None if aside else companion.get())


class Person:
    """One signed-in identity and its HTTP client."""

    def __init__(self, identity: Identity, headers: dict[str, str], http: httpx.AsyncClient) -> None:
        self.id = identity.id
        self.username = identity.username
        self.headers = headers
        self._http = http

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return await self._http.request(method, "/v0.10" + path, headers=self.headers, **options)

    async def get(self, route: str, /, **params: Any) -> dict[str, Any]:
        answer = await self.ask("GET", route, params=params)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def post(self, path: str, document: Any = None, *, status: int = 200) -> dict[str, Any]:
        answer = await self.ask("POST", path, json=document)
        assert answer.status_code == status, answer.text
        return dict(answer.json())

    async def put(self, path: str, document: Any, *, status: int = 200) -> dict[str, Any]:
        answer = await self.ask("PUT", path, json=document)
        assert answer.status_code == status, answer.text
        return dict(answer.json())

    async def delete(self, path: str, *, status: int = 200) -> dict[str, Any]:
        answer = await self.ask("DELETE", path)
        assert answer.status_code == status, answer.text
        return dict(answer.json())

    async def refused(self, method: str, path: str, status: int, code: str, **options: Any) -> str:
        """The request is refused in exactly this way; returns the sentence."""
        answer = await self.ask(method, path, **options)
        assert (answer.status_code, answer.json().get("code")) == (status, code), answer.text
        assert set(answer.json()) >= {"code", "message", "request_id", "resource"}
        return str(answer.json()["message"])


@dataclass
class TransferWorld:
    """The relay's services over fake agents."""

    services: Services
    registry: FakeRegistry
    http: httpx.AsyncClient
    base: Any

    @property
    def store(self) -> Store:
        return self.services.store

    @property
    def steward(self) -> Steward:
        return self.services.steward

    async def person(self, name: str) -> Person:
        identity = await self.base.user(f"{name}@example.org")
        client_id, _ = await self.base.client(f"{name}'s program")
        return Person(identity, await self.base.bearer(identity.id, client_id), self.http)

    async def collection(
        self, owner: Person, name: str, *, agent: FakeAgent | None = None, public: bool = False, **report: Any
    ) -> tuple[str, FakeAgent]:
        """A collection served by an agent, which is not linked yet."""
        agent = agent or FakeAgent()
        collection_id, setup_key = await create_mapped_collection(
            self.store,
            self.services.settings,
            owner.id,
            {"display_name": name, "public": public},
            now=self.services.clock(),
        )
        answer = await self.enrol(setup_key, agent.key, node_id=agent.node_id or None)
        agent.node_id, agent.endpoint_id = answer.node_id, answer.endpoint_id
        agent.collections = [*agent.collections, CollectionReport(id=collection_id, name=name, **report)]
        return collection_id, agent

    async def enrol(self, setup_key: str, key: NodeKey, *, node_id: str | None = None, **changes: Any) -> EnrolAnswer:
        """Redeem a setup key the way an agent does."""
        keys = self.services.keys
        request = enrol_request(setup_key, key, self.services.clock(), node_id=node_id)
        request = EnrolRequest(**{**{f: getattr(request, f) for f in request.__struct_fields__}, **changes})
        return await redeem(self.store, RelayName(keys.relay_id, keys.root_public_pem), request, self.services.clock())

    async def transfer(self, person: Person, source: str, destination: str, **more: Any) -> str:
        """Submit a transfer of one directory; returns the task id."""
        answer = await person.post("/transfer", transfer_document(source, destination, **more), status=202)
        return str(answer["task_id"])


def enrol_request(setup_key: str, key: NodeKey, now: float, *, node_id: str | None = None) -> EnrolRequest:
    claims = {"aud": AUDIENCE, "sub": setup_keys.digest(setup_key), "iat": int(now), "exp": int(now) + 300}
    proof = jwt.encode(claims, key.private_key, algorithm="EdDSA")
    return EnrolRequest(
        setup_key=setup_key, proof=proof, certificate=key.certificate_pem, node_id=node_id, hostname="host", version="1"
    )


def transfer_document(source: str, destination: str, /, **more: Any) -> dict[str, Any]:
    item = {
        "DATA_TYPE": "transfer_item",
        "source_path": "/~/data/",
        "destination_path": "/~/copy/",
        "recursive": True,
    }
    return {
        "DATA_TYPE": "transfer",
        "submission_id": str(uuid.uuid4()),
        "source_endpoint": source,
        "destination_endpoint": destination,
        "DATA": [item],
        **more,
    }


def delete_document(endpoint: str, /, **more: Any) -> dict[str, Any]:
    return {
        "DATA_TYPE": "delete",
        "submission_id": str(uuid.uuid4()),
        "endpoint": endpoint,
        "recursive": True,
        "DATA": [{"DATA_TYPE": "delete_item", "path": "/~/old"}],
        **more,
    }


@asynccontextmanager
async def open_world(
    base: Any, *, store: Store | None = None, clock: Callable[[], float] | None = None, run: bool = True
) -> AsyncIterator[TransferWorld]:
    """The application over a fake registry, with its steward at work (or not, with ``run`` false)."""
    registry = FakeRegistry()
    store, clock = store or base.store, clock or base.clock
    keys = base.relay.services.keys
    verifier = TicketVerifier(keys.relay_id, keys.root_public_pem)
    steward = Steward(store, registry, base.relay.services.signer, base.settings, clock, verifier=verifier)
    replaced: Any = {"store": store, "registry": registry, "steward": steward, "clock": clock}
    replaced["audit"] = Recorder(store, clock)
    services = dataclasses.replace(base.relay.services, **replaced)
    app = create_app(services, [*ROUTERS, enrol_router])
    transport = httpx.ASGITransport(app=app)
    async with (
        httpx.AsyncClient(transport=transport, base_url=base.settings.public_url) as http,
        trio.open_nursery() as nursery,
    ):
        if run:
            await nursery.start(steward.run)
        yield TransferWorld(services, registry, http, base)
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something that other tasks bring about."""
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.01)
