"""Looking things up in the audit log: who did what since when."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from relay.audit import trail
from relay.auth.clients import client_names
from relay.auth.identities import select_by_ids


@dataclass(frozen=True, kw_only=True)
class Question:
    """What to look for: from a moment on (Unix seconds), by one identity, about a text that stands in the action or in
    a fact, only what did not succeed."""

    since: float = 0.0
    by: str | None = None
    about: str | None = None
    failed: bool = False

    def fits(self, document: dict[str, Any]) -> bool:
        """Whether an entry is asked for."""
        if self.by is not None and self.by not in (document["who"], document["client"]):
            return False
        if self.failed and document["outcome"] in ("done", "begun"):
            return False
        if self.about is None:
            return True
        wanted = self.about.lower()
        return any(wanted in text.lower() for text in (document["action"], *document["facts"].values()))


def find(connection: Connection, question: Question) -> Iterator[dict[str, Any]]:
    """The entries that fit, oldest first, with the names of who did it (``username``) and of the program used
    (``program``): null for nobody known."""
    for page in trail.pages(connection, since=question.since):
        fitting = [{"n": row.n, **json.loads(row.entry)} for row in page]
        fitting = [document for document in fitting if question.fits(document)]
        people = select_by_ids(connection, {one["who"] for one in fitting if one["who"]})
        programs = client_names(connection, {one["client"] for one in fitting if one["client"]})
        for one in fitting:
            username = people[one["who"]].username if one["who"] in people else None
            yield {**one, "username": username, "program": programs.get(one["client"])}
