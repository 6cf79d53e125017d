"""Bookmarks: names that a person gives to folders of collections. Each belongs to one identity and nobody else."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from relay.access.decisions import Ability
from relay.refusal import ApiError
from relay.store import transfer_tables as tables
from relay.transfer import collections
from relay.transfer.fields import Fields, bad_request
from relay.transfer.scopes import place

MAX_NAME = 128
MAX_PATH = 16_384
MAX_BOOKMARKS = 10_000
# Characters of one person's paths together: all of them are in one answer.
MAX_PATHS = 2_000_000

_bookmark = tables.bookmarks.c


@dataclass(frozen=True)
class Bookmark:
    """One bookmark."""

    id: str
    name: str
    endpoint_id: str
    path: str
    pinned: bool


_COLUMNS = [_bookmark.id, _bookmark.name, _bookmark.endpoint_id, _bookmark.path, _bookmark.pinned]


def bookmark_document(bookmark: Bookmark) -> dict[str, Any]:
    """The bookmark document of the Transfer API."""
    return {"DATA_TYPE": "bookmark", **vars(bookmark)}


def of(connection: Connection, owner_id: str) -> list[Bookmark]:
    """All bookmarks of an identity: pinned ones first, then by name."""
    rows = connection.execute(
        select(*_COLUMNS)
        .where(_bookmark.owner_id == owner_id)
        .order_by(_bookmark.pinned.desc(), func.lower(_bookmark.name), _bookmark.id)
    )
    return [Bookmark(*row) for row in rows]


def find(connection: Connection, owner_id: str, bookmark_id: str) -> Bookmark:
    """One bookmark. Raises `ApiError` 404 BookmarkNotFound, also for those of others."""
    row = connection.execute(
        select(*_COLUMNS).where(_bookmark.owner_id == owner_id, _bookmark.id == bookmark_id.lower())
    ).one_or_none()
    if row is None:
        raise ApiError(404, "BookmarkNotFound", f"No such bookmark '{bookmark_id[:64]}'.")
    return Bookmark(*row)


def create(connection: Connection, owner_id: str, document: object, now: float) -> Bookmark:
    """A new bookmark. Raises `ApiError` 400, 404 for an endpoint the caller may not see, 409 for a name in use."""
    fields = Fields(document, "the bookmark")
    fields.data_type("bookmark")
    name = fields.required_name("name", longest=MAX_NAME)
    endpoint_id = fields.identifier("endpoint_id")
    path = fields.required_text("path", longest=MAX_PATH)
    place(path, "path", ())
    if not path.endswith("/"):
        raise bad_request("path must be a directory and end with '/'.")
    collections.require(connection, endpoint_id, owner_id, Ability.SEE, now=now)
    _check_free(connection, owner_id, name, None)
    _check_room(connection, owner_id, path)
    bookmark = Bookmark(str(uuid.uuid4()), name, endpoint_id, path, fields.boolean("pinned", False))
    connection.execute(insert(tables.bookmarks).values(**vars(bookmark), owner_id=owner_id, created=now))
    return bookmark


def change(connection: Connection, owner_id: str, bookmark_id: str, document: object) -> Bookmark:
    """Rename or pin. Raises `ApiError` 400, 404, 409."""
    bookmark = find(connection, owner_id, bookmark_id)
    fields = Fields(document, "the bookmark")
    name = fields.required_name("name", longest=MAX_NAME) if fields.raw("name") is not None else bookmark.name
    _check_free(connection, owner_id, name, bookmark.id)
    pinned = fields.boolean("pinned", bookmark.pinned)
    connection.execute(update(tables.bookmarks).where(_bookmark.id == bookmark.id).values(name=name, pinned=pinned))
    return Bookmark(bookmark.id, name, bookmark.endpoint_id, bookmark.path, pinned)


def remove(connection: Connection, owner_id: str, bookmark_id: str) -> None:
    """Delete a bookmark. Raises `ApiError` 404."""
    bookmark = find(connection, owner_id, bookmark_id)
    connection.execute(delete(tables.bookmarks).where(_bookmark.id == bookmark.id))


def _check_room(connection: Connection, owner_id: str, path: str) -> None:
    mine = select(func.count(), func.coalesce(func.sum(func.length(_bookmark.path)), 0)).where(
        _bookmark.owner_id == owner_id
    )
    count, characters = connection.execute(mine).one()
    if count >= MAX_BOOKMARKS:
        raise ApiError(409, "Conflict", f"You have {MAX_BOOKMARKS} bookmarks, the most allowed.")
    if characters + len(path) > MAX_PATHS:
        sentence = f"The paths of your bookmarks would have more than {MAX_PATHS} characters together; delete some."
        raise ApiError(409, "Conflict", sentence)


def _check_free(connection: Connection, owner_id: str, name: str, own_id: str | None) -> None:
    taken = connection.execute(
        select(_bookmark.id).where(_bookmark.owner_id == owner_id, _bookmark.name == name)
    ).scalar_one_or_none()
    if taken is not None and taken != own_id:
        raise ApiError(409, "Exists", f"You already have a bookmark named '{name}'.")
