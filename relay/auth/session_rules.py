"""What applications demand of who signs in: by policies that they name, and by what they are registered with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, select

from relay.auth.clients import Client
from relay.auth.step_up import Rule, Unsatisfiable
from relay.store.application_tables import policies, registrations


@dataclass(frozen=True)
class ProviderWishes:
    """Ids of providers: the one from which everybody must have an identity, and the one to offer first."""

    required: str | None = None
    preselected: str | None = None


def provider_wishes(connection: Connection, client: Client) -> ProviderWishes:
    """What an application is registered with. The copies of a native application are bound by it as well."""
    table = registrations.c
    row = connection.execute(
        select(table.required_idp, table.preselect_idp).where(table.client_id == (client.parent_id or client.id))
    ).first()
    return ProviderWishes() if row is None else ProviderWishes(row.required_idp, row.preselect_idp)


def rules_of(connection: Connection, policy_ids: Sequence[str]) -> list[Rule]:
    """What the policies with these ids demand. Raises `Unsatisfiable` for one that does not exist."""
    wanted = [policy_id.lower() for policy_id in policy_ids]
    known = {row.id: row for row in connection.execute(select(policies).where(policies.c.id.in_(wanted)))}
    for policy_id in wanted:
        if policy_id not in known:
            raise Unsatisfiable(f"There is no policy {policy_id[:100]} on this relay.")
    return [
        Rule(
            max_age=row.assurance_timeout,
            include=tuple(json.loads(row.domains_include or "[]")),
            exclude=tuple(json.loads(row.domains_exclude or "[]")),
            multi_factor=row.required_mfa,
        )
        for row in known.values()
    ]
