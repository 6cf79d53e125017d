"""Extended attributes and access lists on their way: read at the source with the version of their file, asked for by
the destination in batches, and set on temporaries before anything of these is durable. Only when the task asks for it.

What cannot be taken over is counted (`Counters.xattrs_left_out`, and three counts of access lists), and told once for
each reason; no file fails by it. `agent.transfer.basis.kept_lists` says which lists are taken over.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial

import trio

from agent.storage.access_lists import REFUSED, FoundLists
from agent.storage.attributes import LONGEST_NAME, MOST_ATTRIBUTES, MOST_BYTES, Found, is_attribute
from agent.storage.base import Root
from agent.storage.faults import fault
from agent.storage.node import version_of
from agent.transfer.basis.jobs import FileJob, Group, ListFate
from agent.transfer.basis.kept_lists import check_lists_untrusted, give_folder_lists, give_list, within_folder
from agent.transfer.basis.refusal import is_refusal
from agent.transfer.course.run import Run
from protocol import session
from protocol.control import TaskItem
from protocol.errors import ItemFailed, ProtocolError, TowpathError, Who, error_from_document_untrusted
from protocol.names import CollectionPath, parse_path_untrusted
from protocol.session import join_path

# Seconds after which an answer has what was read by then: a file server that does not answer takes its time for each
# file, and the destination does not wait for hundreds of them (`source_session.ANSWER_TIMEOUT`).
ANSWER_WITHIN = 10.0
CODE, LISTS_CODE = "ATTRIBUTES_LEFT_OUT", "ACCESS_LISTS_NOT_KEPT"
# Told of each attribute or list that the destination did not take, with the code of its event. Any thread may call.
Refused = Callable[[FileJob, OSError, str], None]

# --- at the source -------------------------------------------------------------------------------------------


def read_attributes(
    root: Root, request: session.ReadAttributes, allowed: Callable[[bytes], CollectionPath]
) -> session.Attributes:
    """The answer to a request, or its beginning. ``allowed`` checks a path (`TowpathError`). Blocks.

    What cannot be read, or is another version by now, has its attributes left out: reading the content says why, unless
    it is a fault that may have passed by then, which is told here.
    """
    if not 0 < len(request.files) <= session.MAX_ATTRIBUTE_FILES:
        raise ProtocolError("Attributes of an impossible number of files were asked for.")
    found = []
    size = 0
    enough = time.monotonic() + ANSWER_WITHIN
    for asked in request.files:
        try:
            file = _attributes_of(root, asked, allowed(asked.path), request)
        except ProtocolError:
            raise
        except OSError as error:
            lasts = error.errno in REFUSED
            file = _unread(request, None if lasts else fault(error, "source", asked.path))
        except TowpathError as error:
            file = _unread(request, error)
        found.append(file)
        size += sum(len(name) + len(value) for name, value in file.attributes) + len(file.access) + len(file.default)
        if size >= session.ATTRIBUTE_BYTES or time.monotonic() >= enough:
            break
    return session.Attributes(request.r, found)


def _unread(request: session.ReadAttributes, error: TowpathError | None = None) -> session.FileAttributes:
    # Destinations of before know only that something is left out.
    document = None if error is None or isinstance(error, ItemFailed) else error.to_document()
    return session.FileAttributes([], int(request.attributes), lists_left_out=int(request.lists), error=document)


def _attributes_of(
    root: Root, asked: session.AttributesOf, path: CollectionPath, request: session.ReadAttributes
) -> session.FileAttributes:
    with ExitStack() as stack:
        if asked.version is None:
            handle = stack.enter_context(root.open_directory(path)).fileno()
            if handle is None:
                return session.FileAttributes([])
        else:
            parent, name = root.open_parent(path)
            with parent:
                handle = parent.open_read(name, follow=request.follow)
            stack.callback(root.close_file, handle)
        found = root.get_attributes(handle) if request.attributes else Found()
        lists = root.get_access_lists(handle) if request.lists else FoundLists()
        if asked.version is not None and version_of(root.fstat(handle)) != tuple(asked.version):
            return _unread(request)
    rights = found.rights - found.lists if request.lists else found.rights
    return session.FileAttributes(found.attributes, found.left_out, rights, lists.access, lists.default, lists.left_out)


# --- at the destination --------------------------------------------------------------------------------------


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
        refused(job, error, CODE)


def give_access_list(root: Root, job: FileJob, fd: int, permitted: int, refused: Refused, *, owner: int = 0) -> None:
    """Give a job's temporary the access list that is wanted. Raises OSError as `kept_lists.give_list` does."""
    error = give_list(root, job, fd, permitted, owner=owner)
    if error is not None:
        refused(job, error, LISTS_CODE)


