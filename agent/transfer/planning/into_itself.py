"""The error of a folder that is to be copied into itself."""

from __future__ import annotations

from protocol.errors import ItemFailed
from protocol.names import format_path, split_path


def into_itself(destination: bytes) -> ItemFailed:
    """Why a folder that its destination is, or lies in, is refused."""
    place = format_path(split_path(destination), directory=True)
    return ItemFailed(
        f"{place[:1000]} at the destination lies in the very folder that is to be copied there, or is it: it would "
        "grow without end. Name a destination outside of that folder.",
        code="INTO_ITSELF",
        who="you",
        subject=place,
    )
