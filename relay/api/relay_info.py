"""`GET /towpath/v1/relay`: who this relay is, for agents that are being set up and for anybody who asks."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import BaseModel

from relay.services import services_of
from relay.tls import ca_certificate_pem

router = APIRouter(tags=["Towpath"])


class RelayDescription(BaseModel):
    """``ca_certificate`` is null when the relay's certificate is not of its own making."""

    relay_id: str
    name: str
    version: str
    ca_certificate: str | None
    relay_root: str


@router.get("/towpath/v1/relay")
async def describe_relay(request: Request) -> RelayDescription:
    """The relay's id, version, CA certificate and root key. Needs no token: all of it is public."""
    services = services_of(request)
    return RelayDescription(
        relay_id=services.keys.relay_id,
        name=services.settings.name,
        version=request.app.version,
        ca_certificate=ca_certificate_pem(services.settings),
        relay_root=services.keys.root_public_pem,
    )
