"""Asks a UPnP router for a port over HTTP; `agent.connect.igd` has the documents."""

from __future__ import annotations

import ipaddress

import httpx

from agent.connect import igd
from agent.connect.port_control import Granted
from protocol.errors import ProtocolError

_HTTP_TIMEOUT = 4.0


async def map_port(place: str, gateway: str, own: str, port: int, life: int) -> Granted:
    """A mapping to ``own`` address for ``life`` seconds; 0 gives it back. ``place``: where the router describes itself.

    Raises OSError when the router does not answer, `ProtocolError` for what it says.
    """
    try:
        return await _map_port(place, gateway, own, port, life)
    except httpx.HTTPError as error:
        raise OSError(str(error)) from error


async def _map_port(place: str, gateway: str, own: str, port: int, life: int) -> Granted:
    async with httpx.AsyncClient(timeout=_HTTP_TIMEOUT, trust_env=False, follow_redirects=False) as client:
        _, description = await _small(client, "GET", place)
        control, service = igd.parse_description_untrusted(description, place, gateway)

        async def ask(action: str, arguments: dict[str, str]) -> dict[str, str]:
            status, answer = await _small(client, "POST", control, *igd.call(service, action, arguments))
            return igd.parse_answer_untrusted(status, answer)

        if life == 0:
            gone = {"NewRemoteHost": "", "NewExternalPort": str(port), "NewProtocol": "TCP"}
            await ask("DeletePortMapping", gone)
            return Granted("", port, 0, 0)
        try:
            await ask("AddPortMapping", igd.mapping_arguments(own, port, port, life))
        except ProtocolError:
            # Some routers know only mappings for ever (error 725); ours is given back at the end.
            await ask("AddPortMapping", igd.mapping_arguments(own, port, port, 0))
        address = (await ask("GetExternalIPAddress", {})).get("NewExternalIPAddress", "")
    try:
        return Granted(str(ipaddress.IPv4Address(address)), port, float(life), 0)
    except ValueError as error:
        raise ProtocolError("The router names no outside address.") from error


async def _small(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    headers: dict[str, str] | None = None,
    content: bytes | None = None,
) -> tuple[int, bytes]:
    """A request to the router; its answer may not be long."""
    body = bytearray()
    async with client.stream(method, url, headers=headers, content=content) as answer:
        async for chunk in answer.aiter_bytes():
            body += chunk
            if len(body) > igd.MAX_DOCUMENT:
                raise ProtocolError("The router's document is too long.")
        return answer.status_code, bytes(body)
