"""``towpath task``: list, watch, change and cancel tasks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from agent.cli.command import with_relay
from agent.cli.output import Column, Output, field, moment, person
from agent.cli.progress import beside, progress_of
from agent.cli.relay_client import document_of
from agent.cli.submission import bandwidth_option, deadline_option, finish, patience_from, waiting_options
from agent.cli.waiting import watch
from agent.exit_codes import who_can_mend
from agent.limits.rate import rate_text
from agent.quantities import human_bytes
from protocol.subcommands import Subcommands

if TYPE_CHECKING:
    from agent.cli.relay_client import Relay

MAX_ROWS = 100_000
CANCELS_AT_ONCE = 8

TASK_COLUMNS = (
    field("Task ID", "task_id", whole=True),
    field("Status", "status"),
    field("Type", "type"),
    field("Source", "source_endpoint_display_name"),
    field("Destination", "destination_endpoint_display_name"),
    moment("Requested (UTC)", "request_time"),
    field("Label", "label"),
)
EVENT_COLUMNS = (
    field("Time", "time"),
    field("Code", "code"),
    Column("Error", lambda event: "yes" if event.get("is_error") else "no"),
    Column("Description", lambda event: event.get("description") or ""),
    Column("Details", lambda event: event_details(event.get("details"))),
)
SUCCESSFUL_COLUMNS = (
    field("Source path", "source_path"),
    field("Destination path", "destination_path"),
    field("Size", "size", right=True),
    field("Algorithm", "checksum_algorithm"),
    field("Checksum", "checksum"),
)
SKIPPED_COLUMNS = (
    field("Source path", "source_path"),
    field("Destination path", "destination_path"),
    field("Error", "error_code"),
    field("Details", "error_details"),
)
_PAUSABLE = {
    "pause_ls": "ls",
    "pause_mkdir": "mkdir",
    "pause_rename": "rename",
    "pause_symlink": "symlink",
    "pause_task_delete": "delete",
    "pause_task_transfer_read": "transfer from",
    "pause_task_transfer_write": "transfer to",
}


def event_details(details: object) -> str:
    """An event's details on one line; JSON objects as ``name=value`` pairs."""
    text = str(details or "")
    try:
        document = json.loads(text)
    except ValueError:
        return " ".join(text.split())
    if isinstance(document, dict):
        return " ".join(f"{name}={value}" for name, value in document.items())
    return " ".join(text.split())


@click.group(cls=Subcommands)
def task() -> None:
    """List, watch, change and cancel tasks."""


def _identifier(function: Any) -> Any:
    return click.argument("task_id", type=click.UUID)(function)


@task.command("list")
@click.option("--limit", type=click.IntRange(min=1, max=1000), default=20, show_default=True, help="At most so many.")
@click.option("--status", "statuses", multiple=True, type=click.Choice(["ACTIVE", "INACTIVE", "SUCCEEDED", "FAILED"]))
@click.option("--type", "kind", type=click.Choice(["TRANSFER", "DELETE"]))
@click.option("--label", "labels", multiple=True, metavar="GLOB", help="Only tasks whose label matches.")
@with_relay
def list_tasks(
    relay: Relay, out: Output, limit: int, statuses: tuple[str, ...], kind: str | None, labels: tuple[str, ...]
) -> None:
    """List your tasks, the newest first."""
    clauses = [f"type:{kind}" if kind else "type:TRANSFER,DELETE"]
    if statuses:
        clauses.append("status:" + ",".join(statuses))
    if labels:
        clauses.append("label:" + ",".join(f"~{label}" for label in labels))
    answer = relay.transfer.task_list(limit=limit, orderby="request_time DESC", filter="/".join(clauses))
    out.table(answer.data, list(answer), TASK_COLUMNS)


@task.command()
@_identifier
@click.option("-t", "--successful-transfers", is_flag=True, help="List what has been transferred, also while it runs.")
@click.option("--skipped-errors", is_flag=True, help="List what was left out, and why.")
@with_relay
def show(relay: Relay, out: Output, task_id: Any, successful_transfers: bool, skipped_errors: bool) -> None:
    """Show one task."""
    if successful_transfers and skipped_errors:
        raise click.UsageError("--successful-transfers and --skipped-errors cannot be shown together.")
    if successful_transfers or skipped_errors:
        pages = relay.transfer.paginated
        listed = (
            pages.task_successful_transfers(task_id) if successful_transfers else pages.task_skipped_errors(task_id)
        )
        rows = list(itertools.islice(listed.items(), MAX_ROWS))
        columns = SUCCESSFUL_COLUMNS if successful_transfers else SKIPPED_COLUMNS
        out.table({"DATA": rows}, rows, columns)
        return
    document = relay.transfer.get_task(task_id)
    out.record(document_of(document), _task_rows(document_of(document)))


