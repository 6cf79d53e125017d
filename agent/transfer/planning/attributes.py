"""Asking the source for extended attributes and access lists, in batches, where the task wants them.

What cannot be taken over is counted (`Counters.xattrs_left_out`, and three counts of access lists), and told once for
each reason; no file fails by it. `agent.transfer.basis.kept_lists` says which lists are taken over.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial

import trio

from agent.storage.faults import fault
from agent.transfer.basis.jobs import FileJob, Group, ListFate
from agent.transfer.basis.kept_attributes import (
    ATTRIBUTES_CODE,
    LISTS_CODE,
    check_attributes_untrusted,
    write_attributes,
)
from agent.transfer.basis.kept_lists import give_folder_lists, within_folder
from agent.transfer.course.run import Run
from protocol import session
from protocol.control import TaskItem
from protocol.errors import ItemFailed, ProtocolError, TowpathError, Who, error_from_document_untrusted
from protocol.names import parse_path_untrusted
from protocol.session import join_path


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

    def refused(self, path: bytes, error: OSError, code: str = ATTRIBUTES_CODE) -> None:
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

    def _tell(self, sentence: str, *, who: Who, kind: str = "", code: str = ATTRIBUTES_CODE) -> None:
        if (code, kind) not in self._told:
            self._told.add((code, kind))
            self._run.context.on_fault(ItemFailed(sentence, code=code, who=who))


def _named(items: Sequence[TaskItem]) -> Iterator[bytes]:
    for item in items:
        # One whose name cannot be fails by itself.
        with suppress(ProtocolError):
            yield join_path(parse_path_untrusted(item.destination_path))
