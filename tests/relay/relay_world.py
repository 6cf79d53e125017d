"""A relay without its port: real settings, keys, database and application, a clock that tests set, and HTTP into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from relay import server
from relay.auth import clients
from relay.auth.identities import Identity, add_identity
from relay.auth.scopes import AUTH_SERVER, TRANSFER_ALL, TRANSFER_SERVER
from relay.auth.tokens import IssuedToken, issue, open_session
from relay.settings import Settings
from relay.store.database import Store

START = 1_800_000_000.0


class SetClock:
    """Unix seconds that only move when a test says so."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@dataclass
class RelayWorld:
    """One relay and one HTTP client of it."""

    relay: server.Relay
    settings: Settings
    store: Store
    clock: SetClock
    http: httpx.AsyncClient

    async def client(self, name: str = "program") -> tuple[str, str]:
        """A new client identity: id and secret."""
        secret, digest = clients.new_digest()
        client, _ = await self.store.write(
            lambda connection: clients.add_client(connection, name=name, now=self.clock.now, digest=digest)
        )
        return client.id, secret

    async def user(self, username: str) -> Identity:
        """A new person."""
        return await self.store.write(
            lambda connection: add_identity(connection, username=username, now=self.clock.now, provider_id="p")
        )

    async def tokens(
        self, identity_id: str, client_id: str, scopes: dict[str, list[str]], *, refresh: bool = False
    ) -> dict[str, IssuedToken]:
        """Tokens by resource server, issued as the token endpoint does it."""
        sign_in = self.settings.sign_in

        def work(connection: Any) -> list[IssuedToken]:
            session_id = open_session(connection, identity_id=identity_id, client_id=client_id, now=self.clock.now)
            return issue(
                connection,
                session_id=session_id,
                identity_id=identity_id,
                client_id=client_id,
                scopes=scopes,
                now=self.clock.now,
                access_life=sign_in.access_token_life,
                refresh_life=sign_in.refresh_token_life if refresh else None,
            )

        return {token.resource_server: token for token in await self.store.write(work)}

    async def bearer(self, identity_id: str, client_id: str, server: str = TRANSFER_SERVER) -> dict[str, str]:
        """An Authorization header for one service."""
        names = {TRANSFER_SERVER: [TRANSFER_ALL], AUTH_SERVER: ["openid", "profile", "email"]}[server]
        issued = await self.tokens(identity_id, client_id, {server: names})
        return {"Authorization": f"Bearer {issued[server].access_token}"}
