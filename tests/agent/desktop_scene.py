"""What an agent answers to those who show its state: a status, and one of its tasks."""

from __future__ import annotations

from typing import Any

TASK = "00000000-0000-4000-8000-0000000000b1"


def status(**changes: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "version": "1",
        "paused": False,
        "held_back": "",
        "config_problem": "",
        "update_available": "",
        "link": {"connected": True, "last_error": "", "relay_url": "https://relay.example"},
        "collections": [{"id": "c1", "name": "Data", "available": True, "reason": ""}],
        "tasks": [],
    }
    return document | changes


def task(**changes: Any) -> dict[str, Any]:
    counters = {
        "bytes_transferred": 250,
        "bytes_total": 1000,
        "files": 4,
        "files_transferred": 1,
        "scan_complete": True,
    }
    row = {"task_id": TASK, "state": "ACTIVE", "who": "", "status_sentence": "", "rate": 1e6, "counters": counters}
    return row | {"error_code": ""} | changes
