"""Batch files: one item a line, shell quoting, ``#`` comments, per-line options. No I/O."""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import click


@dataclass(frozen=True)
class Item:
    """One thing to transfer. ``recursive`` None leaves it to the agent to look."""

    source: str
    destination: str
    recursive: bool | None = None
    external_checksum: str | None = None
    checksum_algorithm: str | None = None


class BatchError(ValueError):
    """A line of a batch file cannot be understood; the text names the line."""


@click.command(add_help_option=False)
@click.argument("paths", nargs=-1)
@click.option("-r", "--recursive/--no-recursive", default=None)
@click.option("--external-checksum")
@click.option("--checksum-algorithm")
def _line(**options: Any) -> dict[str, Any]:
    return options


def _without_comment(text: str) -> str:
    """A line up to a ``#`` that begins a word, as in a shell. One within a word belongs to a name: cut there, the line
    would name something else, often the folder beside it."""
    quote, before = "", " "
    skip = False
    for index, character in enumerate(text):
        if skip:
            skip, character = False, "\\"
        elif character == "\\" and quote != "'":
            skip = True
        elif quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character == "#" and before.isspace():
            return text[:index]
        before = character
    return text


def _parsed(number: int, text: str) -> dict[str, Any] | None:
    """The options and paths of one line, or None for an empty one."""
    try:
        words = shlex.split(_without_comment(text))
        if not words:
            return None
        with _line.make_context("batch", words) as context:
            return dict(context.params)
    except ValueError as error:
        raise BatchError(f"Line {number} of the batch has unbalanced quotes ({error}).") from error
    except click.UsageError as error:
        raise BatchError(f"Line {number} of the batch: {error.format_message()}") from error


def parse_transfer_batch(lines: Iterable[str], source: str | None, destination: str | None) -> Iterator[Item]:
    """The items of a transfer's batch. Paths of the command line, where given, stand before those of the lines;
    a line with one path means the same path on both sides. Raises `BatchError`."""
    for number, text in enumerate(lines, 1):
        parsed = _parsed(number, text)
        if parsed is None:
            continue
        paths = parsed.pop("paths")
        if len(paths) not in (1, 2):
            raise BatchError(
                f"Line {number} of the batch has {len(paths)} paths; write SOURCE DESTINATION, or one path."
            )
        _check_named(number, paths)
        if parsed["external_checksum"] and parsed["recursive"]:
            raise BatchError(f"Line {number} of the batch gives a checksum for a whole directory; give one per file.")
        yield Item(joined(source, paths[0]), joined(destination, paths[-1]), **parsed)


def parse_delete_batch(lines: Iterable[str], base: str | None) -> Iterator[str]:
    """The paths of a delete's batch, one a line. Raises `BatchError`."""
    for number, text in enumerate(lines, 1):
        parsed = _parsed(number, text)
        if parsed is None:
            continue
        paths = parsed.pop("paths")
        if len(paths) != 1 or any(value is not None for value in parsed.values()):
            raise BatchError(f"Line {number} of the batch must be one path and nothing else.")
        _check_named(number, paths)
        yield joined(base, paths[0])


def _check_named(number: int, paths: Iterable[str]) -> None:
    """Refuse an empty path, which is a variable of a script that was not set, and would name all of the folder."""
    if not all(paths):
        raise BatchError(f"Line {number} of the batch has an empty path; write . for the folder itself.")


def joined(base: str | None, path: str) -> str:
    """A path of a line below the path of the command line."""
    return path if not base else posixpath.join(base, path)
