"""From the system's errors to the project's: which class, which code, which sentence, and who can mend it."""

from __future__ import annotations

import errno
import os
from typing import Literal

from agent.storage.base import IllegalName, NotRegularFile
from agent.storage.disks import DISK_REPLACED, DiskAway
from agent.storage.own_files import AgentsOwn, HoldsOwn
from agent.storage.reach import LeavesCollection, LeavesReach
from protocol.errors import ItemFailed, NeedsPerson, RetryLater, TowpathError, Who
from protocol.names import CollectionPath, format_path
from protocol.threads import NoThread

# The part this storage plays; empty for operations (ls, mkdir, rename) that concern one collection only.
Side = Literal["source", "destination", ""]

_SHOWN = 1000

# errno → class, code, what is so (the path comes before it). Sides and owners are filled in below.
_PERMANENT: dict[int, tuple[str, str]] = {
    errno.EACCES: ("PERMISSION_DENIED", "may not be accessed by the account the agent runs as"),
    errno.EPERM: ("PERMISSION_DENIED", "may not be changed in this way by the account the agent runs as"),
    errno.EROFS: ("READ_ONLY", "is on a file system that is mounted for reading only"),
    errno.EEXIST: ("EXISTS", "exists already"),
    errno.ENOTEMPTY: ("NOT_EMPTY", "is a folder that is not empty"),
    errno.ENOTDIR: ("NOT_A_DIRECTORY", "is not a folder, or something on the way to it is not"),
    errno.EISDIR: ("IS_A_DIRECTORY", "is a folder"),
    errno.ENAMETOOLONG: ("ILLEGAL_NAME", "has a name that is too long for this file system"),
    errno.EINVAL: ("ILLEGAL_NAME", "has a name or a property that this file system does not accept"),
    errno.EILSEQ: ("ILLEGAL_NAME", "has a name that this file system cannot store"),
    errno.ELOOP: ("SYMLINK_LOOP", "is a symlink, or leads through too many of them"),
    errno.EFBIG: ("TOO_LARGE", "is larger than this file system allows"),
    errno.EOVERFLOW: ("TOO_LARGE", "is larger than this machine can handle"),
    errno.EMLINK: ("TOO_MANY_LINKS", "is in a folder that can hold no more folders"),
    errno.EXDEV: ("CROSSES_FILE_SYSTEMS", "is on another file system, to which nothing can be renamed"),
    errno.ENOTSUP: ("NOT_SUPPORTED", "needs something this file system does not offer"),
    errno.ENOSYS: ("NOT_SUPPORTED", "needs something this system does not offer"),
    errno.ENXIO: ("NOT_A_FILE", "is a socket or device, not a file"),
    errno.ENODEV: ("NOT_A_FILE", "is a device that is not there, not a file"),
}
_PASSING: dict[int, tuple[str, str]] = {
    errno.EIO: ("IO_ERROR", "could not be read or written; the disk or the network file system reported a fault"),
    errno.ESTALE: ("STALE_HANDLE", "changed on the file server; it is looked up again"),
    errno.EMFILE: ("BUSY", "could not be opened since too many files are open in this program"),
    errno.ENFILE: ("BUSY", "could not be opened since too many files are open on this machine"),
    errno.ENOMEM: ("BUSY", "could not be handled since this machine is short of memory"),
    errno.ENOBUFS: ("BUSY", "could not be handled since this machine is short of memory"),
    errno.EAGAIN: ("BUSY", "is in use and not ready"),
    errno.EBUSY: ("BUSY", "is in use by the system"),
    errno.ETXTBSY: ("BUSY", "is a program that is running"),
    errno.EINTR: ("BUSY", "was interrupted"),
    errno.EDEADLK: ("BUSY", "is locked by another program"),
    errno.ENOLCK: ("BUSY", "could not be locked by the file server"),
    errno.ETIMEDOUT: ("TIMEOUT", "did not answer in time; it is on a network file system"),
    errno.ENETDOWN: ("TIMEOUT", "is on a network file system that cannot be reached"),
    errno.ENETUNREACH: ("TIMEOUT", "is on a network file system that cannot be reached"),
    errno.EHOSTDOWN: ("TIMEOUT", "is on a network file system that cannot be reached"),
    errno.EHOSTUNREACH: ("TIMEOUT", "is on a network file system that cannot be reached"),
    errno.ECONNREFUSED: ("TIMEOUT", "is on a network file system that cannot be reached"),
    errno.ECONNRESET: ("TIMEOUT", "is on a network file system that cannot be reached"),
    errno.ENOTCONN: ("TIMEOUT", "is on a network file system that is not connected"),
}
# Access that ends although the names are right: credentials of the file system itself.
_CREDENTIALS = frozenset(
    number for name in ("ENOKEY", "EKEYEXPIRED", "EKEYREVOKED", "EKEYREJECTED") if (number := getattr(errno, name, 0))
)


