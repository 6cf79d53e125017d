"""What the relay may do with what is in a collection: list, look, make folders and links, move.

Everything is asked of the owner's policy before it waits for storage, and again right before it changes or shows
anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import trio
from starlette.requests import Request
from starlette.responses import Response

from agent.collections import Collections
from agent.config.keys import CollectionConfig
from agent.link_documents import body_untrusted, document_response, number_untrusted
from agent.link_events import until_disconnected
from agent.policy import Access, Policy
from agent.storage.base import Directory, Root
from agent.storage.faults import fault
from agent.storage.listing import Accounts, list_directory, stat_entry
from agent.storage.own_files import HoldsOwn
from agent.storage.query import parse_query_untrusted
from agent.storage.reach import Reach
from protocol.control import MAX_ENTRIES, Entry, Listing, Record
from protocol.errors import ItemFailed, ProtocolError, RetryLater, TowpathError
from protocol.names import CollectionPath, format_path, parse_path_untrusted, unescape

# Storage calls at a time, for each collection: a file server that hangs holds up its own collection only.
CALLS_AT_ONCE = 4
MAX_LINK_TARGET = 4096

T = TypeVar("T")
AskAgain = Callable[[], None]


class _Body(Record, frozen=True, kw_only=True):
    reach: list[str] | None = None


class _PathBody(_Body, frozen=True, kw_only=True):
    path: str


class _RenameBody(_Body, frozen=True, kw_only=True):
    old_path: str
    new_path: str


class _SymlinkBody(_Body, frozen=True, kw_only=True):
    path: str
    symlink_target: str


@dataclass(frozen=True)
class _Asked:
    """What was allowed: an access to one or more paths of a collection, as it is set up then."""

    config: CollectionConfig
    access: Access
    paths: tuple[CollectionPath, ...]

    @property
    def path(self) -> CollectionPath:
        """The only path, or the first one."""
        return self.paths[0]


class LinkFiles:
    """Handlers of the routes below one collection. They raise `TowpathError`."""

    def __init__(self, policy: Policy, collections: Collections) -> None:
        self._policy = policy
        self._collections = collections
        self._accounts = Accounts()
        self._limiters: dict[str, trio.CapacityLimiter] = {}

    async def _on(
        self, request: Request, asked: _Asked, reach: Sequence[str] | None, work: Callable[[Root, AskAgain], T]
    ) -> T:
        """Do something to a collection's root, in a thread. ``work`` gets the root, and what it calls right before it
        changes or shows anything: after waiting for a turn or a disk it may be allowed no more, or wanted by nobody.

        ``reach`` names the folders in which symlinks may end; None is the whole collection. Raises `TowpathError`.
        """
        narrow = None if reach is None else Reach(tuple(parse_path_untrusted(folder) for folder in reach))
        left = False

        def ask_again() -> None:
            if left:
                raise ProtocolError("The request was broken off.")
            self._check_again(asked)

        def in_thread() -> T | TowpathError:
            try:
                with self._collections.using(asked.config) as whole:
                    if narrow is None:
                        return work(whole, ask_again)
                    with whole.narrowed(narrow) as root:
                        return work(root, ask_again)
            except OSError as error:
                return fault(error, "", asked.path)
            except TowpathError as error:
                return error

        limiter = self._limiters.setdefault(asked.config.id, trio.CapacityLimiter(CALLS_AT_ONCE))
        # What the relay wants no more: nothing else would tell before the time for it has run out.
        done: T | TowpathError = ProtocolError("The request was broken off.")
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(until_disconnected, request.receive, nursery.cancel_scope)
                done = await trio.to_thread.run_sync(in_thread, limiter=limiter, abandon_on_cancel=True)
                nursery.cancel_scope.cancel()
        finally:
            # A thread that waits for a disk cannot be stopped; it does nothing more once it goes on.
            left = True
        if isinstance(done, TowpathError):
            raise done
        return done

    def _allowed(self, request: Request, access: Access, *texts: str) -> _Asked:
        """Paths of the relay, parsed and decided about. Raises `TowpathError`."""
        config = self._policy.collection(request.path_params["collection"])
        home = parse_path_untrusted(config.home)
        paths = tuple(parse_path_untrusted(text, home) for text in texts)
        for path in paths:
            config = self._policy.check(config.id, path, access)
        return _Asked(config, access, paths)

    def _check_again(self, asked: _Asked) -> None:
        """Whether what was allowed still is. May be called from any thread. Raises `TowpathError`."""
        for path in asked.paths:
            now = self._policy.check(asked.config.id, path, asked.access)
            if (now.root, now.hidden) != (asked.config.root, asked.config.hidden):
                raise RetryLater("The owner has changed this collection; ask again.", code="COLLECTION_CHANGED")

    async def ls(self, request: Request) -> Response:
        """Directory listing, as the query filters and orders it."""
        query = request.query_params
        asked = self._allowed(request, "r", query.get("path") or "~")
        wanted = parse_query_untrusted(
            filters=query.getlist("filter"),
            orderby=query.get("orderby", ""),
            limit=number_untrusted(request, "limit", MAX_ENTRIES),
            offset=number_untrusted(request, "offset", 0),
            show_hidden=query.get("show_hidden", "1") != "0",
        )

        def work(root: Root, ask_again: AskAgain) -> Listing:
            ask_again()
            listing = list_directory(root, asked.path, wanted, self._accounts)
            ask_again()
            return listing

        return document_response(await self._on(request, asked, query.getlist("reach") or None, work))

    async def stat(self, request: Request) -> Response:
        """One entry."""
        query = request.query_params
        asked = self._allowed(request, "r", query.get("path") or "~")

        def work(root: Root, ask_again: AskAgain) -> Entry:
            entry = stat_entry(root, asked.path, self._accounts)
            ask_again()
            return entry

        return document_response(await self._on(request, asked, query.getlist("reach") or None, work))

    async def mkdir(self, request: Request) -> Response:
        """Make a folder."""
        body = await body_untrusted(request, _PathBody)
        asked = self._allowed(request, "rw", body.path)
        if not asked.path:
            raise ItemFailed("The root of the collection exists already.", code="EXISTS")

        def work(root: Root, ask_again: AskAgain) -> None:
            parent, name = _open_parent(root, asked.path)
            with parent:
                ask_again()
                parent.mkdir(name)
                parent.sync()

        await self._on(request, asked, body.reach, work)
        return Response(status_code=201)

    async def rename(self, request: Request) -> Response:
        """Move something, over nothing."""
        body = await body_untrusted(request, _RenameBody)
        asked = self._allowed(request, "rw", body.old_path, body.new_path)
        old, new = asked.paths
        if old and len(new) > len(old) and new[: len(old)] == old:
            raise ItemFailed(f"{format_path(old)} cannot be moved into itself.", code="ILLEGAL_NAME", who="you")

        def work(root: Root, ask_again: AskAgain) -> None:
            source, old_name = root.open_parent(old)
            with source:
                # What is missing or in the way is named by the path it concerns.
                source.lstat(old_name)
                try:
                    target, new_name = _open_parent(root, new)
                    with target:
                        ask_again()
                        source.rename_no_replace(old_name, new_name, target)
                        target.sync()
                except HoldsOwn:
                    raise
                except OSError as error:
                    raise fault(error, "", new) from error
                source.sync()

        await self._on(request, asked, body.reach, work)
        return document_response({})

    async def symlink(self, request: Request) -> Response:
        """Make a symlink."""
        body = await body_untrusted(request, _SymlinkBody)
        asked = self._allowed(request, "rw", body.path)
        target = unescape(body.symlink_target)
        if not target or len(target) > MAX_LINK_TARGET or b"\0" in target:
            raise ProtocolError("The target of the symlink is no path.", code="ILLEGAL_NAME")

        def work(root: Root, ask_again: AskAgain) -> None:
            parent, name = _open_parent(root, asked.path)
            with parent:
                ask_again()
                parent.symlink(name, target)
                parent.sync()

        await self._on(request, asked, body.reach, work)
        return Response(status_code=201)


def _open_parent(root: Root, path: CollectionPath) -> tuple[Directory, bytes]:
    """The folder in which something is to be made, and its name there. Where that folder is not there it is what is
    missing, and not the thing that is to be made. Raises OSError, `TowpathError`."""
    try:
        return root.open_parent(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise fault(error, "", path[:-1]) from error
