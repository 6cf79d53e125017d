"""A collection whose folder cannot be used; only the owner of the machine is told where on it that folder is."""

from __future__ import annotations

import os

from agent.storage import mounts
from protocol.errors import NeedsPerson, TowpathError
from protocol.names import escape


class CollectionUnavailable(NeedsPerson):
    """The root is not there now, or another one is. ``sentence`` goes to whoever uses the collection and names no path
    of this machine; ``owners`` is the sentence for the owner of the machine alone, and never leaves it."""

    default_code = "COLLECTION_UNAVAILABLE"

    def __init__(self, sentence: str, *, owners: str, code: str | None = None, subject: str = "") -> None:
        super().__init__(sentence, code=code, subject=subject)
        self.owners = owners


def for_owner(error: TowpathError) -> str:
    """The sentence of an error that the owner of this machine is told, on this machine and nowhere else."""
    return error.owners if isinstance(error, CollectionUnavailable) else error.sentence


def unavailable(path: str, why: str, *, told: str = "", code: str | None = None) -> CollectionUnavailable:
    """The folder at ``path``, which comes from the owner's configuration, and why it cannot be used, as the end of a
    sentence; ``told`` is what others than the owner are told in place of ``why``."""
    advice = "accept it as it is with `towpath config accept-root`."
    return CollectionUnavailable(
        f"The collection's folder {told or why}. Its owner mounts or restores it, or can {advice}",
        owners=f"The collection's folder {escape(os.fsencode(path))} {why}. Mount or restore it, or {advice}",
        code=code,
    )


def changed(
    path: str, expected: mounts.Mark, found: mounts.Mark, *, strict: bool, code: str | None = None
) -> CollectionUnavailable:
    """The folder is not the one expected, as `mounts.difference` says it."""
    why, told = [mounts.difference(expected, found, strict=strict, places=places) for places in (True, False)]
    return unavailable(path, why, told=told, code=code)
