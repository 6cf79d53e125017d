"""What the relay's HTTP layer stands on: the long-lived objects, put together once by `relay.server`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from fastapi import Request

if TYPE_CHECKING:
    from protocol.ticket import TicketSigner
    from relay.audit.recorder import Recorder
    from relay.auth.clients import SecretChecker
    from relay.auth.guesses import GuessLimit
    from relay.auth.passkeys import AnsweredChallenges
    from relay.auth.passwords import PasswordChecker
    from relay.auth.upstream import Upstream
    from relay.keys import RelayKeys
    from relay.quota.allowance import Allowance
    from relay.refusal import ApiError
    from relay.rendezvous.registry import Registry
    from relay.settings import Settings
    from relay.store.batch import Batch
    from relay.store.database import Store
    from relay.transfer.collections import Decision, Question
    from relay.transfer.steward import Steward


@dataclass(frozen=True, kw_only=True)
class Services:
    """Held in ``app.state.services``. ``clock`` gives Unix seconds.

    ``guesses`` counts wrong secrets by address and client, ``crowd_guesses`` by address alone;
    ``requests`` counts what each person asks for, ``provisions`` whom they had an identity made for, ``departures`` who
    was sent to a provider from each address. ``decisions`` decides again about calls to agents that take long: few at a
    time, so that requests find the database free however many wait.
    """

    settings: Settings
    store: Store
    keys: RelayKeys
    signer: TicketSigner
    registry: Registry
    steward: Steward
    secrets: SecretChecker
    passwords: PasswordChecker
    passkey_answers: AnsweredChallenges
    upstreams: Mapping[str, Upstream]
    guesses: GuessLimit
    crowd_guesses: GuessLimit
    audit: Recorder
    requests: Allowance
    provisions: Allowance
    departures: Allowance
    decisions: Batch[Question, Decision | ApiError]
    clock: Callable[[], float]

    @property
    def own_provider_id(self) -> str:
        """The id of this relay as the provider of its own accounts."""
        from relay.auth.identities import provider_id_of

        return provider_id_of(self.settings.user_domain)


async def services_here(request: Request) -> Services:
    """The same as a dependency of FastAPI, which would run a plain function in a thread for each request."""
    return services_of(request)


def services_of(request: Request) -> Services:
    """The services of the application that answers this request. Call it directly."""
    return cast("Services", request.app.state.services)
