"""`GET /towpath/v1/token`: what a token of the Transfer service is and when it ends, told to whoever holds it."""

from __future__ import annotations

import datetime

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel
from sqlalchemy import Connection

from relay.api.bearer import Caller, transfer_caller
from relay.auth.service_tokens import ServiceToken, tokens_of
from relay.services import services_of

router = APIRouter(tags=["Towpath"])


class TokenDescription(BaseModel):
    """Whose token it is. The last three are null unless it is one of long life that its owner has named."""

    sub: str
    preferred_username: str
    name: str | None
    email: str | None
    token_name: str | None
    token_expires: str | None
    token_is_ending: bool | None


@router.get("/towpath/v1/token")
async def describe_token(request: Request, caller: Caller = Depends(transfer_caller)) -> TokenDescription:
    """The caller, and the name and the end of the token it shows."""
    services = services_of(request)
    now = services.clock()

    def look(connection: Connection) -> ServiceToken | None:
        mine = tokens_of(connection, caller.identity_id, now)
        return next((token for token in mine if token.id == caller.session_id), None)

    found = await services.store.read(look)
    ends = None if found is None else datetime.datetime.fromtimestamp(found.expires, datetime.UTC)
    return TokenDescription(
        sub=caller.identity_id,
        preferred_username=caller.username,
        name=caller.name,
        email=caller.email,
        token_name=None if found is None else found.name,
        token_expires=None if ends is None else ends.strftime("%Y-%m-%d %H:%M UTC"),
        token_is_ending=None if found is None else found.is_ending(now),
    )
