"""``POST /towpath/v1/enrol``: an agent redeems a setup key. The key itself is the authorisation; there is no token."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from protocol.control import EnrolAnswer, EnrolRequest, decode_untrusted, encode
from protocol.errors import ProtocolError
from relay.api.bodies import body_untrusted
from relay.audit.notes import note
from relay.refusal import ApiError
from relay.services import services_of
from relay.transfer.enrolment import RelayName, redeem
from relay.transfer.fields import BAD_REQUEST

router = APIRouter(tags=["Towpath"])

MAX_BODY = 64 * 1024


@router.post("/towpath/v1/enrol", status_code=201)
async def enrol(request: Request) -> Response:
    """Turn a setup key into a node; see docs/protocol.md."""
    services = services_of(request)
    body = await body_untrusted(request, MAX_BODY)
    if body is None:
        raise ApiError(413, "RequestTooLarge", f"An enrolment request has at most {MAX_BODY} bytes.")
    try:
        document = decode_untrusted(body, EnrolRequest)
    except ProtocolError as error:
        raise ApiError(400, BAD_REQUEST, error.sentence) from error
    name = RelayName(services.keys.relay_id, services.keys.root_public_pem)

    def told(made: EnrolAnswer) -> None:
        note(request, node_id=made.node_id, collection_id=made.collection_id, owner_id=made.owner_id)

    answer = await redeem(services.store, name, document, services.clock(), told)
    return Response(encode(answer), 201, media_type="application/json")
