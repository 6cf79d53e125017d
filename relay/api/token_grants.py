"""The token endpoint's answers: one method for each grant, each run in one transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from relay.auth import device, grants
from relay.auth.clients import Client
from relay.auth.codes import NotRedeemed, Redeemed, authentications_of, redeem_code
from relay.auth.grants import GrantRefused, Lives
from relay.auth.id_tokens import claims_of
from relay.auth.identities import select_by_ids
from relay.auth.scopes import AUTH_SERVER
from relay.auth.tokens import IssuedToken
from relay.refusal import ApiError
from relay.services import Services

DEVICE_CODE = "urn:ietf:params:oauth:grant-type:device_code"
DEPENDENT_TOKEN = "urn:globus:auth:grant_type:dependent_token"  # noqa: S105 - the name of a grant
GRANT_TYPES = ("authorization_code", "refresh_token", "client_credentials", DEVICE_CODE, DEPENDENT_TOKEN)

_POLL_SENTENCES: Mapping[device.PollError, str] = {
    "authorization_pending": "Nobody has allowed this yet; ask again.",
    "slow_down": "Ask less often.",
    "access_denied": "The person refused.",
    "expired_token": "The code has expired; begin anew.",
    "invalid_grant": "The device code is unknown or was used already.",
}


def refusal(error: GrantRefused) -> ApiError:
    """The answer to a refused grant. 401 for a dead one, as Globus answers: its clients then ask for a new login."""
    return ApiError(401 if error.code == "invalid_grant" else 400, error.code, str(error))


@dataclass(frozen=True)
class Giving:
    """One request at the token endpoint; ``now`` in Unix seconds."""

    services: Services
    client: Client
    form: Mapping[str, str]
    now: float

    def run(self, connection: Connection) -> Any:
        """The document to answer with, or a `GrantRefused` where what was written must stay.

        Raises `GrantRefused` and `ApiError`.
        """
        match self.form.get("grant_type"):
            case "authorization_code":
                return self._code(connection)
            case "refresh_token":
                return self._refresh(connection)
            case "client_credentials":
                return self._client(connection)
            case grant if grant == DEVICE_CODE:
                return self._device(connection)
            case grant if grant == DEPENDENT_TOKEN:
                return self._dependent(connection)
            case None:
                raise ApiError(400, "invalid_request", "The request names no grant_type.")
            case other:
                raise ApiError(400, "unsupported_grant_type", f"This relay does not know the grant {other[:100]!r}.")

    @property
    def _lives(self) -> Lives:
        sign_in = self.services.settings.sign_in
        return Lives(sign_in.access_token_life, sign_in.refresh_token_life)

    def _client(self, connection: Connection) -> dict[str, Any]:
        scope = self.form.get("scope", "")
        issued = grants.client_credentials(connection, self.client, scope, now=self.now, lives=self._lives)
        return grants.token_document(issued)

    def _refresh(self, connection: Connection) -> dict[str, Any] | GrantRefused:
        shown, scope = self.form.get("refresh_token", ""), self.form.get("scope", "")
        issued = grants.refresh(connection, self.client, shown, scope, now=self.now, lives=self._lives)
        if isinstance(issued, grants.Replayed):
            return GrantRefused("invalid_grant", "The refresh token was used before; sign in again.")
        return grants.token_document([issued])

    def _code(self, connection: Connection) -> dict[str, Any] | GrantRefused:
        redeemed = redeem_code(
            connection,
            self.client.id,
            self.form.get("code", ""),
            self.form.get("redirect_uri", ""),
            self.form.get("code_verifier"),
            self.now,
        )
        if isinstance(redeemed, NotRedeemed):
            return GrantRefused("invalid_grant", redeemed.sentence)
        issued = grants.authorization_code(connection, self.client, redeemed, now=self.now, lives=self._lives)
        return self._with_id_token(connection, redeemed, issued, redeemed.nonce)

    def _device(self, connection: Connection) -> dict[str, Any] | GrantRefused:
        answer = device.poll(connection, self.client.id, self.form.get("device_code", ""), self.now)
        if not isinstance(answer, device.Allowed):
            return GrantRefused(answer, _POLL_SENTENCES[answer])
        issued = grants.authorization_code(connection, self.client, answer, now=self.now, lives=self._lives)
        return self._with_id_token(connection, answer, issued, None)

    def _dependent(self, connection: Connection) -> list[dict[str, Any]]:
        if self.client.public or self.client.parent_id is not None:
            raise GrantRefused("unauthorized_client", "Only a service of its own gets dependent tokens.")
        issued = grants.dependent(
            connection,
            self.client,
            self.form.get("token", ""),
            self.form.get("scope", ""),
            offline=self.form.get("access_type") == "offline",
            now=self.now,
            lives=self._lives,
        )
        return [grants.single_document(token) for token in issued]

    def _with_id_token(
        self, connection: Connection, given: Redeemed | device.Allowed, issued: list[IssuedToken], nonce: str | None
    ) -> dict[str, Any]:
        document = grants.token_document(issued)
        scopes = frozenset(issued[0].scope.split())
        if issued[0].resource_server != AUTH_SERVER or "openid" not in scopes:
            return document
        identity = select_by_ids(connection, [given.identity_id])[given.identity_id]
        shown = authentications_of(connection, given.session_id)
        claims = claims_of(
            identity,
            issuer=self.services.settings.public_url,
            client_id=self.client.id,
            access_token=issued[0].access_token,
            nonce=nonce,
            authenticated=max((item.authenticated for item in shown.values()), default=self.now),
            scopes=scopes,
            provider_name=identity.username.rpartition("@")[2],
            now=self.now,
        )
        return {**document, "id_token": self.services.keys.id_token(claims)}
