"""The agent's own files: its state with its key, and the configuration that says what it may do. Where they lie inside
a collection nobody comes to them there (`agent.storage.own_files`); what is said of that to the owner."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from agent.config.keys import AgentConfig, CollectionConfig, default_config_file
from agent.config.layers import overlay_file, overlay_lock


def own_places(found: AgentConfig, config_file: Path) -> tuple[str, ...]:
    """Absolute paths of the folders and files that nobody may come to through a collection: the state directory, the
    configuration, and the folder of the default configuration, where also its user's sign-ins are kept."""
    files = (config_file, overlay_file(config_file), overlay_lock(config_file))
    places = (found.state_dir, *files, default_config_file().parent)
    return tuple(dict.fromkeys(os.path.abspath(place) for place in places))


def exposures(found: AgentConfig, config_file: Path) -> Iterator[tuple[CollectionConfig, str]]:
    """Each collection in which the state directory or the configuration lies, with a sentence on it. Nothing is said of
    hidden names that a collection does not offer anyhow."""
    for collection in found.collections:
        if _is_within(collection.root, found.state_dir):
            continue
        if _is_reached(found.state_dir, collection):
            yield (
                collection,
                f"The state directory {found.state_dir}, with the agent's key, lies inside the collection "
                f"{collection.name}. It is not offered: whoever comes through the collection neither sees nor changes "
                "it. Programs that run on this machine under this account can.",
            )
        if _is_reached(config_file, collection):
            yield (
                collection,
                f"The configuration {config_file} lies inside the collection {collection.name}. It is not offered: "
                "whoever comes through the collection neither sees nor changes it.",
            )


def unusable(found: AgentConfig) -> Iterator[tuple[CollectionConfig, str]]:
    """Each collection whose root is the state directory or lies in it, with a sentence on it."""
    for collection in found.collections:
        if _is_within(collection.root, found.state_dir):
            yield (
                collection,
                f"The root of the collection {collection.name} is, or lies in, the state directory {found.state_dir}. "
                "That is never offered, so that the collection cannot be used; choose another folder.",
            )


def _is_within(path: str | Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _is_reached(path: Path, collection: CollectionConfig) -> bool:
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(collection.root))
    if not real.is_relative_to(root):
        return False
    return collection.hidden or not any(part.startswith(".") for part in real.relative_to(root).parts)
