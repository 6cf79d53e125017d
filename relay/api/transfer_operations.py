"""Transfer API: file operations on a collection."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from sqlalchemy import Connection

from protocol.control import MAX_ENTRIES
from relay.access.decisions import Ability, Spot
from relay.api.transfer_frame import (
    PREFIX,
    CallerHere,
    ServicesHere,
    answer,
    answer_large,
    read_document,
    result,
)
from relay.refusal import ApiError, unavailable
from relay.store.database import StoreBroken, StoreBusy
from relay.transfer import collections
from relay.transfer.collections import Collection, Decision, Question, Sight
from relay.transfer.fields import Fields, bad_request, query_boolean, query_integer
from relay.transfer.filesystem import MAX_PATH, Filesystem, ListingRequest
from relay.transfer.scopes import place

router = APIRouter(prefix=f"{PREFIX}/operation/endpoint/{{endpoint_id}}", tags=["Transfer"])


async def _collection(
    services: ServicesHere, caller: CallerHere, endpoint_id: str, ability: Ability, *paths: object, above: bool = False
) -> tuple[Collection, Filesystem]:
    """The collection, if the caller may do that at all these paths of it; with ``above``, in the folders they are in.
    And its files, as far as the caller may come to them.

    Whoever may not even see the collection is told so before anything is said about their paths.
    """

    def decide(sight: Sight) -> Decision:
        collection = sight.require(Ability.SEE)
        spots = [_spot(collection, path, above=above) for path in paths]
        return sight.require(ability, spots), sight.reach(ability)

    def work(connection: Connection) -> Decision:
        return decide(collections.look(connection, endpoint_id, caller.identity_id, services.clock()))

    collection, reach = await services.store.read(work)

    async def decide_again() -> None:
        """Whoever may do it no more, or comes less far by now, is refused, though it has begun."""
        try:
            answer = await services.decisions.ask(Question(endpoint_id, caller.identity_id, decide))
        except (StoreBusy, StoreBroken) as error:
            # Else it would be told as the agent's own.
            raise unavailable(error.sentence) from error
        if isinstance(answer, ApiError):
            raise answer
        if answer[1] != reach:
            raise ApiError(409, "Conflict", "What you may come to here has changed meanwhile; ask again.")

    return collection, Filesystem(
        services.registry,
        timeout=float(services.settings.limits.call_timeout),
        caller=caller.identity_id,
        reach=reach,
        decide_again=decide_again,
    )


def _spot(collection: Collection, path: object, *, above: bool) -> Spot:
    """Where a path of a client leads, or the folder that holds it. What is no path is answered later on."""
    if path is not None and not isinstance(path, str):
        raise bad_request("A path must be a string.")
    found = place(path or collection.directory, "path", collection.home_path)
    return found[:-1] if above else found


@router.get("/ls")
async def list_directory(request: Request, endpoint_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """The entries of a directory."""
    parameters = request.query_params
    collection, files = await _collection(services, caller, endpoint_id, Ability.READ, parameters.get("path"))
    _refuse_local_user(parameters.get("local_user"))
    listing = ListingRequest(
        path=parameters.get("path") or None,
        show_hidden=query_boolean(parameters.get("show_hidden"), "show_hidden") is not False,
        order=parameters.get("orderby") or None,
        filters=[text for text in parameters.getlist("filter") if text],
        limit=query_integer(parameters.get("limit"), "limit", default=MAX_ENTRIES, lowest=1, highest=MAX_ENTRIES),
        offset=query_integer(parameters.get("offset"), "offset", default=0, lowest=0, highest=10**9),
    )
    return await answer_large(await files.list(collection, listing))


@router.get("/stat")
async def stat(request: Request, endpoint_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """One entry."""
    collection, files = await _collection(services, caller, endpoint_id, Ability.READ, request.query_params.get("path"))
    _refuse_local_user(request.query_params.get("local_user"))
    return answer(await files.stat(collection, request.query_params.get("path") or None))


@router.post("/mkdir")
async def mkdir(request: Request, endpoint_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """Make a directory."""
    fields = Fields(await read_document(request), "the mkdir document")
    collection, files = await _collection(services, caller, endpoint_id, Ability.WRITE, fields.raw("path"))
    fields.data_type("mkdir")
    _refuse_local_user(fields.text("local_user", longest=256))
    await files.mkdir(collection, fields.raw("path"))
    message = "The directory was created successfully"
    return result(request, "DirectoryCreated", message, data_type="mkdir_result", status=202)


@router.post("/rename")
async def rename(request: Request, endpoint_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """Rename or move a file or directory. Both folders, the old and the new one, change."""
    fields = Fields(await read_document(request), "the rename document")
    paths = fields.raw("old_path"), fields.raw("new_path")
    collection, files = await _collection(services, caller, endpoint_id, Ability.WRITE, *paths, above=True)
    fields.data_type("rename")
    _refuse_local_user(fields.text("local_user", longest=256))
    await files.rename(collection, fields.raw("old_path"), fields.raw("new_path"))
    return result(request, "FileRenamed", "File or directory renamed successfully")


@router.post("/symlink")
async def symlink(request: Request, endpoint_id: str, caller: CallerHere, services: ServicesHere) -> Response:
    """Make a symbolic link. It may lead anywhere in the collection, so it needs permission to write everywhere."""
    collection, files = await _collection(services, caller, endpoint_id, Ability.WRITE)
    fields = Fields(await read_document(request), "the symlink document")
    fields.data_type("symlink")
    _refuse_local_user(fields.text("local_user", longest=256))
    target = fields.raw("symlink_target")
    if not isinstance(target, str) or not 0 < len(target) <= MAX_PATH or "\0" in target:
        raise bad_request("symlink_target must be a string that is not empty.")
    await files.symlink(collection, fields.raw("path"), target)
    return result(request, "SymlinkCreated", "The symlink was created successfully")


def _refuse_local_user(value: str | None) -> None:
    if value:
        raise bad_request("local_user cannot be chosen: each agent works in its owner's account.")
