"""Reading the transfer and delete documents: every field checked, every mistake answered by a sentence.

The result is a plain record; nothing here knows of databases or agents. A submission may have 100,000 items, so
callers run `read_transfer` and `read_delete` in a thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from protocol.control import FilterRule, TaskItem, TaskOptions
from protocol.errors import ProtocolError
from protocol.names import CollectionPath, parse_path_untrusted
from relay.transfer.fields import Fields, bad_request
from relay.transfer.scopes import canonical, glob_base, overlapping, place, prefixes

MAX_LABEL = 128
MAX_FILTER_RULES = 1000
MAX_PATTERN = 1024
# Characters of all patterns of a task, which every list of tasks repeats.
MAX_PATTERNS = 64 * 1024
MAX_PATH_TEXT = 16_384
NO_ITEMS = "ClientError.BadRequest.NoTransferItems"
NO_DELETE_ITEMS = "ClientError.BadRequest.NoDeleteItems"
# Hexadecimal digits of each algorithm that a published checksum may be given in.
CHECKSUM_DIGITS = {"MD5": 32, "SHA1": 40, "SHA256": 64, "SHA512": 128, "XXH3-128": 32, "BLAKE3": 64}
_SPELLINGS = {"SHA-1": "SHA1", "SHA-256": "SHA256", "SHA-512": "SHA512"}
# Where ``~`` is in the collections of a task, as far as the caller may know.
Homes = Mapping[str, CollectionPath | None]
NOTIFICATIONS = ("notify_on_succeeded", "notify_on_failed", "notify_on_inactive")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A task as it was asked for. For deletes the one collection is the source, as in the task documents.

    ``source_scope`` and ``destination_scope`` are the path prefixes of the task's tickets, ``changes`` the folders that
    its owner must be allowed to write in besides: those that deletes take entries from, and the whole destination where
    symbolic links are made, since they may lead anywhere in it. ``echo`` holds what is only shown again.
    """

    type: Literal["TRANSFER", "DELETE"]
    submission_id: str
    source_id: str
    destination_id: str | None
    label: str | None
    deadline: float | None
    options: TaskOptions
    items: list[TaskItem]
    source_scope: list[str]
    destination_scope: list[str]
    changes: list[str]
    echo: dict[str, Any] = field(default_factory=dict)


def read_transfer(document: object, *, homes: Homes, max_items: int, now: float) -> Submission:
    """The body of ``POST /transfer``. Raises `ApiError` 400, 409."""
    fields = Fields(document, "the transfer")
    fields.data_type("transfer")
    submission_id = fields.identifier("submission_id")
    source_id = fields.identifier("source_endpoint")
    destination_id = fields.identifier("destination_endpoint")
    _refuse_local_users(fields, "source_local_user", "destination_local_user")
    options = _transfer_options(fields)
    rows = fields.items("DATA", max_items)
    if not rows:
        raise bad_request("A transfer requires at least one item.", NO_ITEMS)
    same = source_id == destination_id
    source_home, destination_home = homes.get(source_id, ()), homes.get(destination_id, ())
    items: list[TaskItem] = []
    sources: list[CollectionPath] = []
    destinations: list[CollectionPath] = []
    for row in rows:
        item, source, destination = _transfer_item(row, source_home, destination_home)
        if same and overlapping(source, destination):
            raise bad_request(
                f"destination_path '{item.destination_path[:200]}' is the source itself or lies inside it."
            )
        items.append(item)
        sources.append(source)
        destinations.append(destination)
    echo = _echo(fields)
    if fields.boolean("store_base_path_info", False):
        echo["source_base_path"] = _base_path([item.source_path for item in items])
        echo["destination_base_path"] = _base_path([item.destination_path for item in items])
    return Submission(
        type="TRANSFER",
        submission_id=submission_id,
        source_id=source_id,
        destination_id=destination_id,
        label=read_label(fields),
        deadline=read_deadline(fields, now),
        options=options,
        items=items,
        source_scope=prefixes(sources),
        destination_scope=prefixes(destinations),
        changes=changed_folders("TRANSFER", options, items),
        echo=echo,
    )


