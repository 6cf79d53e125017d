"""POSIX access lists of open files and folders: read, checked, narrowed, set. See acl(5) and, for their form, the
kernel's linux/posix_acl_xattr.h: a version, then tag, permission and account (a number) of each row.

A file's *access* list takes the place of its mode; what is made in a folder begins with the folder's *default* list.
The mask bounds what named accounts and the owning group may do; programs that know modes only see it in the group's
place.
"""

from __future__ import annotations

import errno
import functools
import os
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace

from protocol.errors import ProtocolError

ACCESS, DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"
NFS4 = b"system.nfs4_acl"
# Named accounts of one list. ext4 keeps some 500 in a block, XFS so many as go into 64 KiB.
MOST_ROWS = 1024
VERSION, HEADER, ROW = 2, struct.Struct("<I"), struct.Struct("<HHI")
MOST_BYTES = HEADER.size + MOST_ROWS * ROW.size
OWNER, USER, OWNING_GROUP, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
# Files of one tree have few lists between them. Of the largest that there may be, so many take 5 MiB.
REMEMBERED = 32
# What stands for an account in rows that name none, and what the kernel gives for one that it cannot tell.
_NO_ACCOUNT = 2**32 - 1
# Where the permission of the owner's row, which is the first, lies in a list.
_OWNER_PERMISSION = HEADER.size + 2
_NONE = frozenset({errno.ENODATA, errno.ENOTSUP, errno.ENOSYS})
# What says that a file system does not give or take a list or an attribute, or none; everything else is a fault of the
# file's as of any call, and may pass. EBADF: a folder that may be passed through and written to, but not read, is open
# for nothing else.
REFUSED = frozenset(
    {
        errno.ENOTSUP,
        errno.ENOSYS,
        errno.EPERM,
        errno.EACCES,
        errno.EBADF,
        errno.E2BIG,
        errno.ERANGE,
        errno.EINVAL,
        errno.ENAMETOOLONG,
    }
)

# Account and permission, in the order of the accounts' numbers.
Named = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class AccessList:
    """What the owner, the owning group, all others and named accounts may do: permissions are 0 to 7. ``mask`` is there
    wherever an account is named."""

    owner: int
    group: int
    other: int
    users: Named = ()
    groups: Named = ()
    mask: int | None = None

    @property
    def names_accounts(self) -> bool:
        return bool(self.users or self.groups)

    @property
    def mode(self) -> int:
        """The permission bits that a file with this list shows."""
        return self.owner << 6 | (self.group if self.mask is None else self.mask) << 3 | self.other

    @property
    def mode_of_groups_own(self) -> int:
        """The permission bits of a file without the list whose group may do what it may with it."""
        return self.owner << 6 | (self.group if self.mask is None else self.mask & self.group) << 3 | self.other

    def packed(self) -> bytes:
        """As the kernel takes it."""
        rows = [(OWNER, self.owner, _NO_ACCOUNT), *((USER, may, account) for account, may in self.users)]
        rows += [(OWNING_GROUP, self.group, _NO_ACCOUNT), *((GROUP, may, account) for account, may in self.groups)]
        if self.mask is not None:
            rows.append((MASK, self.mask, _NO_ACCOUNT))
        rows.append((OTHER, self.other, _NO_ACCOUNT))
        return HEADER.pack(VERSION) + b"".join(ROW.pack(*row) for row in rows)


@dataclass(frozen=True, slots=True)
class FoundLists:
    """The lists of a file or folder as `AccessList.packed` writes them, empty for none; ``left_out``: how many it has
    that cannot be read, or are of another kind (NFSv4)."""

    access: bytes = b""
    default: bytes = b""
    left_out: int = 0


def of_mode(mode: int) -> AccessList:
    """The list that says no more than a mode."""
    return AccessList(mode >> 6 & 7, mode >> 3 & 7, mode & 7)


def narrowed(found: AccessList, mode: int, permitted: int) -> AccessList:
    """A list as far as it may be taken over from a peer, with the mode that the file has without it.

    ``permitted`` are the permission bits that this machine gives to new files at all (the umask's complement): what it
    takes from a mode's group it takes from everybody whom the mask is for, named accounts included. The owning group
    and all others may never do more than the mode says.
    """
    group = permitted >> 3 & 7
    mask = None if found.mask is None else found.mask & group
    return AccessList(
        found.owner & mode >> 6 & permitted >> 6,
        found.group & group & (mode >> 3 | (0 if mask is None else ~mask)) & 7,
        found.other & mode & permitted,
        tuple((account, may & group) for account, may in found.users),
        tuple((account, may & group) for account, may in found.groups),
        mask,
    )