def _task_rows(document: Mapping[str, Any]) -> list[tuple[str, object]]:
    names = [
        ("Label", "label"),
        ("Task ID", "task_id"),
        ("Type", "type"),
        ("Status", "status"),
        ("Condition", "nice_status"),
        ("Details", "nice_status_details"),
        ("Mended by", "who"),
        ("Paused", "is_paused"),
        ("Requested", "request_time"),
        ("Completed", "completion_time"),
        ("Deadline", "deadline"),
        ("Source", "source_endpoint_display_name"),
        ("Destination", "destination_endpoint_display_name"),
        ("Directories", "directories"),
        ("Files", "files"),
        ("Files transferred", "files_transferred"),
        ("Files skipped", "files_skipped"),
        ("Items left out", "subtasks_skipped_errors"),
        ("Faults", "faults"),
    ]
    shown = {**document, "who": person(who_can_mend(document))}
    rows: list[tuple[str, object]] = [(name, shown.get(key)) for name, key in names if key != "who" or shown[key]]
    progress = progress_of(document)
    total = "" if progress.bytes_total is None else f" of {human_bytes(progress.bytes_total)}"
    rows.append(("Bytes transferred", human_bytes(progress.bytes_done) + total))
    ours = document.get("towpath")
    if isinstance(ours, dict) and ours.get("path"):
        rows.append(("Path", ours["path"]))
    if isinstance(ours, dict) and ours.get("bandwidth_limit"):
        rows.append(("Bandwidth limit", rate_text(ours["bandwidth_limit"])))
    flow = beside(document).get("flow")
    if isinstance(flow, Mapping):
        rows += flow_rows(flow)
    rows.append(("Rate", f"{human_bytes(int(document.get('effective_bytes_per_second') or 0))}/s"))
    rows.append(("Sent again", human_bytes(int(beside(document).get("bytes_sent_again") or 0))))
    if document.get("delete_destination_extra"):
        rows.append(("Deleted at the destination", beside(document).get("deleted")))
    if document.get("symlinks") and "symlinks_transferred" in beside(document):
        rows.append(("Symlinks", f"{document['symlinks']}, {beside(document)['symlinks_transferred']} transferred"))
    kept = beside(document).get("hard_links_kept")
    if kept:
        rows.append(("Names that are hard links", kept))
    if beside(document).get("preserve_acls"):
        rows.append(("Access lists kept", beside(document).get("acls_kept") or 0))
    for key, title in _LEFT_OUT:
        if beside(document).get(key):
            rows.append((title, beside(document)[key]))
    error = document.get("fatal_error")
    if isinstance(error, Mapping):
        rows.append(("Fatal error", f"{error.get('code')}: {error.get('description')}"))
    return rows


# What of files is not at the destination as it was at the source, where there was any of it.
_LEFT_OUT = (
    ("hard_links", "Files with several names"),
    ("special_modes", "Without setuid or the like"),
    ("xattrs_left_out", "Without some extended attributes"),
    ("acls_not_kept", "Access lists not kept in full"),
    ("acls_refused", "Access lists refused by the file system"),
)


def flow_rows(flow: Mapping[str, Any]) -> list[tuple[str, object]]:
    """How the content flows at the moment: speed, what holds it up, and the lanes."""
    rows: list[tuple[str, object]] = [("Goodput now", f"{human_bytes(int(flow.get('goodput') or 0))}/s")]
    rows.append(("Files per second", f"{flow.get('files_per_second') or 0:.1f}"))
    held_up_by = str(flow.get("limited_by") or "")
    if flow.get("rate_limit"):
        held_up_by += f" ({rate_text(flow['rate_limit'])}, of the {flow.get('limit_of') or 'agent'})"
    rows.append(("Limited by", held_up_by.strip() or "unknown"))
    for lane in flow.get("lanes") or []:
        text = f"{human_bytes(int(lane.get('goodput') or 0))}/s"
        if lane.get("saved"):
            text += f", of which compression saved {human_bytes(int(lane['saved']))}/s"
        if lane.get("rtt") is not None:
            text += f", round trip {lane['rtt'] * 1000:.3g} ms"
        if lane.get("retransmissions"):
            text += f", {lane['retransmissions']} packets sent again"
        rows.append((f"Lane {lane.get('lane')}", text))
    return rows


