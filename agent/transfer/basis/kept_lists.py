"""Access lists at the destination: what becomes of the source's, for tasks with `preserve_acls`.

A file gets the source's list, or none where the source has none: the default list of its folder here may be one that
this task has brought, and would open the file to accounts that cannot read it at the source. A list that names accounts
is left out unless the collection's owner says that numbers mean the same people here. Then, as for every file without
a list, the mode alone holds, in which the group has its own rights and not the mask's. No list gives more than a mode
would within this machine's umask (`agent.storage.access_lists.narrowed`).
"""

from __future__ import annotations

import errno
import functools

from agent.storage.access_lists import (
    REMEMBERED,
    AccessList,
    FoundLists,
    narrowed,
    of_mode,
    opened_for_owner,
    parse_untrusted,
    with_owner,
)
from agent.storage.attributes import mode_of_everybody
from agent.storage.base import PERMISSION_BITS, Root
from agent.transfer.basis.jobs import FileJob, ListFate, ListWanted
from agent.transfer.basis.refusal import is_refusal
from protocol import session
from protocol.errors import ProtocolError

_NO_LISTS = frozenset({errno.ENOTSUP, errno.ENOSYS})


class ListPolicy:
    """What may be taken over: ``permitted``, the permission bits that new files are given here at all, and whether
    lists may name accounts by ``numbers``."""

    def __init__(self, permitted: int, *, numbers: bool) -> None:
        self.permitted = permitted
        self.numbers = numbers
        self._decided = functools.lru_cache(REMEMBERED)(self._decide)

    @property
    def umask(self) -> int:
        return PERMISSION_BITS & ~self.permitted

    def names_accounts(self, file: session.FileAttributes) -> bool:
        """Whether a list of a file or folder names accounts."""
        lists = (_parsed(file.access), _parsed(file.default))
        return any(found.names_accounts for found in lists if found is not None)

    def of_file(self, file: session.FileAttributes, mode: int) -> tuple[ListWanted, ListFate]:
        """The list of a file with this mode, and what became of the source's. Raises `ProtocolError` for bytes that are
        no list."""
        return self._decided(file.access, mode, file.lists_left_out > 0)

    def _decide(self, access: bytes, mode: int, left_out: bool) -> tuple[ListWanted, ListFate]:
        found = _parsed(access)
        given = None if found is None else self._given(found, mode)
        fate = _fate(found, given, left_out=left_out)
        if given is None:
            given = of_mode(mode & self.permitted)
        return ListWanted(given.packed(), given.mode, given.mask is not None), fate

    def of_folder(self, file: session.FileAttributes) -> tuple[AccessList | None, AccessList | None, ListFate]:
        """The access list and the default list of a folder, None for none, and what became of the source's. The mode of
        a folder is this machine's affair, and its owner always gets in."""
        # What is made in it begins with the default list, folders among it.
        access, default = (
            None if found is None else opened_for_owner(found) for found in map(_parsed, (file.access, file.default))
        )
        given = [None if found is None else self._given(found, PERMISSION_BITS) for found in (access, default)]
        fates = [_fate(access, given[0], left_out=file.lists_left_out > 0), _fate(default, given[1], left_out=False)]
        return given[0], given[1], ListFate(max(fates))

    def _given(self, found: AccessList, mode: int) -> AccessList | None:
        if found.names_accounts and not self.numbers:
            return None
        return narrowed(found, mode, self.permitted)


def check_lists_untrusted(file: session.FileAttributes) -> None:
    """Refuse what no honest source answers. Raises only `ProtocolError`."""
    if not 0 <= file.lists_left_out < 2**31:
        raise ProtocolError("The source left out an impossible number of access lists.")
    for packed in (file.access, file.default):
        _parsed(packed)