@functools.lru_cache(REMEMBERED)
def parse_untrusted(data: bytes) -> AccessList:
    """The list in a peer's bytes, which must be as `AccessList.packed` writes it. Raises only `ProtocolError`."""
    if not HEADER.size <= len(data) <= MOST_BYTES or (len(data) - HEADER.size) % ROW.size:
        raise ProtocolError("An access list of the peer has an impossible length.")
    if HEADER.unpack_from(data)[0] != VERSION:
        raise ProtocolError("An access list of the peer is of an unknown version.")
    single: dict[int, int] = {}
    users: list[tuple[int, int]] = []
    groups: list[tuple[int, int]] = []
    for tag, permission, account in ROW.iter_unpack(data[HEADER.size :]):
        if permission > 7:
            raise ProtocolError("An access list of the peer gives a permission that there is not.")
        if tag in (USER, GROUP):
            (users if tag == USER else groups).append((account, permission))
        else:
            single[tag] = permission
    if not single.keys() >= {OWNER, OWNING_GROUP, OTHER}:
        raise ProtocolError("An access list of the peer lacks the owner, the owning group or all others.")
    found = AccessList(
        single[OWNER], single[OWNING_GROUP], single[OTHER], tuple(users), tuple(groups), single.get(MASK)
    )
    if found.names_accounts and found.mask is None:
        raise ProtocolError("An access list of the peer names accounts and has no mask.")
    for named in (found.users, found.groups):
        accounts = [account for account, _ in named]
        if accounts != sorted(set(accounts)) or _NO_ACCOUNT in accounts:
            raise ProtocolError("An access list of the peer names an account twice, or one that cannot be.")
    # What was not looked at above (unknown tags, rows that come twice or out of order, their accounts) differs here.
    if found.packed() != data:
        raise ProtocolError("An access list of the peer is not in order.")
    return found


def with_owner(packed: bytes, permission: int) -> bytes:
    """The same list, with this permission of the owner besides."""
    before = packed[_OWNER_PERMISSION]
    return packed[:_OWNER_PERMISSION] + bytes([before | permission]) + packed[_OWNER_PERMISSION + 1 :]


def opened_for_owner(found: AccessList) -> AccessList:
    """A folder's list that lets its owner in, who has to work in it."""
    return replace(found, owner=7)


def usable() -> bool:
    """Whether this system has such lists at all."""
    return sys.platform == "linux"


if sys.platform == "linux":

    def read(fd: int) -> FoundLists:
        """The lists of an open file or folder; one that is not given is left out. Raises OSError for any other fault,
        and where it is not even said which there are."""
        try:
            names = {os.fsencode(name) for name in os.listxattr(fd)}
        except OSError as error:
            if error.errno in _NONE:
                return FoundLists()
            raise
        left_out = int(NFS4 in names)
        found = {ACCESS: b"", DEFAULT: b""}
        for name in found.keys() & names:
            try:
                found[name] = _in_order(os.getxattr(fd, name))
            except OSError as error:
                if error.errno not in _NONE | REFUSED:
                    raise
                left_out += error.errno not in _NONE
            except ProtocolError:
                # An account that has no number here (another user namespace), or more rows than anybody means.
                left_out += 1
        return FoundLists(found[ACCESS], found[DEFAULT], left_out)

    def write(fd: int, packed: bytes, *, default: bool = False) -> None:
        """Give an open file or folder a list; an empty default list takes it away. Raises OSError; ENOTSUP where the
        file system keeps none."""
        name = DEFAULT if default else ACCESS
        if packed:
            os.setxattr(fd, name, packed)
            return
        try:
            os.removexattr(fd, name)
        except OSError as error:
            if error.errno not in _NONE:
                raise

else:

    def read(fd: int) -> FoundLists:
        """No lists here."""
        del fd
        return FoundLists()

    def write(fd: int, packed: bytes, *, default: bool = False) -> None:
        """No lists here."""
        del fd, packed, default
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


@functools.lru_cache(REMEMBERED)
def _in_order(data: bytes) -> bytes:
    """A list of the kernel's, its rows sorted: it takes named accounts in any order. Raises `ProtocolError` for what is
    no such list."""
    rows: Iterable[tuple[int, int, int]] = ROW.iter_unpack(
        data[HEADER.size : len(data) - (len(data) - HEADER.size) % ROW.size]
    )
    packed = data[: HEADER.size] + b"".join(
        ROW.pack(*row) for row in sorted(rows, key=lambda row: (row[0], row[2], row[1]))
    )
    return parse_untrusted(packed).packed()
