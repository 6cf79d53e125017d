"""The task document of the Transfer API, and what Globus's words mean here.

Status: QUEUED, ACTIVE, WAITING and PAUSED of the agent are ACTIVE (clients take anything else for finished);
SUCCEEDED and FAILED are themselves; CANCELED is FAILED with an event CANCELED.

Subtasks: one for each file, directory and symlink found so far (for deletes: each thing found). Of these

- ``succeeded`` are copied, skipped because equal, made or deleted; when the task has come to its end (it has succeeded,
  or some of its items have failed), all the rest;
- ``skipped_errors`` and ``failed`` are those left out under ``skip_source_errors`` and those given up;
- what remains is ``retrying`` and ``pending`` while the task runs, ``canceled``, ``expired`` or ``failed`` after it
  ended that way. The parts always add up to ``total``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from relay.times import api_time
from relay.transfer import closed_owners
from relay.transfer.collection_documents import legacy_username
from relay.transfer.collections import Collection
from relay.transfer.task_rows import Task

COMMAND = "API 0.10"
CANCELED = "CANCELED"
DEADLINE_EXPIRED = "DEADLINE_EXPIRED"
ITEMS_FAILED = "ITEMS_FAILED"
OFFLINE = "GC_NOT_CONNECTED"


@dataclass(frozen=True)
class Surroundings:
    """What a task document needs beside the task: its collections, the moment, and who is connected.

    ``unseen`` are collections that the reader may not see now: they are called what they were when the task began.
    """

    collections: Mapping[str, Collection]
    now: float
    is_connected: Callable[[str], bool]
    unseen: frozenset[str] = frozenset()

    def offline(self, collection_id: str | None) -> bool:
        """Whether the agent of a collection cannot be asked now."""
        collection = self.collections.get(collection_id or "")
        return collection is None or collection.node_id is None or not self.is_connected(collection.node_id)


@dataclass(frozen=True)
class Holdup:
    """Why a task does not move: a code and a sentence; OK when it does."""

    code: str
    sentence: str
    who: str = ""


def holdup(task: Task, around: Surroundings) -> Holdup:
    """What to say of an unfinished task."""
    observed = task.last_observed
    if task.desired == "pause":
        return Holdup(closed_owners.CODE, closed_owners.sentence_of(task), closed_owners.WHO)
    if around.offline(task.worker_id):
        return _away(_name(task.worker_id, around), "destination")
    reported = "QUEUED" if observed is None else observed.status_code
    # Only when it matters: a transfer under way does not need its source's link to the relay.
    lacks_source = task.type == "TRANSFER" and (task.held_by == "source" or reported == "CONNECT_FAILED")
    if lacks_source and around.offline(task.source_id):
        return _away(_name(task.source_id, around), "source")
    if observed is None or reported == "QUEUED":
        return Holdup("Queued", "The task waits for its turn.")
    return Holdup(reported, observed.status_sentence, observed.who)


def _away(name: str | None, side: str) -> Holdup:
    return Holdup(
        OFFLINE, f"The agent of “{name}” is not connected; the task goes on when it is back.", f"{side} owner"
    )


def task_document(task: Task, around: Surroundings) -> dict[str, Any]:
    """A task as ``GET /task/<id>`` shows it to its owner."""
    options = task.task_options
    return {
        "DATA_TYPE": "task",
        "task_id": task.id,
        "type": task.type,
        "status": task.status,
        "label": task.label,
        "username": legacy_username(task.owner_id),
        "owner_id": task.owner_id,
        "request_time": api_time(task.requested),
        "completion_time": api_time(task.completed),
        "deadline": api_time(task.deadline),
        **_places(task, around),
        "sync_level": options.sync_level,
        "encrypt_data": options.encrypt_data,
        "verify_checksum": options.verify_checksum,
        "delete_destination_extra": options.delete_destination_extra,
        "recursive_symlinks": options.recursive_symlinks,
        "preserve_timestamp": options.preserve_timestamp,
        "skip_source_errors": options.skip_source_errors,
        "fail_on_quota_errors": options.fail_on_quota_errors,
        "filter_rules": [_rule(rule) for rule in options.filter_rules] or None,
        "command": COMMAND,
        "history_deleted": task.hidden,
        "canceled_by_admin": task.echo.get("canceled_by_admin"),
        "canceled_by_admin_message": task.echo.get("canceled_by_admin_message"),
        "source_base_path": task.echo.get("source_base_path"),
        "destination_base_path": task.echo.get("destination_base_path"),
        **_counts(task, around.now),
        **subtasks(task),
        **_condition(task, around),
    }


def _rule(rule: Any) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(rule)
    return {"DATA_TYPE": "filter_rule", **document}


def _name(collection_id: str | None, around: Surroundings) -> str | None:
    collection = around.collections.get(collection_id or "")
    return None if collection is None else collection.display_name


def name_for_reader(task: Task, collection_id: str | None, around: Surroundings) -> str | None:
    """What a collection of a task is called to its reader."""
    if collection_id not in around.unseen:
        return _name(collection_id, around)
    name: str | None = task.echo.get("names", {}).get(collection_id)
    return name


def _places(task: Task, around: Surroundings) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for side, collection_id in (("source", task.source_id), ("destination", task.destination_id)):
        collection = around.collections.get(collection_id or "")
        document[f"{side}_endpoint_id"] = collection_id
        document[f"{side}_endpoint_display_name"] = name_for_reader(task, collection_id, around)
        document[f"{side}_endpoint"] = (
            None if collection is None else f"{legacy_username(collection.owner_id)}#{collection.id}"
        )
        document[f"{side}_local_user"] = None
    return document


def _elapsed(task: Task, now: float) -> float:
    return max(1e-3, (task.completed or now) - task.requested)


def _counts(task: Task, now: float) -> dict[str, Any]:
    counters = task.counters
    elapsed = _elapsed(task, now)
    return {
        "files": counters.files,
        "directories": counters.directories,
        "symlinks": counters.symlinks,
        "files_skipped": counters.files_skipped,
        "files_transferred": counters.files_transferred,
        "bytes_transferred": counters.bytes_transferred,
        "bytes_checksummed": counters.bytes_checksummed,
        "effective_bytes_per_second": int(counters.bytes_transferred / elapsed),
        "faults": counters.faults,
    }


def subtasks(task: Task) -> dict[str, int]:
    """The ``subtasks_*`` keys, derived as the head of this file says."""
    counters = task.counters
    skipped, failed = counters.skipped_errors, counters.failed
    done = (
        counters.files_transferred
        + counters.files_skipped
        + counters.symlinks_transferred
        + counters.directories_created
        + counters.deleted
    )
    found = counters.files + counters.directories + counters.symlinks
    code = _failure_code(task)
    if task.status == "SUCCEEDED" or code == ITEMS_FAILED:
        done = max(done, found - skipped - failed)
    total = max(found, done + skipped + failed)
    rest = total - done - skipped - failed
    retrying = min(counters.retrying, rest) if not task.finished else 0
    ended = task.status == "FAILED"
    return {
        "subtasks_total": total,
        "subtasks_succeeded": done,
        "subtasks_pending": 0 if task.finished else rest - retrying,
        "subtasks_retrying": retrying,
        "subtasks_canceled": rest if ended and code == CANCELED else 0,
        "subtasks_expired": rest if ended and code == DEADLINE_EXPIRED else 0,
        "subtasks_failed": failed + (rest if ended and code not in (CANCELED, DEADLINE_EXPIRED) else 0),
        "subtasks_skipped_errors": skipped,
    }


def _failure_code(task: Task) -> str:
    return str(json.loads(task.fatal_error)["code"]) if task.fatal_error else ""


def _condition(task: Task, around: Surroundings) -> dict[str, Any]:
    document: dict[str, Any] = {
        "is_ok": None,
        "is_paused": False,
        "nice_status": None,
        "nice_status_short_description": None,
        "nice_status_details": None,
        "nice_status_expires_in": None,
        "fatal_error": None if task.fatal_error is None else json.loads(task.fatal_error),
    }
    holding = Holdup("OK", "")
    if not task.finished:
        holding = holdup(task, around)
        document["is_ok"] = holding.code in ("OK", "Queued")
        document["is_paused"] = task.state == "PAUSED" or task.desired == "pause"
        document["nice_status"] = holding.code
        document["nice_status_short_description"] = holding.code.replace("_", " ").lower().capitalize()
        document["nice_status_details"] = holding.sentence or None
    document["towpath"] = _ours(task, around, holding)
    return document


def _ours(task: Task, around: Surroundings, holding: Holdup) -> dict[str, Any]:
    """What stands beside the fields of Globus: live progress, and who can mend what holds the task up."""
    observed, options, counters = task.last_observed, task.task_options, task.counters
    # What an agent that is away said last of its speed holds no more.
    live = None if task.finished or around.offline(task.worker_id) else observed
    return {
        "state": task.state,
        "who": holding.who,
        # Seconds since it was requested, or until it was over.
        "elapsed": round(_elapsed(task, around.now), 6),
        "bytes_total": counters.bytes_total,
        "bytes_sent_again": counters.bytes_sent_again,
        # Files and folders: of a delete, or what a mirror found only at its destination.
        "deleted": counters.deleted,
        "symlinks_transferred": counters.symlinks_transferred,
        "preserve_hard_links": options.preserve_hard_links,
        "hard_links": counters.hard_links,
        "hard_links_kept": counters.hard_links_kept,
        "special_modes": counters.special_modes,
        "preserve_xattrs": options.preserve_xattrs,
        "xattrs_left_out": counters.xattrs_left_out,
        "preserve_acls": options.preserve_acls,
        "acls_kept": counters.acls_kept,
        "acls_not_kept": counters.acls_not_kept,
        "acls_refused": counters.acls_refused,
        "scan_complete": counters.scan_complete,
        "rate": 0.0 if live is None else live.rate,
        "current": "" if live is None else live.current,
        "path": "" if observed is None else observed.path,
        "relay": options.relay_path,
        "transport": options.transport,
        "compression": options.compression,
        "bandwidth_limit": options.bandwidth_limit,
        "flow": None if live is None or live.flow is None else msgspec.to_builtins(live.flow),
        "item_count": task.item_count,
    }
