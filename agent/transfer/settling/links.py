"""Making links, and one more name of a file that is here already, and telling which file a name is of."""

from __future__ import annotations

import errno
import os

from agent.storage.base import Directory, Root
from agent.storage.faults import fault
from agent.transfer.basis.jobs import HardLinkWanted, LinkWanted
from agent.transfer.basis.journal_rows import Place
from agent.transfer.settling.small_files import temporary_fault
from protocol.errors import TowpathError


def place_of(handle: Directory, name: bytes) -> Place:
    """What a name is. Raises OSError."""
    node = handle.lstat(name)
    return (node.device, node.inode, node.size, node.mtime_ns)


def add_name(root: Root, link: HardLinkWanted, temporary: bytes) -> None:
    """Give the file one more name, through a temporary one, which is gone afterwards unless the name was one of this
    file before.

    Whoever may write to the folder can have put something else where the file was, or written to it: what was linked is
    looked at before it gets the name. Raises OSError; ESTALE for something else. The temporary name may be there then.
    """
    handle = link.job.group.handle
    parent, name = root.open_parent(tuple(link.target.split(b"/")))
    with parent:
        parent.link(name, temporary, handle)
    if place_of(handle, temporary) != link.place:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    handle.rename(temporary, link.job.name)


def make_link(link: LinkWanted, temporary: bytes, *, preserve_timestamp: bool) -> TowpathError | None:
    """Make a symlink, under a temporary name until it is complete. What kept it from that; the temporary name may be
    there then."""
    job, made = link.job, False
    try:
        job.group.handle.symlink(temporary, link.target)
        made = True
        job.group.handle.rename(temporary, job.name)
        if preserve_timestamp:
            job.group.handle.set_times(job.name, job.row.mtime_ns)
    except OSError as error:
        if made:
            return temporary_fault(error, job, temporary)
        return fault(error, "destination", job.destination_path)
    return None
