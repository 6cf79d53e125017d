"""File operations on a collection, done by its agent: list, look, make, rename, link.

Paths are checked here and again by the agent, which alone resolves them. The agent's answers are checked too: a name
with a slash in it, which a client would join to a path elsewhere, is taken for a broken agent.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import trio

from protocol.control import MAX_FILTER, MAX_FILTERS, Entry, Listing, decode_untrusted
from protocol.errors import ProtocolError, TowpathError
from protocol.names import CollectionPath
from relay.rendezvous.registry import DECISION_HOLDS
from relay.times import listing_time
from relay.transfer.agents import AgentLinks
from relay.transfer.collections import Collection
from relay.transfer.fields import bad_request
from relay.transfer.operation_errors import (
    LISTING,
    MKDIR,
    RENAME,
    STAT,
    SYMLINK,
    Operation,
    disconnected,
    operation_error,
)
from relay.transfer.scopes import canonical, place

MAX_PATH = 16_384
# Bytes of a question on the link, which are in the header of a request there (`protocol.reverse_http.limits`).
MAX_QUERY = 60 * 1024
LISTING_TIMEOUT = 60.0

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ListingRequest:
    """What a client wants to see of a directory; None means the default."""

    path: str | None
    show_hidden: bool
    order: str | None
    filters: Sequence[str]
    limit: int
    offset: int


class Filesystem:
    """File operations through the links. Whether the caller may do them was decided before; ``reach`` says in which
    folders symlinks may end for this caller (None: anywhere). ``decide_again`` raises `ApiError` when that is not so
    any more: it is asked before what had to wait is done, and before what took long is shown."""

    def __init__(
        self,
        links: AgentLinks,
        *,
        timeout: float,
        caller: str,
        reach: list[str] | None = None,
        decide_again: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self._links = links
        self._timeout = timeout
        self._caller = caller
        self._reach = reach
        self._decide_again = decide_again

    async def list(self, collection: Collection, request: ListingRequest) -> dict[str, Any]:
        """``ls``. Raises `ApiError`."""
        text = request.path or collection.directory
        path = self._path(LISTING, collection, text, "path")
        if len(request.filters) > MAX_FILTERS or any(len(text) > MAX_FILTER for text in request.filters):
            raise bad_request(f"There may be {MAX_FILTERS} filters of {MAX_FILTER} characters each.")
        if len(request.order or "") > MAX_FILTER:
            raise bad_request(f"orderby may have {MAX_FILTER} characters.")
        query = [
            ("path", path),
            ("show_hidden", "1" if request.show_hidden else "0"),
            ("limit", str(request.limit)),
            ("offset", str(request.offset)),
        ]
        if request.order:
            query.append(("orderby", request.order))
        query.extend(("filter", text) for text in request.filters)
        listing = await self._ask(
            LISTING, collection, "GET", "ls", Listing, query=query, timeout=max(self._timeout, LISTING_TIMEOUT)
        )
        return listing_document(collection, text, listing)

    async def stat(self, collection: Collection, path: str | None) -> dict[str, Any]:
        """``stat``. Raises `ApiError`."""
        wanted = self._path(STAT, collection, path or collection.directory, "path")
        entry = await self._ask(STAT, collection, "GET", "stat", Entry, query=[("path", wanted)])
        return entry_document(entry)

    async def mkdir(self, collection: Collection, path: str) -> None:
        """Make a directory. Raises `ApiError`."""
        document = {"path": self._path(MKDIR, collection, path, "path")}
        await self._tell(MKDIR, collection, "mkdir", document)

    async def rename(self, collection: Collection, old_path: str, new_path: str) -> None:
        """Rename or move within the collection. Raises `ApiError`."""
        document = {
            "old_path": self._path(RENAME, collection, old_path, "old_path"),
            "new_path": self._path(RENAME, collection, new_path, "new_path"),
        }
        await self._tell(RENAME, collection, "rename", document)

    async def symlink(self, collection: Collection, path: str, target: str) -> None:
        """Make a symbolic link; the agent decides whether it may point there. Raises `ApiError`."""
        document = {"path": self._path(SYMLINK, collection, path, "path"), "symlink_target": target}
        await self._tell(SYMLINK, collection, "symlink", document)

    async def _ask(
        self,
        operation: Operation,
        collection: Collection,
        method: str,
        verb: str,
        kind: type[T],
        *,
        query: Sequence[tuple[str, str]],
        timeout: float | None = None,  # noqa: ASYNC109 - handed to the link
    ) -> T:
        node_id = self._node(operation, collection)
        began = trio.current_time()
        try:
            answer = await self._links.call(
                node_id,
                method,
                f"/link/collections/{collection.id}/{verb}",
                query=narrowed(query, self._reach),
                timeout=self._timeout if timeout is None else timeout,
                decide_again=self._decide_again,
                caller=self._caller,
            )
            if self._decide_again is not None and trio.current_time() - began > DECISION_HOLDS:
                await self._decide_again()
            return check_names_untrusted(decode_untrusted(answer, kind))
        except TowpathError as error:
            raise operation_error(operation, error, collection.display_name) from error

    async def _tell(self, operation: Operation, collection: Collection, verb: str, document: dict[str, str]) -> None:
        node_id = self._node(operation, collection)
        path = f"/link/collections/{collection.id}/{verb}"
        body = document if self._reach is None else {**document, "reach": self._reach}
        try:
            await self._links.call(
                node_id,
                "POST",
                path,
                document=body,
                timeout=self._timeout,
                decide_again=self._decide_again,
                caller=self._caller,
            )
        except TowpathError as error:
            raise operation_error(operation, error, collection.display_name) from error

    def _path(self, operation: Operation, collection: Collection, text: str, key: str) -> str:
        """A path of a collection whose agent is there, from the collection's root. Raises `ApiError`."""
        self._node(operation, collection)
        return checked_path(text, key, collection.home_path)

    def _node(self, operation: Operation, collection: Collection) -> str:
        if collection.node_id is None or not self._links.is_connected(collection.node_id):
            raise disconnected(operation, collection.display_name, served=collection.node_id is not None)
        return collection.node_id


