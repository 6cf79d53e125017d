"""The identity providers of this relay: itself, those of its configuration, and the one of all programs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from relay.auth.clients import Client
from relay.auth.identities import CLIENT_DOMAIN, CLIENT_PROVIDER_ID, Identity, provider_id_of
from relay.auth.session_rules import ProviderWishes
from relay.auth.step_up import Unsatisfiable
from relay.auth.upstream import provider_identity_id
from relay.settings import Settings


@dataclass(frozen=True)
class IdentityProvider:
    """Who vouches for usernames. ``sign_in`` is the id under which the configuration names it; None: it has no page."""

    id: str
    name: str
    short_name: str
    domains: tuple[str, ...]
    sign_in: str | None = None


def named_after(provider_id: str, domain: str) -> IdentityProvider:
    """A provider of which nothing but its domain is known."""
    return IdentityProvider(provider_id, domain, domain.partition(".")[0], (domain,))


def identity_providers(settings: Settings) -> list[IdentityProvider]:
    """All providers, this relay first."""
    return [
        named_after(provider_id_of(settings.user_domain), settings.user_domain),
        named_after(CLIENT_PROVIDER_ID, CLIENT_DOMAIN),
        *(
            IdentityProvider(
                provider_identity_id(provider),
                provider.name,
                provider.id,
                tuple(domain for domain in provider.domains if domain != "*"),
                provider.id,
            )
            for provider in settings.sign_in.providers
        ),
    ]


def check_provider(settings: Settings, client: Client, wishes: ProviderWishes, person: Iterable[Identity]) -> None:
    """Whether a person may use an application at all: with an identity of the provider that it demands.

    Raises `Unsatisfiable`.
    """
    if wishes.required is None or any(identity.provider_id == wishes.required for identity in person):
        return
    names = {one.id: one.name for one in identity_providers(settings)}
    name = names.get(wishes.required, "a provider that this relay no longer has")
    raise Unsatisfiable(f"{client.name} is for people with an identity of {name}; link yours on the account page.")


def sign_in_provider_ids(settings: Settings) -> frozenset[str]:
    """The ids of those that people can sign in with."""
    offered = [one for one in identity_providers(settings) if one.id != CLIENT_PROVIDER_ID]
    return frozenset(one.id for one in offered if one.sign_in is not None or settings.sign_in.local_accounts)
