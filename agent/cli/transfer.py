"""``towpath transfer``: submit a transfer task, with the options Globus users know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

import click

from agent.cli.batch import BatchError, Item, parse_transfer_batch
from agent.cli.command import with_relay
from agent.cli.location import Location, LocationType, Place
from agent.cli.output import Output
from agent.cli.submission import (
    Submission,
    bandwidth_option,
    common_fields,
    submission_from,
    submission_options,
    submit,
)

if TYPE_CHECKING:
    from globus_sdk import TransferData

    from agent.cli.relay_client import Relay

SYNC_LEVELS = {"exists": 0, "size": 1, "mtime": 2, "checksum": 3}
_RULE_OPTIONS = ("--include", "--exclude")


class RulesInOrder(click.Command):
    """A command whose ``--include`` and ``--exclude`` keep the order in which they were written among one another.

    Both store into one list; before parsing, each value gets the name of its option in front.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Mark the values, then parse as usual."""
        return super().parse_args(ctx, mark_rules(args))


def mark_rules(arguments: Sequence[str]) -> list[str]:
    """``--include X`` becomes ``--include include:X`` (and so on), up to a ``--``."""
    marked: list[str] = []
    pending: str | None = None
    for index, word in enumerate(arguments):
        if pending is not None:
            marked.append(f"{pending}:{word}")
            pending = None
        elif word == "--":
            return marked + list(arguments[index:])
        elif word in _RULE_OPTIONS:
            marked.append(word)
            pending = word.lstrip("-")
        elif word.startswith(tuple(f"{option}=" for option in _RULE_OPTIONS)):
            option, _, value = word.partition("=")
            marked.append(f"{option}={option.lstrip('-')}:{value}")
        else:
            marked.append(word)
    return marked


def _sync_level(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    return SYNC_LEVELS[value] if value in SYNC_LEVELS else int(value)


@click.command(cls=RulesInOrder)
@click.argument("source", type=LocationType(), metavar="SOURCE")
@click.argument("destination", type=LocationType(), metavar="DESTINATION")
@click.option("-r", "--recursive/--no-recursive", default=None, help="SOURCE is a directory (default: look).")
@click.option(
    "--batch", type=click.File("r"), help="Read SOURCE DESTINATION lines from a file, or - for standard input."
)
@click.option(
    "-s",
    "--sync-level",
    type=click.Choice([*SYNC_LEVELS, "0", "1", "2", "3"]),
    callback=_sync_level,
    help="Only what is missing, or differs in size, is newer, or differs in checksum.",
)
@click.option(
    "--preserve-timestamp/--no-preserve-timestamp",
    "--preserve-mtime/--no-preserve-mtime",
    "preserve_timestamp",
    default=False,
    help="Keep modification times.",
)
@click.option(
    "--preserve-hard-links/--no-preserve-hard-links",
    "--hard-links/--no-hard-links",
    "preserve_hard_links",
    default=False,
    help="Keep several names of one file as such; otherwise each is a copy.",
)
@click.option(
    "--preserve-xattrs/--no-preserve-xattrs",
    "--xattrs/--no-xattrs",
    "preserve_xattrs",
    default=False,
    help="Keep extended attributes (user.* only; access lists and capabilities are counted and not kept).",
)
@click.option(
    "--preserve-acls/--no-preserve-acls",
    "--acls/--no-acls",
    "preserve_acls",
    default=False,
    help="Keep POSIX access lists, and those of accounts, by number, where the destination's owner allows that; "
    "others are counted.",
)
@click.option(
    "--verify-checksum/--no-verify-checksum", default=True, show_default=True, help="Read back and compare every file."
)
@click.option("--external-checksum", help="The checksum the file must have on both sides.")
@click.option("--checksum-algorithm", help="Of --external-checksum or --sync-level checksum.")
@click.option("--include", "rules", multiple=True, metavar="GLOB", help="Take matching files; the first match decides.")
@click.option("--exclude", "rules", multiple=True, metavar="GLOB", help="Leave matching files out.")
@click.option(
    "--delete", "--delete-destination-extra", "delete_extra", is_flag=True, help="Make the destination equal."
)
@click.option(
    "--delete-limit",
    type=click.IntRange(min=0),
    help="With --delete: how many may be deleted at most. Default: no more than stay, or 1000.",
)
@click.option(
    "--symlinks",
    type=click.Choice(["ignore", "keep", "copy"]),
    help="What to do with symlinks in directories; copy follows those that stay in the collection, and counts others.",
)
@click.option("--skip-source-errors", is_flag=True, help="Leave out what cannot be read and go on.")
@click.option("--fail-on-quota-errors", is_flag=True, help="Fail instead of waiting when the destination is full.")
@click.option("--encrypt-data", "--encrypt", "encrypt_data", is_flag=True, help="Accepted; data is always encrypted.")
@click.option(
    "--relay",
    "relay_path",
    type=click.Choice(["allow", "until-direct", "never"]),
    help="Whether the data may pass the relay: at any time, until a direct path was found, or never.",
)
@click.option("--transport", type=click.Choice(["auto", "tcp", "quic"]), help="What carries the data.")
@click.option(
    "--compression",
    type=click.Choice(["auto", "on", "off"]),
    help="Compress the data on its way where that pays (the default), always, or never.",
)
@bandwidth_option
@click.option("--source-local-user", help="The local user on the source's machine.")
@click.option("--destination-local-user", help="The local user on the destination's machine.")
@submission_options
@with_relay
def transfer(relay: Relay, out: Output, /, source: Location, destination: Location, **options: Any) -> None:
    """Transfer from SOURCE to DESTINATION, each COLLECTION:PATH.

    A file's DESTINATION is the full path of the new file. What is in a folder comes to lie in DESTINATION itself, which
    is made if need be, not in a folder of the same name there: for that write A:/results B:/data/results. Files of the
    same names are replaced; see --sync-level. With --batch the paths may be left out or stand before those of every
    line. With --wait the exit code tells how the task ended.
    """
    submission = submission_from(options)
    origin, target = relay.find(source), relay.find(destination)
    items = _items(origin, target, options)
    submit(relay, out, transfer_data(origin, target, items, options, submission), submission)


def _items(origin: Place, target: Place, options: dict[str, Any]) -> list[Item]:
    batch: IO[str] | None = options.pop("batch")
    recursive = options.pop("recursive")
    checksum = options.pop("external_checksum")
    algorithm = options.pop("checksum_algorithm")
    if batch is not None:
        if recursive is not None or checksum:
            raise click.UsageError("With --batch, --recursive and --external-checksum stand in the lines of the batch.")
        try:
            items = list(parse_transfer_batch(batch, origin.path, target.path))
        except (BatchError, UnicodeDecodeError) as error:
            raise click.UsageError(str(error)) from error
        if not items:
            raise click.UsageError("The batch has no lines to transfer.")
        return items
    if origin.path is None or target.path is None:
        raise click.UsageError("Without --batch both sides need a path; write COLLECTION:PATH COLLECTION:PATH.")
    if recursive and checksum:
        raise click.UsageError("--external-checksum is the checksum of one file; it does not go with --recursive.")
    return [Item(origin.path, target.path, recursive, checksum, algorithm)]


# Options of fields that the SDK has no argument for.
_OWN_FIELDS = {
    "symlinks": "recursive_symlinks",
    "preserve_hard_links": "towpath_preserve_hard_links",
    "preserve_xattrs": "towpath_preserve_xattrs",
    "preserve_acls": "towpath_preserve_acls",
    "relay_path": "towpath_relay",
    "transport": "towpath_transport",
    "compression": "towpath_compression",
    "bandwidth_limit": "towpath_bandwidth_limit",
    "delete_limit": "delete_destination_extra_limit",
}


def _own_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that were asked for."""
    # A flag that was not given is False, and a new task is without a limit anyway.
    given = {**options, "bandwidth_limit": options["bandwidth_limit"] or None}
    return {
        field: given[option]
        for option, field in _OWN_FIELDS.items()
        if given[option] is not None and given[option] is not False
    }