def narrowed(query: Sequence[tuple[str, str]], reach: Sequence[str] | None) -> list[tuple[str, str]]:
    """A question about a path, which comes first in it, with the folders in which symlinks may end for whoever asks, as
    many as the link takes; none would mean anywhere, so that where no other is known or fits the path itself is named.

    Raises `ApiError` 400 for a question that is too long by itself.
    """
    left = MAX_QUERY - len(urlencode(query, quote_via=quote))
    if left < 0:
        raise bad_request("The path, the filters and the order are too long together.")
    if reach is None:
        return list(query)
    asked = list(query)
    for folder in reach or [query[0][1]]:
        one = ("reach", folder)
        left -= len(urlencode([one], quote_via=quote)) + 1
        if left < 0:
            break
        asked.append(one)
    if len(asked) == len(query):
        raise bad_request("The path is too long.")
    return asked


def check_names_untrusted(answer: T) -> T:
    """The answer itself, if every name in it can be a name. Raises only `ProtocolError`."""
    entries = answer.entries if isinstance(answer, Listing) else [answer] if isinstance(answer, Entry) else []
    for entry in entries:
        if "/" in entry.name or "\0" in entry.name or entry.name in (".", ".."):
            raise ProtocolError("The agent answered with a name that no file can have.")
    return answer


def checked_path(text: object, key: str, home: CollectionPath | None) -> str:
    """A client's path from the root of the collection. Raises `ApiError` 400, 409."""
    if not isinstance(text, str) or not text:
        raise bad_request(f"{key} must be a string that is not empty.")
    if len(text) > MAX_PATH:
        raise bad_request(f"{key} is longer than any path.")
    return canonical(place(text, key, home), text)


def listing_document(collection: Collection, requested: str, listing: Listing) -> dict[str, Any]:
    """The file_list document: ``path`` is the requested one with a slash at its end, as clients join names to it."""
    return {
        "DATA_TYPE": "file_list",
        "path": requested if requested.endswith("/") else requested + "/",
        "absolute_path": listing.absolute_path,
        "endpoint": collection.id,
        "rename_supported": True,
        "symlink_supported": True,
        "length": len(listing.entries),
        "total": listing.total,
        "limit": listing.limit,
        "offset": listing.offset,
        "DATA": [entry_document(entry) for entry in listing.entries],
    }


def entry_document(entry: Entry) -> dict[str, Any]:
    """The file document of one entry."""
    return {
        "DATA_TYPE": "file",
        "name": entry.name,
        "type": entry.type,
        "size": entry.size,
        "last_modified": listing_time(entry.mtime_ns),
        "permissions": f"{entry.mode & 0o7777:04o}",
        "user": entry.user,
        "group": entry.group,
        "link_target": entry.link_target,
        "link_size": entry.link_size,
        "link_user": None,
        "link_group": None,
        "link_last_modified": listing_time(entry.link_mtime_ns),
    }