def fault(error: OSError, side: Side, path: CollectionPath | bytes | str, *, alone: bool = False) -> TowpathError:
    """The project's error for one of the system's.

    ``path`` is the collection path the operation was about, also as its joined bytes, or text that is escaped already;
    empty for the collection as a whole. ``alone``: there is no other side, so that this one need not be named. The
    result is to be raised or reported, ``from`` the error.
    """
    if isinstance(error, NoThread):
        where = f" at the {side}" if side else ""
        sentence = (
            f"No more threads or processes are to be had on the machine{where}: a limit of its account or memory."
        )
        return RetryLater(sentence, code="BUSY", who=_owner(side))
    if isinstance(error, DiskAway):
        return _disk_away(error, side)
    subject = _subject(path)
    what = f"{subject[:_SHOWN]}{f' at the {side}' if side and not alone else ''}"
    return _refused_here(error, side, what, subject) or _refused_by_system(error.errno or 0, side, what, subject)


def _refused_here(error: OSError, side: Side, what: str, subject: str) -> TowpathError | None:
    """Of what the agent itself refuses (its classes are errors of the system, so that callers need not tell them
    apart); None for what the system said."""
    who = _owner(side)
    if isinstance(error, LeavesCollection):
        sentence = f"{what} {error.strerror}, which nothing is allowed to do."
        return ItemFailed(sentence, code="PERMISSION_DENIED", who=who, subject=subject)
    if isinstance(error, LeavesReach | AgentsOwn):
        return ItemFailed(f"{what} {error.strerror}.", code="PERMISSION_DENIED", who=who, subject=subject)
    if isinstance(error, HoldsOwn):
        return ItemFailed(f"{what} {error.strerror}.", code="NOT_EMPTY", subject=subject)
    if isinstance(error, NotRegularFile):
        return ItemFailed(f"{what} {error.strerror}.", code="NOT_A_FILE", subject=subject)
    if isinstance(error, IllegalName):
        return ItemFailed(f"{what} {error.strerror}.", code="ILLEGAL_NAME", subject=subject)
    return None


def _refused_by_system(number: int, side: Side, what: str, subject: str) -> TowpathError:
    """Of an errno, 0 where the error had none."""
    who = _owner(side)
    if number == errno.ENOENT:
        code = "FILE_NOT_FOUND" if side else "NOT_FOUND"
        # A folder that somebody removes under a transfer is no fault of the source's.
        mends = who if side == "destination" else ""
        return ItemFailed(f"{what} does not exist.", code=code, who=mends, subject=subject)
    if number == errno.ENOSPC:
        sentence = (
            f"The disk is full: {what} could not be written. Free some space, or remove files where `df -i` shows that "
            "there can be no more of them; the work then goes on by itself."
        )
        return NeedsPerson(sentence, code="NO_SPACE", who=who, subject=subject)
    if number == errno.EDQUOT:
        sentence = f"The quota is used up: {what} could not be written. Free some space or ask for a larger quota."
        return NeedsPerson(sentence, code="QUOTA_EXCEEDED", who=who, subject=subject)
    if number in _CREDENTIALS:
        sentence = f"{what} cannot be accessed: the machine's own login at its file server has expired."
        return NeedsPerson(sentence, code="COLLECTION_UNAVAILABLE", who=who, subject=subject)
    if number in _PERMANENT:
        code, why = _PERMANENT[number]
        mends = who if code in ("PERMISSION_DENIED", "READ_ONLY") else ""
        return ItemFailed(f"{what} {why}.", code=code, who=mends, subject=subject)
    if number in _PASSING:
        code, why = _PASSING[number]
        return RetryLater(f"{what} {why}.", code=code, who=who if code == "IO_ERROR" else "", subject=subject)
    named = errno.errorcode.get(number, str(number))
    reason = os.strerror(number) if number else "no reason given"
    return RetryLater(f"{what} could not be handled: {reason} ({named}).", code="UNKNOWN", subject=subject)


def _disk_away(error: DiskAway, side: Side) -> NeedsPerson:
    shown = format_path(error.path, directory=True)
    what = f"{shown[:_SHOWN]}{f' at the {side}' if side else ''}"
    now = "another disk is" if error.code == DISK_REPLACED else "no disk is"
    sentence = (
        f"{what} was the place of a disk, and now {now} mounted there, so nothing in it is taken for the disk's. Mount "
        "the disk again, and the work goes on by itself; if it is gone for good, its owner has it forgotten with "
        "`towpath config accept-root`."
    )
    return NeedsPerson(sentence, code=error.code, who=_owner(side), subject=shown)


def _subject(path: CollectionPath | bytes | str) -> str:
    if isinstance(path, tuple):
        return format_path(path)
    if isinstance(path, bytes):
        return format_path(tuple(path.split(b"/"))) if path else "The collection"
    return path or "The collection"


def _owner(side: Side) -> Who:
    if side == "source":
        return "source owner"
    return "destination owner" if side == "destination" else ""
