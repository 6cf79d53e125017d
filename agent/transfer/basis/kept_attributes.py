"""Extended attributes that a task keeps: checked when they come, and set on temporaries before anything of these is
durable; access lists likewise, of which `agent.transfer.basis.kept_lists` says which are kept.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence

from agent.storage.attributes import LONGEST_NAME, MOST_ATTRIBUTES, MOST_BYTES, is_attribute
from agent.storage.base import Root
from agent.transfer.basis.jobs import FileJob
from agent.transfer.basis.kept_lists import check_lists_untrusted, give_list
from agent.transfer.basis.refusal import is_refusal
from protocol import session
from protocol.errors import ProtocolError

# The codes of the events that tell what is not kept.
ATTRIBUTES_CODE, LISTS_CODE = "ATTRIBUTES_LEFT_OUT", "ACCESS_LISTS_NOT_KEPT"
# Told of each attribute or list that the destination did not take, with the code of its event. Any thread may call.
Refused = Callable[[FileJob, OSError, str], None]


def check_attributes_untrusted(files: Sequence[session.FileAttributes], asked: int) -> None:
    """Refuse what no honest source answers. Raises only `ProtocolError`."""
    if not 0 < len(files) <= asked:
        raise ProtocolError("The source sends extended attributes of other files than it was asked about.")
    for file in files:
        names = {name for name, _ in file.attributes}
        size = sum(len(name) + len(value) for name, value in file.attributes)
        if len(names) < len(file.attributes) or len(names) > MOST_ATTRIBUTES or size > MOST_BYTES:
            raise ProtocolError("The source sends more extended attributes than a file may have.")
        if not all(0 < len(name) <= LONGEST_NAME and b"\0" not in name for name in names):
            raise ProtocolError("The source sends an extended attribute with an impossible name.")
        if not (0 <= file.left_out < 2**31 and 0 <= file.rights < 2**31):
            raise ProtocolError("The source left out an impossible number of extended attributes.")
        check_lists_untrusted(file)


def write_attributes(root: Root, fd: int, attributes: Sequence[tuple[bytes, bytes]]) -> list[OSError]:
    """Set attributes of an open file or folder: why some cannot be set. Raises OSError for a fault that may pass, or
    needs a person. Blocks."""
    refusals: list[OSError] = []
    for name, value in attributes:
        if not is_attribute(name):
            # What the agent keeps for itself.
            refusals.append(OSError(errno.EPERM, os.strerror(errno.EPERM)))
            continue
        try:
            root.set_attribute(fd, name, value)
        except OSError as error:
            if not is_refusal(root, error):
                raise
            refusals.append(error)
    return refusals


def attributes_size(job: FileJob) -> int:
    """Bytes that a job's attributes and access list hold until it is settled."""
    # Of nearly every file: nothing.
    size = 0 if job.access is None else len(job.access.packed)
    if job.attributes:
        size += sum(len(name) + len(value) for name, value in job.attributes)
    return size


def give_attributes(root: Root, job: FileJob, fd: int, refused: Refused) -> None:
    """Set the attributes of a job's temporary, as far as they can be. Raises OSError as `write_attributes` does."""
    for error in write_attributes(root, fd, job.attributes or ()):
        job.attributes_left_out += 1
        refused(job, error, ATTRIBUTES_CODE)


def give_access_list(root: Root, job: FileJob, fd: int, permitted: int, refused: Refused, *, owner: int = 0) -> None:
    """Give a job's temporary the access list that is wanted. Raises OSError as `kept_lists.give_list` does."""
    error = give_list(root, job, fd, permitted, owner=owner)
    if error is not None:
        refused(job, error, LISTS_CODE)