def read_delete(document: object, *, homes: Homes, max_items: int, now: float) -> Submission:
    """The body of ``POST /delete``. Raises `ApiError` 400, 409."""
    fields = Fields(document, "the delete")
    fields.data_type("delete")
    submission_id = fields.identifier("submission_id")
    endpoint_id = fields.identifier("endpoint")
    _refuse_local_users(fields, "local_user")
    options = TaskOptions(
        recursive=fields.boolean("recursive", False),
        ignore_missing=fields.boolean("ignore_missing", False),
        interpret_globs=fields.boolean("interpret_globs", False),
    )
    rows = fields.items("DATA", max_items)
    if not rows:
        raise bad_request("A delete requires at least one item.", NO_DELETE_ITEMS)
    items, places = [], []
    for row in rows:
        entry = Fields(row, "each entry of DATA")
        entry.data_type("delete_item")
        path = _path(entry, "path")
        target = place(path, "path", homes.get(endpoint_id, ()))
        if not target:
            raise bad_request("path: the root of a collection cannot be deleted.")
        places.append(glob_base(target) if options.interpret_globs else target)
        items.append(TaskItem(source_path=canonical(target, path)))
    return Submission(
        type="DELETE",
        submission_id=submission_id,
        source_id=endpoint_id,
        destination_id=None,
        label=read_label(fields),
        deadline=read_deadline(fields, now),
        options=options,
        items=items,
        source_scope=[],
        destination_scope=prefixes(places),
        changes=changed_folders("DELETE", options, items),
        echo=_echo(fields),
    )


def changed_folders(kind: str, options: TaskOptions, items: Iterable[TaskItem]) -> list[str]:
    """The folders that a task's owner must be allowed to write in besides those of its tickets, see `Submission`.

    Paths of deletes must be canonical; one that cannot be is taken for the whole collection.
    """
    if kind == "TRANSFER":
        makes_links = options.recursive_symlinks == "keep" or any(item.symlink for item in items)
        return ["/"] if makes_links else []
    try:
        return prefixes(parse_path_untrusted(item.source_path)[:-1] for item in items)
    except ProtocolError:
        return ["/"]


def read_deadline(fields: Fields, now: float) -> float | None:
    """The deadline of a document, which must lie ahead. Raises `ApiError` 400."""
    deadline = fields.time("deadline")
    if deadline is not None and deadline <= now:
        raise bad_request("deadline lies in the past.")
    return deadline


def read_label(fields: Fields) -> str | None:
    """The label of a document: any one line without blanks around it (Globus: Task Submission, 2.2). Raises `ApiError`
    400."""
    label = fields.line("label", longest=MAX_LABEL)
    if label is not None and label != label.strip():
        raise bad_request("label must neither begin nor end with a blank.")
    return label or None


def _transfer_options(fields: Fields) -> TaskOptions:
    rules = [_filter_rule(rule) for rule in fields.items("filter_rules", MAX_FILTER_RULES)]
    if sum(len(rule.name) for rule in rules) > MAX_PATTERNS:
        raise bad_request(f"filter_rules may have {MAX_PATTERNS} characters of names together.")
    symlinks: Any = fields.choice("recursive_symlinks", ("ignore", "keep", "copy"), "ignore")
    # Ours, beside theirs: how the data may go.
    relay_path: Any = fields.choice("towpath_relay", ("allow", "until-direct", "never"), "allow")
    transport: Any = fields.choice("towpath_transport", ("tcp", "quic", "auto"), "auto")
    compression: Any = fields.choice("towpath_compression", ("auto", "on", "off"), "auto")
    return TaskOptions(
        sync_level=fields.integer("sync_level", 0, 3),
        verify_checksum=fields.boolean("verify_checksum", False),
        preserve_timestamp=fields.boolean("preserve_timestamp", False),
        encrypt_data=fields.boolean("encrypt_data", False),
        skip_source_errors=fields.boolean("skip_source_errors", False),
        fail_on_quota_errors=fields.boolean("fail_on_quota_errors", False),
        delete_destination_extra=fields.boolean("delete_destination_extra", False),
        # Ours, beside theirs: confirms that a mirror may delete as much.
        delete_destination_extra_limit=fields.integer("delete_destination_extra_limit", 0, 10**12),
        recursive_symlinks=symlinks,
        # Ours, beside theirs: what else of a file's properties is taken over.
        preserve_hard_links=fields.boolean("towpath_preserve_hard_links", False),
        preserve_xattrs=fields.boolean("towpath_preserve_xattrs", False),
        preserve_acls=fields.boolean("towpath_preserve_acls", False),
        filter_rules=rules,
        relay_path=relay_path,
        transport=transport,
        compression=compression,
        bandwidth_limit=read_bandwidth_limit(fields),
    )


