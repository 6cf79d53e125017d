"""The data the demonstration moves: a real directory tree, symlinks, and one large file.

The tree is a copy, never hard links: whoever looks around in it afterwards must not be able to change the original.
All functions block; a ``checkpoint`` is called now and then and may raise to end the work.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

MIB = 1024 * 1024
LARGE_FILE = "large.dat"
TREE = "python"
SYMLINKS = "links"

Checkpoint: TypeAlias = Callable[[], None]

# Installed packages are not part of the standard library and may be very many.
_LEFT_OUT = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Contents:
    """What is in a directory tree."""

    files: int = 0
    directories: int = 0
    symlinks: int = 0
    bytes: int = 0


def standard_library() -> Path:
    """Where this Python keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def write_pseudo_random(path: Path, size: int, seed: str, checkpoint: Checkpoint) -> None:
    """Write ``size`` bytes that no compression shrinks, the same for the same seed: AES in counter mode over zeros,
    the fastest generator at hand."""
    key = seed.encode().ljust(32, b"\0")[:32]
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    zeros = bytes(MIB)
    with path.open("xb") as file:
        for start in range(0, size, MIB):
            checkpoint()
            file.write(stream.update(zeros[: min(MIB, size - start)]))


def _leave_out(directory: str, names: list[str]) -> Iterable[str]:
    # Also nothing that is neither file, directory nor symlink, and nothing we may not read.
    return [name for name in names if name in _LEFT_OUT or not _copyable(os.path.join(directory, name))]


def _copyable(path: str) -> bool:
    if os.path.islink(path):
        return True
    return (os.path.isfile(path) or os.path.isdir(path)) and os.access(path, os.R_OK)


def add_symlinks(directory: Path, tree: str) -> None:
    """Links to a file, a directory, upwards, to nothing, and with a name beyond ASCII."""
    directory.mkdir()
    (directory / "to-file").symlink_to(f"../{tree}/os.py")
    (directory / "to-directory").symlink_to(f"../{tree}/json")
    (directory / "upwards").symlink_to("..")
    (directory / "to-nothing").symlink_to("nowhere/at all")
    (directory / "größe-λ").symlink_to("to-file")


def make_tree(directory: Path, source: Path, large_file_size: int, checkpoint: Checkpoint) -> None:
    """The directory the demonstration transfers: ``source`` copied, symlinks, and the large file.

    Raises FileExistsError when the directory is already there.
    """
    directory.mkdir(parents=True)

    def copy(one: str, other: str) -> object:
        checkpoint()
        return shutil.copy2(one, other)

    shutil.copytree(source, directory / TREE, symlinks=True, ignore=_leave_out, copy_function=copy)
    add_symlinks(directory / SYMLINKS, TREE)
    write_pseudo_random(directory / LARGE_FILE, large_file_size, "towpath large file", checkpoint)


def make_tutorial_data(root: Path, checkpoint: Checkpoint) -> None:
    """The small files that the tutorial commands name: ``data1`` and ``sync-demo``. What exists stays."""
    data = root / "data1"
    data.mkdir(exist_ok=True)
    for name, size in (("1M.dat", 1), ("10M.dat", 10), ("100M.dat", 100)):
        if not (data / name).exists():
            write_pseudo_random(data / name, size * MIB, f"towpath {name}", checkpoint)
    sync = root / "sync-demo"
    if not sync.exists():
        for folder in ("", "one", "one/two"):
            (sync / folder).mkdir(parents=True, exist_ok=True)
            for number in range(1, 4):
                text = f"This is file {number} of {folder or 'the top'}.\n"
                (sync / folder / f"file{number}.txt").write_text(text, encoding="utf-8")


def contents_of(directory: Path) -> Contents:
    """Count what is in a tree, following no symlink."""
    files = directories = symlinks = size = 0
    waiting = [directory]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    symlinks += 1
                elif entry.is_dir():
                    directories += 1
                    waiting.append(Path(entry.path))
                else:
                    files += 1
                    size += entry.stat(follow_symlinks=False).st_size
    return Contents(files, directories, symlinks, size)