class Attributes:
    """Asks the source. Methods are called in the trio thread."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._policy = run.context.lists
        self._attributes, self._lists = run.options.preserve_xattrs, run.options.preserve_acls
        # Whether the task asks for either.
        self.wanted = self._attributes or self._lists
        self._told: set[tuple[str, str]] = set()
        # Folders that the task was sent to by name: whatever lists they have are no affair of the task's.
        self._named = frozenset(_named(run.context.order.items or ()) if self._lists else ())

    @property
    def asked_for(self) -> bool:
        """Whether the task wants attributes or access lists and the source can give them. Says what it cannot."""
        if not self.wanted:
            return False
        abilities = self._run.session.abilities
        if self._lists and session.ACCESS_LISTS not in abilities:
            self._tell(
                "The agent of the source, or its operating system, cannot give access lists; none are kept.",
                who="source owner",
                code=LISTS_CODE,
            )
        if session.ATTRIBUTES in abilities:
            return True
        if self._attributes:
            self._tell(
                "The agent of the source, or its operating system, cannot read extended attributes; none are taken "
                "over.",
                who="source owner",
            )
        return False

    async def _ask(self, asked: list[session.AttributesOf], *, follow: bool) -> list[session.FileAttributes]:
        lists = self._lists and session.ACCESS_LISTS in self._run.session.abilities
        files = await self._run.session.attributes(
            asked, follow=follow, attributes=self._attributes or not lists, lists=lists
        )
        check_attributes_untrusted(files, len(asked))
        if self._lists and not lists:
            # All that a source of before says is that there is something that grants rights.
            files = [session.FileAttributes(file.attributes, file.left_out, 0, b"", b"", file.rights) for file in files]
        return files

    async def read(self, jobs: Sequence[FileJob]) -> int:
        """Ask for the attributes of some jobs that are followed alike; the source answers for the first few of them,
        and this says for how many. All of them when there is nothing to ask."""
        if not jobs or not self.asked_for:
            return len(jobs)
        jobs = jobs[: session.MAX_ATTRIBUTE_FILES]
        asked = [session.AttributesOf(job.source_path, job.row.version) for job in jobs]
        files = await self._ask(asked, follow=jobs[0].follow)
        for job, file in zip(jobs, files, strict=False):
            job.attributes = []
            if file.error is not None:
                job.attributes_error = error_from_document_untrusted(file.error)
                continue
            if self._attributes:
                job.attributes, job.attributes_left_out = file.attributes, self._left_out(job.source_path, file)
            if self._lists:
                job.access, job.list_fate = self._policy.of_file(file, job.row.mode)
                self._tell_fate(job.source_path, file, job.list_fate)
        return len(files)

    async def folder(self, group: Group) -> TowpathError | None:
        """Take over the attributes of a folder that is being worked on; why the source could not look at them. Raises
        OSError of the destination for a fault that may pass, or needs a person."""
        if not self.asked_for:
            return None
        (file,) = await self._ask([session.AttributesOf(group.source)], follow=False)
        if file.error is not None:
            return error_from_document_untrusted(file.error)
        handle = group.handle.fileno()
        if self._attributes:
            await self._folder_attributes(group, handle, file)
        if self._lists:
            await self._folder_lists(group, handle, file)
        return None

    async def _folder_attributes(self, group: Group, handle: int | None, file: session.FileAttributes) -> None:
        left_out = self._left_out(group.source, file)
        if handle is not None and file.attributes:
            # Synced with the folder's entries.
            group.made_folders = True
            root = self._run.context.root
            refusals = await trio.to_thread.run_sync(write_attributes, root, handle, file.attributes)
            for error in refusals:
                self.refused(group.destination, error)
            left_out += len(refusals)
        group.attributes_left_out = bool(left_out)

    async def _folder_lists(self, group: Group, handle: int | None, file: session.FileAttributes) -> None:
        access, default, group.list_fate = self._policy.of_folder(file)
        self._tell_fate(group.source, file, group.list_fate)
        if handle is None:
            return
        group.made_folders = True
        root = self._run.context.root
        if access is not None and not group.empty:
            given = await trio.to_thread.run_sync(within_folder, root, handle, access)
            if given != access:
                access, group.list_fate = given, ListFate.NOT_KEPT
                self._tell_not_widened(group.destination)
        give = partial(give_folder_lists, root, handle, access, default, own=group.destination not in self._named)
        error = await trio.to_thread.run_sync(give)
        if error is not None and group.list_fate:
            group.list_fate = ListFate.REFUSED
            self.refused(group.destination, error, LISTS_CODE)

    def _tell_not_widened(self, path: bytes) -> None:
        subject = fault(OSError(errno.EIO, ""), "destination", path).subject
        self._tell(
            f"The access list of {subject} gives its group or all others more than they may do in the folder that was "
            "there before with something in it, and is not kept in full. Such folders are counted.",
            who="destination owner",
            kind="folder",
            code=LISTS_CODE,
        )

    def refused(self, path: bytes, error: OSError, code: str = CODE) -> None:
        """The destination did not take an attribute, or an access list."""
        reason = fault(error, "destination", path).sentence
        if code == LISTS_CODE:
            if error.errno in (errno.ENOTSUP, errno.ENOSYS):
                reason = "The destination's file system keeps no access lists."
            sentence = f"{reason} Its mode alone holds for such a file or folder, and it is counted."
            self._tell(sentence, who="destination owner", kind=str(error.errno), code=code)
            return
        if error.errno in (errno.ENOTSUP, errno.ENOSYS):
            reason = "The destination's file system keeps no extended attributes."
        elif error.errno in (errno.ENOSPC, errno.E2BIG, errno.ERANGE):
            reason = f"Extended attributes of {fault(error, 'destination', path).subject} are larger than the "
            reason += "destination's file system allows."
        self._tell(f"{reason} They are left out and counted.", who="destination owner", kind=str(error.errno))

    def _left_out(self, path: bytes, file: session.FileAttributes) -> int:
        """How many the source keeps back, which is said."""
        subject = fault(OSError(errno.EIO, ""), "source", path).subject
        if file.left_out:
            self._tell(
                f"Not all extended attributes of {subject} could be read at the source, or they are too many or too "
                "large. They are left out and counted.",
                who="source owner",
                kind="source",
            )
        if file.rights:
            what = "capabilities" if self._lists else "access list or the capabilities"
            self._tell(
                f"The {what} of {subject} are not taken over: they name accounts of the "
                "source's machine, who are others elsewhere. Such files and folders are counted.",
                who="",
                kind="rights",
            )
        return file.left_out + file.rights

    def _tell_fate(self, path: bytes, file: session.FileAttributes, fate: ListFate) -> None:
        """Say why an access list is not kept, or not in full."""
        if fate != ListFate.NOT_KEPT:
            return
        subject = fault(OSError(errno.EIO, ""), "source", path).subject
        who: Who = "source owner"
        if file.lists_left_out:
            kind, reason = "source", "cannot be read at the source, or is of a kind that is not kept (NFSv4)"
        elif not self._policy.numbers and self._policy.names_accounts(file):
            kind, who = "accounts", "destination owner"
            reason = (
                "names accounts of the source's machine, who may be others elsewhere; it is kept where the owner of "
                "the destination says that numbers mean the same people (`access_lists: numbers`)"
            )
        else:
            kind, who = "umask", "destination owner"
            reason = f"gives rights that the destination gives to no file (its umask is {self._policy.umask:03o})"
        sentence = f"The access list of {subject} {reason}. Such files and folders are counted."
        self._tell(sentence, who=who, kind=kind, code=LISTS_CODE)

    def _tell(self, sentence: str, *, who: Who, kind: str = "", code: str = CODE) -> None:
        if (code, kind) not in self._told:
            self._told.add((code, kind))
            self._run.context.on_fault(ItemFailed(sentence, code=code, who=who))


def _named(items: Sequence[TaskItem]) -> Iterator[bytes]:
    for item in items:
        # One whose name cannot be fails by itself.
        with suppress(ProtocolError):
            yield join_path(parse_path_untrusted(item.destination_path))
