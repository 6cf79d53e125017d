"""UPnP Internet Gateway Device: the search, the description and the calls that make a port mapping. Sans I/O.

After UPnP Device Architecture 1.1 and WANIPConnection. Only the default gateway itself is believed, documents are
small, and XML with declarations of its own (DTD, entities) is refused.
"""

from __future__ import annotations

import re
from urllib.parse import urljoin, urlsplit
from xml.parsers import expat
from xml.sax.saxutils import escape

from protocol.errors import ProtocolError

SEARCH_PORT = 1900
MAX_DOCUMENT = 64 * 1024
_SERVICES = ("WANIPConnection:2", "WANIPConnection:1", "WANPPPConnection:1")
_LOCATION = re.compile(rb"^location:[ \t]*(http://[^\s]{1,512})\r?$", re.IGNORECASE | re.MULTILINE)
_MAX_DEPTH, _MAX_ELEMENTS = 32, 2000


def search_request() -> bytes:
    """The question whether the gateway is such a device, sent to it alone."""
    return (
        b'M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\nMAN: "ssdp:discover"\r\nMX: 1\r\n'
        b"ST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n\r\n"
    )


def parse_search_untrusted(data: bytes, gateway: str) -> str:
    """Where the device's description is. Raises only `ProtocolError`, also for a place that is not on the gateway."""
    found = _LOCATION.search(data[:4096])
    if not data.startswith(b"HTTP/1.1 200") or found is None:
        raise ProtocolError("The router's answer is malformed.")
    return _on_gateway(found[1].decode("ascii", "replace"), gateway)


def _on_gateway(url: str, gateway: str) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port or 80
    except ValueError as error:
        raise ProtocolError("The router names a place that is none.") from error
    if parts.scheme != "http" or parts.hostname != gateway or parts.username is not None or not 0 < port < 65536:
        raise ProtocolError("The router names a place that is not on the router itself.")
    return url


def parse_description_untrusted(document: bytes, url: str, gateway: str) -> tuple[str, str]:
    """Control URL and type of the service that maps ports. Raises only `ProtocolError`."""
    services: list[dict[str, str]] = []
    for path, text in _elements_untrusted(document):
        if path[-1] == "service" and not text:
            services.append({})
        elif text and len(path) > 1 and path[-2] == "service" and services:
            services[-1].setdefault(path[-1], text)
    for wanted in _SERVICES:
        for service in services:
            if service.get("serviceType") == f"urn:schemas-upnp-org:service:{wanted}" and service.get("controlURL"):
                return _on_gateway(urljoin(url, service["controlURL"]), gateway), service["serviceType"]
    raise ProtocolError("The router offers no port mapping by UPnP.")


def _elements_untrusted(document: bytes) -> list[tuple[tuple[str, ...], str]]:
    """Elements in order: an empty text where one begins, its text where it ends."""
    if len(document) > MAX_DOCUMENT:
        raise ProtocolError("The router's document is too long.")
    found: list[tuple[tuple[str, ...], str]] = []
    path: list[str] = []
    texts: list[list[str]] = []

    def start(name: str, _attributes: object) -> None:
        path.append(name.rpartition(":")[2])
        texts.append([])
        found.append((tuple(path), ""))
        if len(path) > _MAX_DEPTH or len(found) > _MAX_ELEMENTS:
            raise ProtocolError("The router's document is too deep.")

    def end(_name: str) -> None:
        text = "".join(texts.pop()).strip()
        if text:
            found.append((tuple(path), text))
        path.pop()

    def refuse(*_arguments: object) -> None:
        raise ProtocolError("The router's document declares things of its own.")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = lambda text: texts[-1].append(text) if texts else None
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(document, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise ProtocolError("The router's document is not XML.") from error
    return found


def call(service: str, action: str, arguments: dict[str, str]) -> tuple[dict[str, str], bytes]:
    """Headers and body of a SOAP call."""
    fields = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in arguments.items())
    body = (
        '<?xml version="1.0"?><s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
        's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>'
        f'<u:{action} xmlns:u="{service}">{fields}</u:{action}></s:Body></s:Envelope>'
    )
    return {"SOAPAction": f'"{service}#{action}"', "Content-Type": 'text/xml; charset="utf-8"'}, body.encode()


def mapping_arguments(inside_address: str, inside: int, outside: int, life: int) -> dict[str, str]:
    """Arguments of AddPortMapping for TCP."""
    return {
        "NewRemoteHost": "",
        "NewExternalPort": str(outside),
        "NewProtocol": "TCP",
        "NewInternalPort": str(inside),
        "NewInternalClient": inside_address,
        "NewEnabled": "1",
        "NewPortMappingDescription": "Towpath",
        "NewLeaseDuration": str(life),
    }


def parse_answer_untrusted(status: int, document: bytes) -> dict[str, str]:
    """The answer's values by name. Raises only `ProtocolError`, with the router's reason where it gives one."""
    values = {path[-1]: text for path, text in _elements_untrusted(document) if text}
    if status != 200:
        reason = values.get("errorDescription") or values.get("errorCode") or f"status {status}"
        raise ProtocolError(f"The router refuses a port mapping by UPnP: {reason[:100]!r}.")
    return values