def transfer_data(
    origin: Place, target: Place, items: Sequence[Item], options: dict[str, Any], submission: Submission
) -> TransferData:
    """The transfer document; what was not asked for is left out, so that the service's defaults hold."""
    from globus_sdk import MISSING, TransferData

    def given(value: Any) -> Any:
        return MISSING if value is None else value

    recursion = any(item.recursive is not False for item in items)
    if options["rules"] and not recursion:
        raise click.UsageError("--include and --exclude choose among what a recursive transfer finds; add --recursive.")
    data = TransferData(
        origin.collection_id,
        target.collection_id,
        sync_level=given(options["sync_level"]),
        verify_checksum=options["verify_checksum"],
        preserve_timestamp=options["preserve_timestamp"],
        encrypt_data=options["encrypt_data"],
        skip_source_errors=options["skip_source_errors"],
        fail_on_quota_errors=options["fail_on_quota_errors"],
        delete_destination_extra=options["delete_extra"],
        source_local_user=given(options["source_local_user"]),
        destination_local_user=given(options["destination_local_user"]),
        additional_fields=_own_fields(options) | common_fields(submission),
    )
    for rule in options["rules"]:
        method, _, pattern = rule.partition(":")
        data.add_filter_rule(pattern, method="include" if method == "include" else "exclude", type="file")
    for item in items:
        data.add_item(
            item.source,
            item.destination,
            recursive=given(item.recursive),
            external_checksum=given(item.external_checksum),
            checksum_algorithm=given(item.checksum_algorithm),
        )
    return data
