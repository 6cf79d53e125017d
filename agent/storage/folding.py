"""Folders in which names that differ in case, in Unicode form, or in dots and spaces at their end only are one name.

Some file systems are so altogether (FAT, exFAT, NTFS, APFS, HFS+, many file servers), some folder by folder (ext4, F2FS
and tmpfs with the attribute ``casefold``). Nobody can know their tables; so the folder itself is asked, with names of
temporaries, and `fold_key` only says which names are worth the question.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import unicodedata

# Every name is itself there, in every folder.
_NEVER = frozenset({"btrfs", "ext2", "ext3", "ramfs", "nilfs2", "jfs", "ufs", "bcachefs"})
# Folder by folder, by an attribute (linux/fs.h: FS_IOC_GETFLAGS, FS_CASEFOLD_FL).
_BY_FOLDER = frozenset({"ext4", "f2fs", "tmpfs"})
_GET_FLAGS = 0x80086601
_CASEFOLD = 0x40000000

# Unicode's Default_Ignorable_Code_Point and format characters: ext4 leaves them out of a comparison.
_IGNORED = re.compile(
    "[\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)

# How a folder refuses to have anything made in it, or names such as these.
_REFUSED = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.EINVAL,
        errno.EILSEQ,
        errno.ENAMETOOLONG,
        errno.ENOTSUP,
        errno.ENOSYS,
    }
)
# Names that differ in case, in form (an e with an acute accent as one character and as two), and by what FAT and NTFS
# drop at the end, whether or not they are mounted so that they tell case apart.
_FIRST, _OTHERS = (
    "q\u00e9".encode(),
    ("Q\u00e9".encode(), "qe\u0301".encode(), "q\u00e9.".encode(), "q\u00e9 ".encode()),
)


def fold_key(name: bytes) -> bytes:
    """Names with different keys are different names on every file system known; names with one key may be one name.

    Unicode's compatible caseless matching (Unicode 3.13, D146), less what cannot be seen, and dots and spaces at the
    end, which FAT and NTFS drop.
    """
    if name.isascii():
        return name.lower().rstrip(b". ") or name
    text = name.decode("utf-8", "surrogateescape")
    text = _IGNORED.sub("", text)
    for _ in range(2):
        text = unicodedata.normalize("NFKD", text).upper().casefold()
    text = unicodedata.normalize("NFKD", text)
    return text.rstrip(". ").encode("utf-8", "surrogateescape") or name


def by_attribute(file_system: str, descriptor: int) -> bool | None:
    """Whether an open folder folds names, as far as its file system's type and its attributes tell; None: ask it."""
    if file_system in _NEVER:
        return False
    if file_system in _BY_FOLDER and sys.platform == "linux":
        return _by_flag(descriptor)
    return None


def _by_flag(descriptor: int) -> bool | None:
    import fcntl

    try:
        flags = fcntl.ioctl(descriptor, _GET_FLAGS, bytes(8))
    except OSError as error:
        # A handle for lookups only, or a kernel that knows no such attribute here.
        return False if error.errno in (errno.EBADF, errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL) else None
    return bool(int.from_bytes(flags[:4], sys.byteorder) & _CASEFOLD)


def ask(descriptor: int, prefix: bytes) -> bool:
    """Find out by making a name that begins with ``prefix`` and looking for others. Raises OSError."""
    first = prefix + _FIRST
    os.close(os.open(first, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=descriptor))
    try:
        return any(_is_there(descriptor, prefix + other) for other in _OTHERS)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(first, dir_fd=descriptor)


def _is_there(descriptor: int, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=descriptor, follow_symlinks=False)
    except OSError as error:
        # A name that cannot be is not there either.
        if error.errno == errno.ENOENT or error.errno in _REFUSED:
            return False
        raise
    return True


def folds(file_system: str, descriptor: int, prefix: bytes, known: dict[int, bool], device: int) -> bool:
    """Whether an open folder folds names. What had to be asked is remembered in ``known`` by its device. A folder in
    which nothing can be made has nobody to ask, and nothing will be made in it. Raises OSError for other faults: taken
    for one that tells names apart it would have names overwritten, and a mirror delete what it has brought."""
    told = by_attribute(file_system, descriptor)
    if told is not None:
        return told
    if device not in known:
        try:
            known[device] = ask(descriptor, prefix)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            return False
    return known[device]
