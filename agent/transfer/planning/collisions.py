"""Names of a source that would be one name at the destination: found before anything of their folder is sent.

The rule: a name that the destination has already, spelled like this, keeps it; otherwise the first in the order of
bytes gets it. The others are left out, each with an error that names both. Nothing is renamed and nothing overwritten.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable

from agent.storage.base import Directory, Root
from agent.storage.faults import fault
from agent.storage.folding import fold_key
from protocol.errors import ItemFailed
from protocol.names import MAX_COMPONENT, escape

# How many questions about names with one key are worth it: some, and so many for each name. They are few where such
# names are one name; where each is another one, each would have to be compared with all others.
_QUESTIONS, _QUESTIONS_EACH = 1000, 16


def losers(
    root: Root,
    handle: Directory,
    names: Iterable[bytes],
    prefix: bytes,
    there: Callable[[set[bytes]], set[bytes]] | None = None,
) -> dict[bytes, bytes]:
    """For every name that is left out, the name that has its place. The folder itself is asked which of them are one
    name to it, with temporaries that begin with ``prefix``. ``there`` says which of some names it has, spelled like
    this; without, it is looked through. Raises OSError, and `ItemFailed` when too many may be one name."""
    # Nearly all names are alone with their key, and there may be millions: a set for each would cost most of all.
    first: dict[bytes, bytes] = {}
    several: dict[bytes, set[bytes]] = defaultdict(set)
    for name in names:
        key = fold_key(name)
        other = first.setdefault(key, name)
        if other != name:
            several[key] |= {other, name}
    del first
    suspects = [sorted(group) for group in several.values()]
    if not suspects:
        return {}
    wanted = {name for group in suspects for name in group}
    kept = {node.name for node in handle.scan() if node.name in wanted} if there is None else there(wanted)
    found: dict[bytes, bytes] = {}
    for group in suspects:
        for same in _same(root, handle, group, prefix):
            winner = next((name for name in same if name in kept), same[0])
            found.update((name, winner) for name in same if name != winner)
    return found


def _same(root: Root, handle: Directory, names: list[bytes], prefix: bytes) -> list[list[bytes]]:
    """Names that are one name to this folder, together, in the order given."""
    groups: list[list[bytes]] = []
    too_long: list[bytes] = []
    left = _QUESTIONS + _QUESTIONS_EACH * len(names)
    for serial, name in enumerate(names):
        if len(prefix) + len(b"%x.%x." % (serial, len(groups))) + len(name) > MAX_COMPONENT:
            too_long.append(name)
            continue
        for number, group in enumerate(groups):
            left -= 1
            if left < 0:
                raise too_many(name)
            if _are_one(root, handle, group[0], name, prefix + b"%x.%x." % (serial, number)):
                group.append(name)
                break
        else:
            groups.append([name])
    if too_long:
        # They cannot be asked about and may be anybody's twin.
        groups = [sorted([name for group in groups for name in group] + too_long)]
    return groups


def _are_one(root: Root, handle: Directory, one: bytes, other: bytes, prefix: bytes) -> bool:
    """Whether the folder takes two names for one: then the second cannot be made beside the first.

    The ``prefix`` is used for nothing else: file systems that are programs (FUSE) remember for a while what they said
    of a name, and give one file another inode under each of its spellings.
    """
    made: list[bytes] = []
    try:
        for name in (one, other):
            root.close_file(handle.create_temporary(prefix + name))
            made.append(prefix + name)
    except FileExistsError:
        if not made:
            # Left by a run that was killed here; nothing can be told with it.
            raise
        return True
    except OSError as error:
        if not isinstance(fault(error, "destination", b""), ItemFailed):
            raise
        # A name that the folder does not take at all is no other one's twin; it fails by itself.
        return False
    finally:
        for probe in made:
            with contextlib.suppress(FileNotFoundError):
                handle.unlink(probe)
    return False


def collision(name: bytes, winner: bytes) -> ItemFailed:
    """The error of a name that is left out."""
    return ItemFailed(
        f"{escape(name)} and {escape(winner)} are one name at the destination, whose file system does not tell case "
        "or Unicode forms apart; only the latter is transferred. Rename one of them at the source.",
        code="NAME_COLLISION",
        who="source owner",
        subject=escape(name),
    )


def too_many(name: bytes) -> ItemFailed:
    """The error of a folder whose names cannot be compared."""
    return ItemFailed(
        f"The folder has more names like {escape(name)[:100]} than can be compared with each other, which the "
        "destination needs, as its file system does not tell case or Unicode forms apart. Divide it into several "
        "folders at the source, or choose a destination whose file system does.",
        code="TOO_MANY_NAMES",
        who="source owner",
    )


def twice(path: bytes, first: str) -> ItemFailed:
    """The error of a file that is to have a destination path which an earlier item of the task has."""
    return ItemFailed(
        f"{escape(path)} is the destination of two files of this task; it gets {first}, which was named first.",
        code="NAME_COLLISION",
        who="you",
        subject=escape(path),
    )
