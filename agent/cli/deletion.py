"""Deleting on a collection: ``rm`` waits until it is done, ``delete`` submits a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

import click

from agent.cli.batch import BatchError, parse_delete_batch
from agent.cli.command import with_relay
from agent.cli.location import Location, LocationType, Place
from agent.cli.output import Output
from agent.cli.submission import Submission, common_fields, submission_from, submission_options, submit

if TYPE_CHECKING:
    from globus_sdk import DeleteData

    from agent.cli.relay_client import Relay


def delete_data(
    place: Place,
    paths: Sequence[str],
    submission: Submission,
    *,
    recursive: bool,
    ignore_missing: bool,
    interpret_globs: bool,
    local_user: str | None,
) -> DeleteData:
    """The delete document."""
    from globus_sdk import MISSING, DeleteData

    data = DeleteData(
        place.collection_id,
        recursive=recursive,
        ignore_missing=ignore_missing,
        interpret_globs=interpret_globs,
        local_user=MISSING if local_user is None else local_user,
        additional_fields=common_fields(submission),
    )
    for path in paths:
        data.add_item(path)
    return data


@click.command()
@click.argument("location", type=LocationType(path_required=True))
@click.option("-r", "--recursive", is_flag=True, help="A directory with all that is in it.")
@click.option("-f", "--ignore-missing", is_flag=True, help="Nothing there is not an error.")
@click.option(
    "--globs/--no-globs",
    default=None,
    help="Whether * ? [] in the last name match. Default: unless something is called just so.",
)
@click.option("--local-user", help="The local user on the collection's machine.")
@submission_options
@with_relay
def rm(relay: Relay, out: Output, /, location: Location, **options: Any) -> None:
    """Delete something and wait until it is gone. The exit code tells how that ended."""
    submission = replace(submission_from(options), wait=True)
    place = relay.find(location)
    wanted = options.pop("globs")
    globs = _is_pattern(relay, out, place) if wanted is None else wanted
    data = delete_data(place, [place.path or ""], submission, interpret_globs=globs, **options)
    submit(relay, out, data, submission)


def _is_pattern(relay: Relay, out: Output, place: Place) -> bool:
    """Whether the last name of a path stands for others: ``run[1].dat`` is the name of a file as well as a pattern,
    which does not even match it, and what is called so is meant. Raises what the relay refuses."""
    from globus_sdk import TransferAPIError

    path = (place.path or "").rstrip("/")
    if not any(sign in path.rpartition("/")[2] for sign in "*?["):
        return True
    try:
        relay.transfer.operation_stat(place.collection_id, path)
    except TransferAPIError as error:
        if error.http_status == 404:
            return True
        raise
    out.remark("Something is called just so, and it alone is deleted; --globs takes the name for a pattern.")
    return False


@click.command()
@click.argument("location", type=LocationType())
@click.option("-r", "--recursive", is_flag=True, help="Directories with all that is in them.")
@click.option("-f", "--ignore-missing", is_flag=True, help="Nothing there is not an error.")
@click.option("--globs/--no-globs", default=False, show_default=True, help="Whether * ? [] in the last name match.")
@click.option("--batch", type=click.File("r"), help="Read one path a line from a file, or - for standard input.")
@click.option("--local-user", help="The local user on the collection's machine.")
@submission_options
@with_relay
def delete(relay: Relay, out: Output, /, location: Location, batch: IO[str] | None, **options: Any) -> None:
    """Submit a task that deletes COLLECTION:PATH, or every path of a batch."""
    submission = submission_from(options)
    place = relay.find(location)
    if batch is not None:
        try:
            paths = list(parse_delete_batch(batch, place.path))
        except (BatchError, UnicodeDecodeError) as error:
            raise click.UsageError(str(error)) from error
        if not paths:
            raise click.UsageError("The batch has no lines to delete.")
    elif place.path is None:
        raise click.UsageError("A path is needed; write COLLECTION:PATH, or use --batch.")
    else:
        paths = [place.path]
    data = delete_data(place, paths, submission, interpret_globs=options.pop("globs"), **options)
    submit(relay, out, data, submission)