def read_bandwidth_limit(fields: Fields) -> int | None:
    """The most that a task may move, in bytes a second; ours, beside theirs. Raises `ApiError` 400."""
    return fields.integer("towpath_bandwidth_limit", 1000, 10**12)


def _filter_rule(document: object) -> FilterRule:
    fields = Fields(document, "each of filter_rules")
    fields.data_type("filter_rule")
    method: Any = fields.choice("method", ("include", "exclude"), "")
    if not method:
        raise bad_request("method of a filter rule must be include or exclude.")
    type_: Any = fields.choice("type", ("file", "dir"), "") or None
    return FilterRule(method=method, name=fields.required_text("name", longest=MAX_PATTERN), type=type_)


def _transfer_item(
    document: object, source_home: CollectionPath | None, destination_home: CollectionPath | None
) -> tuple[TaskItem, CollectionPath, CollectionPath]:
    fields = Fields(document, "each entry of DATA")
    symlink = fields.data_type("transfer_item", "transfer_symlink_item") == "transfer_symlink_item"
    source_path, destination_path = _path(fields, "source_path"), _path(fields, "destination_path")
    recursive, checksum, algorithm = None, None, None
    if not symlink:
        recursive = None if fields.raw("recursive") is None else fields.boolean("recursive", False)
        checksum, algorithm = _checksum(fields, recursive)
    source = place(source_path, "source_path", source_home)
    destination = place(destination_path, "destination_path", destination_home)
    item = TaskItem(
        source_path=canonical(source, source_path),
        destination_path=canonical(destination, destination_path),
        recursive=recursive,
        symlink=symlink,
        external_checksum=checksum,
        checksum_algorithm=algorithm,
    )
    return item, source, destination


def _path(fields: Fields, key: str) -> str:
    # Names may hold any character; `place` checks them, so the text is not looked at here.
    value = fields.raw(key)
    if not isinstance(value, str) or not value:
        raise bad_request(f"{key} must be a string that is not empty.")
    if len(value) > MAX_PATH_TEXT:
        raise bad_request(f"{key} is longer than any path.")
    return value


def _checksum(fields: Fields, recursive: bool | None) -> tuple[str | None, str | None]:
    checksum = fields.text("external_checksum", longest=256)
    algorithm = fields.text("checksum_algorithm", longest=32)
    if algorithm is not None:
        algorithm = _SPELLINGS.get(algorithm.upper(), algorithm.upper())
        if algorithm not in CHECKSUM_DIGITS:
            raise bad_request(f"checksum_algorithm must be one of {', '.join(CHECKSUM_DIGITS)}.")
    if checksum is None:
        return None, algorithm
    if recursive:
        raise bad_request("external_checksum is for files; it cannot be combined with recursive.")
    algorithm = algorithm or "MD5"
    checksum = checksum.strip().lower()
    digits = CHECKSUM_DIGITS[algorithm]
    if len(checksum) != digits or not set(checksum) <= set("0123456789abcdef"):
        raise bad_request(f"external_checksum must be the {digits} hexadecimal digits of a checksum ({algorithm}).")
    return checksum, algorithm


def _refuse_local_users(fields: Fields, *keys: str) -> None:
    for key in keys:
        if fields.text(key, longest=256):
            raise bad_request(f"{key} cannot be chosen: each agent works in its owner's account.")


def _echo(fields: Fields) -> dict[str, Any]:
    echo: dict[str, Any] = {key: fields.boolean(key, True) for key in NOTIFICATIONS}
    for key in ("perf_cc", "perf_p", "perf_pp"):
        value = fields.integer(key, 0, 1_000_000)
        if value is not None:
            echo[key] = value
    if fields.raw("perf_udt") is not None:
        echo["perf_udt"] = fields.boolean("perf_udt", False)
    return echo


def _base_path(paths: list[str]) -> str:
    """The longest directory that all paths have in common; of a single path the path itself."""
    if len(paths) == 1:
        return paths[0]
    parents = [path.rstrip("/").split("/")[:-1] for path in paths]
    common = parents[0]
    for parent in parents[1:]:
        same = 0
        while same < min(len(common), len(parent)) and common[same] == parent[same]:
            same += 1
        common = common[:same]
    return "/".join([*common, ""]) or "/~/"
