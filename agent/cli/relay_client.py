"""One relay as the commands see it: globus-sdk clients for a profile, nothing private beside them.

Base URL and certificate authority are given to every client explicitly, so the variables that point other Globus
tools elsewhere cannot redirect ours half-way. Access tokens are kept between commands in a file of this user alone.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from agent.cli.location import Location, Place, resolve
from agent.cli.output import CommandFailed
from agent.cli.profile import (
    Profile,
    Tokens,
    check_ca_file,
    choose_profile,
    load_profile,
    profile_path,
    save_profile,
    token_path,
)

if TYPE_CHECKING:
    from globus_sdk import AuthClient, ClientApp, ConfidentialAppAuthClient, GlobusHTTPResponse, TransferClient
    from globus_sdk.token_storage import TokenStorage
    from globus_sdk.transport import RequestsTransport, RetryConfig

MAX_RETRIES = 2


class Relay:
    """A signed-in connection to one relay. Close it (or use ``with``) when done; calls may block.

    ``save`` keeps a person's profile when its tokens were renewed.

    Raises `CommandFailed` when the profile's CA file cannot be used.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        token_file: Path | None = None,
        http_timeout: float = 60.0,
        save: Callable[[Profile], object] | None = None,
    ) -> None:
        from globus_sdk import AuthClient, TransferClient

        if profile.ca_file is not None:
            check_ca_file(profile.ca_file)
        self.profile = profile
        self._http_timeout = http_timeout
        self._transports: list[RequestsTransport] = []
        self._storage = _token_storage(None if profile.tokens or profile.token else token_file)
        self._save = save
        self._login_client: ConfidentialAppAuthClient | None = None
        self._app: ClientApp | None = None
        self.transfer: TransferClient = TransferClient(
            base_url=profile.relay_url,
            transport=self._transport(),
            retry_config=_retry_config(),
            **self._identity("transfer.api.globus.org"),
        )
        self.auth: AuthClient = AuthClient(
            base_url=profile.relay_url + "/",
            transport=self._transport(),
            retry_config=_retry_config(),
            **self._identity("auth.globus.org"),
        )

    # --- who one is ----------------------------------------------------------------------------------------

    def _identity(self, server: str) -> dict[str, Any]:
        """As whom a client of one service signs its requests."""
        from globus_sdk import AccessTokenAuthorizer, RefreshTokenAuthorizer

        if self.profile.token is not None:
            return {"authorizer": AccessTokenAuthorizer(self.profile.token)}
        if self.profile.tokens is None:
            return {"app": self._client_app()}
        tokens = self.profile.tokens.get(server)
        if tokens is None:
            raise CommandFailed("The stored profile is incomplete; run `towpath login` again.")
        return {
            "authorizer": RefreshTokenAuthorizer(
                tokens.refresh,
                self._client(),
                access_token=tokens.access,
                expires_at=int(tokens.expires),
                on_refresh=lambda answer: self._refreshed(server, answer.by_resource_server[server]),
            )
        }

    def _refreshed(self, server: str, answer: Mapping[str, Any]) -> None:
        """Keep new tokens, for this command and the next."""
        assert self.profile.tokens is not None
        former = self.profile.tokens[server]
        renewed = Tokens(
            str(answer["access_token"]),
            str(answer.get("refresh_token") or former.refresh),
            float(answer["expires_at_seconds"]),
        )
        self.profile = replace(self.profile, tokens={**self.profile.tokens, server: renewed})
        if self._save is not None:
            self._save(self.profile)

    def _client(self) -> ConfidentialAppAuthClient:
        from globus_sdk import ConfidentialAppAuthClient

        if self._login_client is None:
            self._login_client = ConfidentialAppAuthClient(
                self.profile.client_id,
                self.profile.client_secret,
                environment="production",
                base_url=self.profile.relay_url + "/",
                transport=self._transport(),
                retry_config=_retry_config(),
            )
        return self._login_client

    def _client_app(self) -> ClientApp:
        from globus_sdk import ClientApp, GlobusAppConfig

        if self._app is None:
            self._app = ClientApp(
                "towpath",
                login_client=self._client(),
                config=GlobusAppConfig(token_storage=self._storage, environment="production"),
            )
        return self._app

    def _transport(self) -> RequestsTransport:
        from globus_sdk.transport import RequestsTransport

        transport = RequestsTransport(verify_ssl=self.profile.ca_file or True, http_timeout=self._http_timeout)
        transport.user_agent = "towpath"
        self._transports.append(transport)
        return transport

    # --- names ---------------------------------------------------------------------------------------------

    def bookmarks(self) -> Sequence[Mapping[str, Any]]:
        """All bookmarks of the caller."""
        return list(self.transfer.bookmark_list()["DATA"])

    def collections_named(self, name: str) -> Sequence[Mapping[str, Any]]:
        """Visible collections that match a text; at most the first thousand, as the service pages."""
        return list(self.transfer.paginated.endpoint_search(filter_fulltext=name, filter_scope="all").items())

    def find(self, location: Location) -> Place:
        """The collection and path a location names."""
        return resolve(location, self)

    # --- the end -------------------------------------------------------------------------------------------

    def sign_out(self) -> None:
        """Revoke what is kept at the relay; a person's copy of the application goes as a whole."""
        if self.profile.tokens is not None:
            self._client().delete(f"/v2/api/clients/{self.profile.client_id}")
        elif self.profile.token is None:
            self._client_app().logout()

    def close(self) -> None:
        """Close all connections and the token store. May be called twice."""
        self.transfer.close()
        self.auth.close()
        if self._app is not None:
            self._app.close()
        for transport in self._transports:
            transport.close()
        self._storage.close()

    def __enter__(self) -> Relay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _token_storage(path: Path | None) -> TokenStorage:
    """Where tokens are kept: SQLite, because two commands may run at once, or memory only."""
    from globus_sdk.token_storage import MemoryTokenStorage, SQLiteTokenStorage

    if path is None:
        return MemoryTokenStorage()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        # A home that cannot be written to.
        return MemoryTokenStorage()
    try:
        # The library's own object cannot be closed when it fails to open, so the file is looked at first.
        if path.exists():
            with contextlib.closing(sqlite3.connect(path)) as database:
                database.execute("SELECT count(*) FROM token_storage").fetchone()
        # Commands that ask several things at once renew tokens in whichever thread finds that it is time.
        storage = SQLiteTokenStorage(path, connect_params={"check_same_thread": False})
        path.chmod(0o600)
    except sqlite3.Error:
        return _without_storage(path)
    try:
        storage.get_token_data_by_resource_server()
    except (sqlite3.Error, ValueError):
        storage.close()
        return _without_storage(path)
    return storage


