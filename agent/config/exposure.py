"""Collections that give away the agent's own files: its key, or the configuration that says what it may do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from agent.config.keys import AgentConfig, CollectionConfig


def exposures(found: AgentConfig, config_file: Path) -> Iterator[tuple[CollectionConfig, str]]:
    """Each collection in which the state directory or the configuration can be reached, with a sentence on it. Hidden
    names that a collection does not offer are out of reach."""
    for collection in found.collections:
        if _is_reached(found.state_dir, collection):
            yield (
                collection,
                f"The state directory {found.state_dir} lies inside the collection {collection.name}: whoever may read "
                "that can read the agent's key, and whoever may write can change what the agent allows.",
            )
        if _is_reached(config_file, collection):
            yield (
                collection,
                f"The configuration {config_file} lies inside the collection {collection.name}: whoever may write "
                "there can change what the agent allows.",
            )


def _is_reached(path: Path, collection: CollectionConfig) -> bool:
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(collection.root))
    if not real.is_relative_to(root):
        return False
    return collection.hidden or not any(part.startswith(".") for part in real.relative_to(root).parts)
