"""Engines that die while a large file is on its way, with some of its blocks in the journal."""

from __future__ import annotations

import pytest

from agent.storage.faulty import Call, Plan
from agent.transfer.basis.jobs import count_done
from agent.transfer.basis.journal_rows import PartialRow, bytes_done
from agent.transfer.books.journal import Journal
from agent.transfer.task_folder import JOURNAL
from tests.agent.engine_inside import Crashed, Engine


def after_blocks(monkeypatch: pytest.MonkeyPatch, count: int) -> Plan:
    """Everything dies at the first call after the commit that has so many blocks of a large file."""
    noted = durable = False
    put = Journal.put_partial

    def putting(journal: Journal, directory: int, name: bytes, row: PartialRow) -> None:
        nonlocal noted
        put(journal, directory, name, row)
        noted = noted or count_done(row.done) >= count

    def die(call: Call) -> int | None:
        nonlocal durable
        if durable:
            raise Crashed
        durable = noted and call.operation == "journal_commit"
        return None

    monkeypatch.setattr(Journal, "put_partial", putting)
    return die


def settled(engine: Engine) -> int:
    """Bytes of its parts that the journal counts on."""
    journal = Journal(engine.state / JOURNAL)
    try:
        return sum(bytes_done(row) for directory in range(-3, 4) for row in journal.partials(directory))
    finally:
        journal.abandon()