def _without_storage(path: Path) -> TokenStorage:
    """It only saves a request; a damaged one is thrown away, and the next command begins a new one."""
    from globus_sdk.token_storage import MemoryTokenStorage

    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    return MemoryTokenStorage()


def _retry_config() -> RetryConfig:
    """Retry what may pass by itself, twice; a certificate that is not trusted will not be trusted next second."""
    from globus_sdk.transport import RetryCheckResult, RetryConfig, RetryContext
    from requests.exceptions import SSLError

    config = RetryConfig(max_retries=MAX_RETRIES, max_sleep=5)

    def never_after_tls_failure(context: RetryContext) -> RetryCheckResult:
        if isinstance(context.exception, SSLError):
            return RetryCheckResult.do_not_retry
        return RetryCheckResult.no_decision

    config.checks.register_check(never_after_tls_failure)
    return config


def document_of(answer: GlobusHTTPResponse) -> Mapping[str, Any]:
    """The JSON object of an answer. Raises `CommandFailed` when the relay sent something else."""
    if not isinstance(answer.data, Mapping):
        raise CommandFailed("The relay answered in a form that cannot be read; is it really a Towpath relay?")
    return answer.data


def current_profile(environment: Mapping[str, str]) -> Profile:
    """The profile that the environment and the stored profile together name."""
    return choose_profile(environment, load_profile(profile_path(environment)))


@contextmanager
def open_relay(environment: Mapping[str, str]) -> Iterator[Relay]:
    """The relay of the current profile, with tokens kept between commands."""
    profile = current_profile(environment)
    path = profile_path(environment)
    with Relay(
        profile, token_file=token_path(environment, profile), save=lambda renewed: save_profile(path, renewed)
    ) as relay:
        yield relay