def give_list(root: Root, job: FileJob, fd: int, permitted: int, *, owner: int = 0) -> OSError | None:
    """Give a temporary the list that its file is to have, with these rights of the owner besides, and so its mode.
    Where the file system does not take it the file has its mode alone, of the bits ``permitted``; why a list was
    refused, which is counted. Raises OSError for a fault that may pass, or needs a person. Blocks.
    """
    wanted = job.access
    if wanted is None:
        return None
    try:
        root.set_access_list(fd, with_owner(wanted.packed, owner))
    except OSError as error:
        if not is_refusal(root, error):
            raise
        # First, so that the mode is never that of a list that is not there.
        job.access = None
        mode = job.row.mode & permitted | owner << 6
        if error.errno not in _NO_LISTS and wanted.extended:
            _take_away(root, fd, of_mode(mode))
        root.fchmod(fd, mode)
        if not wanted.extended and error.errno in _NO_LISTS:
            return None
        job.list_fate = ListFate.REFUSED
        return error
    return None


def within_folder(root: Root, fd: int, access: AccessList) -> AccessList:
    """A list for a folder in which there was something before, which may be somebody else's: as far as it gives the
    owning group and all others no more than they may do there now. What this task gave it in an earlier run stays so.
    Raises OSError for a fault that may pass. Blocks."""
    mode = root.fstat(fd).st_mode
    try:
        found = root.get_access_lists(fd)
    except OSError as error:
        if not is_refusal(root, error):
            raise
        found = FoundLists(left_out=1)
    if found.access:
        mode = parse_untrusted(found.access).mode_of_groups_own
    elif found.left_out:
        # What the mode shows in the group's place may be a mask.
        mode = mode_of_everybody(mode)
    return narrowed(access, mode | 0o700, PERMISSION_BITS)


def give_folder_lists(
    root: Root, fd: int, access: AccessList | None, default: AccessList | None, *, own: bool
) -> OSError | None:
    """Give a folder here the lists it is to have. ``own``: it is not one that the task was sent to by name, so that
    lists it has may come from this very task; they go where the source has none. Why one was refused. Raises OSError
    for a fault that may pass. Blocks."""
    found, refused = FoundLists(), None
    try:
        if own and (access is None or default is None):
            found = root.get_access_lists(fd)
    except OSError as error:
        if not is_refusal(root, error):
            raise
        return error
    if access is None and found.access:
        access = of_mode(parse_untrusted(found.access).mode_of_groups_own)
    for given, is_default in ((access, False), (default, True)):
        if given is None and not (is_default and found.default):
            continue
        try:
            root.set_access_list(fd, b"" if given is None else given.packed(), default=is_default)
        except OSError as error:
            if not is_refusal(root, error):
                raise
            refused = error
            if own and given is not None and error.errno not in _NO_LISTS:
                _take_away_of_folder(root, fd, default=is_default)
    return refused


def _take_away(root: Root, fd: int, mode: AccessList) -> None:
    """What a file or folder has from the folder above it goes where its own list is refused: it names others. Raises
    OSError for a fault that may pass."""
    try:
        root.set_access_list(fd, mode.packed())
    except OSError as error:
        if not is_refusal(root, error):
            raise


def _take_away_of_folder(root: Root, fd: int, *, default: bool) -> None:
    """`_take_away` for one list of a folder. Raises OSError for a fault that may pass."""
    try:
        if default:
            root.set_access_list(fd, b"", default=True)
            return
        found = root.get_access_lists(fd).access
    except OSError as error:
        if not is_refusal(root, error):
            raise
        return
    if found:
        _take_away(root, fd, of_mode(parse_untrusted(found).mode_of_groups_own))


def _parsed(packed: bytes) -> AccessList | None:
    return parse_untrusted(packed) if packed else None


def _fate(found: AccessList | None, given: AccessList | None, *, left_out: bool) -> ListFate:
    if left_out or given != found:
        return ListFate.NOT_KEPT
    return ListFate.NONE if found is None else ListFate.KEPT
