"""Access lists of people who have no account here, and trees that have some."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import strategies as st

from agent.storage.access_lists import (
    AccessList,
    parse_untrusted,
)
from tests.agent.engine_inside import CHECKED, Engine

MIB = 1024 * 1024


ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


WANTED = msgspec.structs.replace(CHECKED, preserve_acls=True)


# No accounts of this machine.
BOB, STAFF = 54321, 54322


READS = AccessList(6, 4, 0, users=((BOB, 4),), mask=4)


rights = st.integers(0, 7)


named = st.dictionaries(st.integers(0, 2**32 - 2), rights, max_size=5).map(lambda found: tuple(sorted(found.items())))


@st.composite
def any_list(draw: st.DrawFn) -> AccessList:
    users, groups = draw(named), draw(named)
    mask = draw(rights if users or groups else st.none() | rights)
    return AccessList(draw(rights), draw(rights), draw(rights), users, groups, mask)


def give(path: Path, found: AccessList, name: str = ACCESS) -> None:
    try:
        os.setxattr(path, name, found.packed())
    except OSError as error:
        pytest.skip(f"this file system keeps no access lists: {error}")


def list_of(path: Path, name: str = ACCESS) -> AccessList | None:
    return parse_untrusted(os.getxattr(path, name)) if name in os.listxattr(path) else None


def lists(root: Path) -> dict[str, tuple[AccessList | None, AccessList | None, int]]:
    """Of all files and folders below: their lists, and the mode of files."""
    paths = (path for path in root.rglob("*") if not path.is_symlink())
    return {
        str(path.relative_to(root)): (
            list_of(path),
            list_of(path, DEFAULT),
            path.stat().st_mode & 0o777 if path.is_file() else 0,
        )
        for path in paths
    }


def scene(engine: Engine) -> int:
    """Small and large files and folders with and without lists; how many have some."""
    (engine.source / "folder" / "inner").mkdir(parents=True)
    sizes = {"large": 3 * MIB + 5, "empty": 0}
    for name in ("small", "folder/small", "folder/large", "folder/inner/empty", "plain", "folder/plain"):
        path = engine.source / name
        path.write_bytes(os.urandom(sizes.get(path.name, 100)))
        path.chmod(0o640)
    give(engine.source / "small", READS)
    give(engine.source / "folder/small", AccessList(4, 0, 0, ((0, 5), (BOB, 7)), ((STAFF, 1),), mask=5))
    give(engine.source / "folder/large", AccessList(4, 4, 4, groups=((STAFF, 4),), mask=4))
    give(engine.source / "folder/inner/empty", AccessList(6, 6, 0, mask=4))
    # Of the default list, files that were there before have nothing.
    give(engine.source / "folder", AccessList(7, 5, 0, ((BOB, 5),), mask=5), DEFAULT)
    return 5


def kept(engine: Engine, numbers: bool = True, permitted: int = 0o777) -> Engine:
    engine.numbers, engine.permitted = numbers, permitted
    return engine


def effective(found: AccessList) -> dict[object, int]:
    """What everybody may do whom a list tells apart (acl(5), access check)."""
    mask = 7 if found.mask is None else found.mask
    may: dict[object, int] = {"owner": found.owner, "group": found.group & mask, "other": found.other}
    may |= {("user", account): bits & mask for account, bits in found.users}
    return may | {("group", account): bits & mask for account, bits in found.groups}
