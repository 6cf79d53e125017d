"""What ``transfer``, ``delete`` and ``rm`` have in common: the options of a submission and how it is made."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import click

from agent.cli.failures import exit_with
from agent.cli.output import Output
from agent.cli.relay_client import document_of
from agent.cli.waiting import Patience, Waited, outcome_sentence, troubles, watch
from agent.exit_codes import ExitCode
from agent.limits.rate import parse_rate

if TYPE_CHECKING:
    from globus_sdk import DeleteData, TransferData

    from agent.cli.relay_client import Relay

C = TypeVar("C", bound=Callable[..., Any])

_SPAN = re.compile(r"\+(\d{1,6})([smhd])")
_SPAN_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_NOTIFICATIONS = ("succeeded", "failed", "inactive")


@dataclass(frozen=True)
class Submission:
    """The options every submission has."""

    label: str | None = None
    deadline: str | None = None
    submission_id: str | None = None
    dry_run: bool = False
    notify: Mapping[str, bool] | None = None
    wait: bool = False
    patience: Patience = field(default_factory=Patience)


def parse_deadline(text: str, now: datetime) -> str:
    """A deadline as the service takes it: an ISO time (UTC unless it says otherwise) or a span such as ``+2h``.

    Raises ValueError with a sentence for the user.
    """
    span = _SPAN.fullmatch(text.strip())
    if span:
        moment = now + timedelta(**{_SPAN_UNITS[span[2]]: int(span[1])})
    else:
        try:
            moment = datetime.fromisoformat(text.strip())
        except ValueError:
            raise ValueError(f"{text!r} is neither a time such as 2030-01-31T18:00 nor a span such as +12h.") from None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
    if moment <= now:
        raise ValueError(f"The deadline {text} has already passed.")
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def parse_notify(text: str) -> dict[str, bool]:
    """``on``, ``off`` or a comma list of succeeded, failed, inactive. Raises ValueError with a sentence."""
    words = {word.strip().lower() for word in text.split(",") if word.strip()}
    if words == {"on"}:
        return {f"notify_on_{name}": True for name in _NOTIFICATIONS}
    if words == {"off"}:
        return {f"notify_on_{name}": False for name in _NOTIFICATIONS}
    if not words or not words <= set(_NOTIFICATIONS):
        raise ValueError(f"{text!r} is neither on nor off nor a comma list of {', '.join(_NOTIFICATIONS)}.")
    return {f"notify_on_{name}": name in words for name in _NOTIFICATIONS}


def _deadline_option(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    try:
        return parse_deadline(value, datetime.now(UTC))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _notify_option(_context: click.Context, _parameter: click.Parameter, value: str | None) -> dict[str, bool] | None:
    if value is None:
        return None
    try:
        return parse_notify(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def deadline_option(command: C) -> C:
    """Add ``--deadline``."""
    return click.option(
        "--deadline",
        metavar="TIME",
        callback=_deadline_option,
        help="End the task after this time (UTC) or span (+2h).",
    )(command)


def _bandwidth_option(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    if value is None or value == "none":
        return None if value is None else 0
    try:
        return parse_rate(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from error


def bandwidth_option(command: C) -> C:
    """Add ``--bandwidth-limit``: bytes a second, 0 for none."""
    return click.option(
        "--bandwidth-limit",
        metavar="RATE",
        callback=_bandwidth_option,
        help="The most the task may move, such as '20 MB/s' or '200 Mbit/s'; none: as much as its agents allow.",
    )(command)


def waiting_options(command: C) -> C:
    """Add the options that say how long to wait and how often to ask."""
    command = click.option(
        "--keep-waiting", is_flag=True, help="Go on waiting while the task needs somebody's attention."
    )(command)
    command = click.option(
        "--polling-interval", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Seconds."
    )(command)
    return click.option("--timeout", type=click.FloatRange(min=0), help="Stop waiting after so many seconds.")(command)


def submission_options(command: C) -> C:
    """Add the options every submission has."""
    command = waiting_options(command)
    command = click.option("--wait", is_flag=True, help="Watch the task until it ends.")(command)
    command = click.option(
        "--notify", metavar="WHEN", callback=_notify_option, help="on, off or a list of succeeded,failed,inactive."
    )(command)
    command = click.option("--dry-run", is_flag=True, help="Show what would be submitted and submit nothing.")(command)
    command = click.option(
        "--submission-id",
        type=click.UUID,
        help="Submit once however often this is run; see `towpath task generate-submission-id`.",
    )(command)
    command = deadline_option(command)
    return click.option("--label", help="A name for the task.")(command)


def submission_from(options: dict[str, Any]) -> Submission:
    """Take the options of `submission_options` out of a command's options."""
    identifier = options.pop("submission_id")
    return Submission(
        label=options.pop("label"),
        deadline=options.pop("deadline"),
        submission_id=None if identifier is None else str(identifier),
        dry_run=options.pop("dry_run"),
        notify=options.pop("notify"),
        wait=options.pop("wait"),
        patience=patience_from(options),
    )


def patience_from(options: dict[str, Any]) -> Patience:
    """Take the options of `waiting_options` out of a command's options."""
    return Patience(
        timeout=options.pop("timeout"),
        interval=options.pop("polling_interval"),
        despite_attention=options.pop("keep_waiting"),
    )


def common_fields(submission: Submission) -> dict[str, Any]:
    """The submission's options as fields of a transfer or delete document; what was not given is left out."""
    fields: dict[str, Any] = dict(submission.notify or {})
    for name in ("label", "deadline", "submission_id"):
        value = getattr(submission, name)
        if value is not None:
            fields[name] = value
    return fields


def submit(relay: Relay, out: Output, data: TransferData | DeleteData, submission: Submission) -> None:
    """Submit a task (or show it, for a dry run), and watch it when asked. Ends with the task's exit code.

    The client library asks for a submission id where none is given, so a lost answer never makes two tasks.
    """
    if submission.dry_run:
        out.document(_without_missing(data))
        return
    transfer = data["DATA_TYPE"] == "transfer"
    answer = relay.transfer.submit_transfer(data) if transfer else relay.transfer.submit_delete(data)
    task_id = str(answer["task_id"])
    if not submission.wait:
        if out.is_json:
            out.document(document_of(answer))
        else:
            out.line(answer["message"])
            out.line(f"Task ID: {task_id}")
        return
    if not out.is_json:
        out.remark(f"Task ID: {task_id}")
    finish(relay, out, task_id, watch(relay, out, task_id, submission.patience))


def _without_missing(value: Any) -> Any:
    """A document as it would be sent: without the places that were left empty."""
    from globus_sdk import MISSING

    if isinstance(value, Mapping):
        return {key: _without_missing(each) for key, each in value.items() if each is not MISSING}
    if isinstance(value, list):
        return [_without_missing(each) for each in value]
    return value


def finish(relay: Relay, out: Output, task_id: str, waited: Waited) -> None:
    """Write how a wait ended and end the command with its exit code."""
    if waited.code is not ExitCode.INTERRUPTED:
        if out.is_json:
            out.document(waited.task)
        else:
            out.line(outcome_sentence(task_id, waited))
            if waited.code in (ExitCode.FAILED, ExitCode.PARTIAL):
                for line in troubles(relay, task_id):
                    out.line(line)
    exit_with(waited.code)