@task.command()
@_identifier
@waiting_options
@with_relay
def wait(relay: Relay, out: Output, /, task_id: Any, **options: Any) -> None:
    """Watch a task until it ends. The exit code tells how it ended; Ctrl-C stops watching, not the task."""
    patience = patience_from(options)
    finish(relay, out, str(task_id), watch(relay, out, str(task_id), patience))


@task.command()
@click.argument("task_id", type=click.UUID, required=False)
@click.option("--all", "every", is_flag=True, help="All your tasks that have not ended.")
@with_relay
def cancel(relay: Relay, out: Output, task_id: Any, every: bool) -> None:
    """Cancel a task. What has been transferred stays."""
    if every == (task_id is not None):
        raise click.UsageError("Give either one task id or --all.")
    if not every:
        answer = relay.transfer.cancel_task(task_id)
        out.result(document_of(answer), answer["message"])
        return
    from concurrent.futures import ThreadPoolExecutor

    clauses = "type:TRANSFER,DELETE/status:ACTIVE,INACTIVE"
    found = [str(row["task_id"]) for row in relay.transfer.paginated.task_list(filter=clauses).items()]

    def cancelled(each: str) -> dict[str, Any]:
        return {"task_id": each, **document_of(relay.transfer.cancel_task(each))}

    # The relay answers when the agent has, or after some seconds: one after the other, many would take an hour.
    pool = ThreadPoolExecutor(CANCELS_AT_ONCE)
    try:
        results = list(pool.map(cancelled, found))
    finally:
        pool.shutdown(cancel_futures=True)
    if out.is_json:
        out.document({"results": results})
    elif not results:
        out.line("There is no task to cancel.")
    for result in [] if out.is_json else results:
        out.line(f"{result['task_id']}: {result.get('message')}")


@task.command()
@_identifier
@click.option("--label", help="A new label.")
@deadline_option
@bandwidth_option
@with_relay
def update(
    relay: Relay, out: Output, task_id: Any, label: str | None, deadline: str | None, bandwidth_limit: int | None
) -> None:
    """Change the label, the deadline or the limit of bandwidth of a task that has not ended."""
    given: tuple[tuple[str, Any], ...] = (("label", label), ("deadline", deadline))
    changes = {name: value for name, value in given if value is not None}
    if bandwidth_limit is not None:
        changes["towpath_bandwidth_limit"] = bandwidth_limit or None
    if not changes:
        raise click.UsageError("Give --label, --deadline or --bandwidth-limit.")
    answer = relay.transfer.update_task(task_id, {"DATA_TYPE": "task", **changes})
    out.result(document_of(answer), answer["message"])


@task.command("event-list")
@_identifier
@click.option("--limit", type=click.IntRange(min=1, max=1000), default=100, show_default=True, help="At most so many.")
@click.option("--filter-errors", is_flag=True, help="Only errors.")
@click.option("--filter-non-errors", is_flag=True, help="Only what is not an error.")
@with_relay
def event_list(
    relay: Relay, out: Output, task_id: Any, limit: int, filter_errors: bool, filter_non_errors: bool
) -> None:
    """List what has happened to a task, the newest first."""
    if filter_errors and filter_non_errors:
        raise click.UsageError("--filter-errors and --filter-non-errors leave nothing; give one of them.")
    query: dict[str, Any] = {}
    if filter_errors or filter_non_errors:
        query["filter"] = f"is_error:{int(filter_errors)}"
    answer = relay.transfer.task_event_list(task_id, limit=limit, query_params=query)
    out.table(answer.data, list(answer), EVENT_COLUMNS)


@task.command("pause-info")
@_identifier
@with_relay
def pause_info(relay: Relay, out: Output, task_id: Any) -> None:
    """Say who has paused a task, and why."""
    document = document_of(relay.transfer.task_pause_info(task_id))
    if out.is_json:
        out.document(document)
        return
    messages = [(name, text) for name, text in sorted(document.items()) if name.endswith("_message") and text]
    rules = list(document.get("pause_rules") or [])
    for name, text in messages:
        out.line(f"{name.removesuffix('_message').replace('_', ' ')}: {text}")
    for rule in rules:
        what = ", ".join(word for flag, word in _PAUSABLE.items() if rule.get(flag))
        out.line(f"{rule.get('endpoint_display_name')}: {what or 'nothing'} paused: {rule.get('message') or '-'}")
    if not rules and not messages:
        out.line(f"Nothing pauses task {task_id}.")


@task.command("generate-submission-id")
@with_relay
def generate_submission_id(relay: Relay, out: Output) -> None:
    """Make an id with which a submission happens once however often it is sent."""
    answer = relay.transfer.get_submission_id()
    out.result(document_of(answer), answer["value"])
