"""The authentication policies that applications refer to by their ids."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sqlalchemy import Connection, select

from relay.auth.step_up import Rule, Unsatisfiable
from relay.store.application_tables import policies


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
