"""Asking routers for port mappings: what they answer is read as hostile input."""

from __future__ import annotations

import ipaddress
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.connect import igd, port_control
from agent.connect.portmap import default_gateway
from protocol.errors import ProtocolError

NONCE = bytes(range(12))
GATEWAY = "192.168.1.1"
PLACE = f"http://{GATEWAY}:5000/rootDesc.xml"


def pcp_answer(**changes: int | bytes) -> bytes:
    row: dict[str, int | bytes] = {
        "version": 2,
        "code": 0x81,
        "result": 0,
        "life": 3600,
        "nonce": NONCE,
        "protocol": 6,
        "inside": 4000,
        "outside": 5000,
        "address": ipaddress.IPv6Address("::ffff:203.0.113.7").packed,
        **changes,
    }
    head = struct.pack(">BBBBII", row["version"], row["code"], 0, row["result"], row["life"], 77) + bytes(12)
    tail = struct.pack(">BBHHH", row["protocol"], 0, 0, row["inside"], row["outside"])
    nonce, address = row["nonce"], row["address"]
    assert isinstance(nonce, bytes)
    assert isinstance(address, bytes)
    return head + nonce + tail + address


def test_a_pcp_mapping_may_have_another_port_than_asked_for() -> None:
    request = port_control.pcp_request("192.168.1.10", NONCE, 4000, 4000, 3600)
    assert len(request) == 60
    granted = port_control.parse_pcp_untrusted(pcp_answer(), NONCE, 4000)
    assert granted == port_control.Granted("203.0.113.7", 5000, 3600.0, 77)


@pytest.mark.parametrize(("life", "held"), [(1, 120.0), (3600, 3600.0), (0xFFFFFFFF, 86400.0)])
def test_a_lying_lease_is_held_within_reason(life: int, held: float) -> None:
    assert port_control.parse_pcp_untrusted(pcp_answer(life=life), NONCE, 4000).life == held


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (pcp_answer(version=0), port_control.OtherVersion),
        (pcp_answer(result=1), port_control.OtherVersion),
        (pcp_answer(result=2), port_control.Refused),
        (pcp_answer(life=0), port_control.Refused),
        (pcp_answer(nonce=bytes(12)), ProtocolError),
        (pcp_answer(inside=4001), ProtocolError),
        (pcp_answer(outside=0), ProtocolError),
        (pcp_answer(protocol=17), ProtocolError),
        (pcp_answer()[:59], ProtocolError),
        (b"", ProtocolError),
    ],
)
def test_other_pcp_answers_are_refused(answer: bytes, error: type[ProtocolError]) -> None:
    with pytest.raises(error):
        port_control.parse_pcp_untrusted(answer, NONCE, 4000)


def test_nat_pmp() -> None:
    address = struct.pack(">BBHI", 0, 128, 0, 5) + bytes([203, 0, 113, 7])
    assert port_control.parse_address_untrusted(address) == "203.0.113.7"
    assert port_control.map_request(4000, 4000, 3600) == struct.pack(">BBHHHI", 0, 2, 0, 4000, 4000, 3600)
    answer = struct.pack(">BBHIHHI", 0, 130, 0, 5, 4000, 6000, 600)
    assert port_control.parse_map_untrusted(answer, 4000) == port_control.Granted("", 6000, 600.0, 5)
    with pytest.raises(port_control.Refused):
        port_control.parse_map_untrusted(struct.pack(">BBHIHHI", 0, 130, 2, 5, 4000, 6000, 600), 4000)


@pytest.mark.parametrize("address", ["10.0.0.1", "192.168.0.2", "100.64.3.4", "127.0.0.1", "0.0.0.0", "224.0.0.1"])
def test_an_outside_address_that_is_none_helps_nobody(address: str) -> None:
    assert port_control.outside_problem(address, "")


def test_another_outside_address_than_the_relay_sees_is_a_second_nat() -> None:
    assert port_control.outside_problem("203.0.113.7", "203.0.113.8")
    assert not port_control.outside_problem("203.0.113.7", "203.0.113.7")
    assert not port_control.outside_problem("203.0.113.7", "2001:db8::1")


PARSERS: list[Callable[[bytes], object]] = [
    lambda data: port_control.parse_pcp_untrusted(data, NONCE, 4000),
    port_control.parse_address_untrusted,
    lambda data: port_control.parse_map_untrusted(data, 4000),
    lambda data: igd.parse_search_untrusted(data, GATEWAY),
    lambda data: igd.parse_description_untrusted(data, PLACE, GATEWAY),
    lambda data: igd.parse_answer_untrusted(200, data),
]
DESCRIPTION = b"""<?xml version="1.0"?>
<root xmlns="urn:schemas-upnp-org:device-1-0"><device><deviceList><device><serviceList>
<service><serviceType>urn:schemas-upnp-org:service:WANCommonInterfaceConfig:1</serviceType>
<controlURL>/ctl/CmnIfCfg</controlURL></service>
<service><serviceType>urn:schemas-upnp-org:service:WANIPConnection:1</serviceType>
<controlURL>/ctl/IPConn</controlURL></service>
</serviceList></device></deviceList></device></root>"""
SEARCHED = f"HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\nLOCATION: {PLACE}\r\nEXT:\r\n\r\n".encode()


def test_mutated_answers_raise_only_the_protocol_error() -> None:
    outcomes: Counter[str] = Counter()

    def parse_all(answer: bytes) -> None:
        for parse in PARSERS:
            try:
                parse(answer)
            except ProtocolError:
                outcomes["refused"] += 1
            else:
                outcomes["taken"] += 1

    @given(st.sampled_from([pcp_answer(), SEARCHED, DESCRIPTION, b""]), st.data())
    def mutate(seed: bytes, data: st.DataObject) -> None:
        mutated = bytearray(seed)
        for _ in range(data.draw(st.integers(0, 6))):
            if mutated:
                mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
        parse_all(bytes(mutated + data.draw(st.binary(max_size=40))))

    mutate()
    assert outcomes["refused"]
    assert outcomes["taken"]


def test_upnp_finds_the_service_on_the_router_itself() -> None:
    assert igd.parse_search_untrusted(SEARCHED, GATEWAY) == PLACE
    control, service = igd.parse_description_untrusted(DESCRIPTION, PLACE, GATEWAY)
    assert control == f"http://{GATEWAY}:5000/ctl/IPConn"
    headers, body = igd.call(service, "AddPortMapping", igd.mapping_arguments("192.168.1.10", 4000, 4000, 3600))
    assert headers["SOAPAction"] == f'"{service}#AddPortMapping"'
    assert b"<NewInternalClient>192.168.1.10</NewInternalClient>" in body


@pytest.mark.parametrize(
    "place",
    ["http://192.168.1.2:5000/x", "https://192.168.1.1/x", "http://192.168.1.1@evil/x", "http://evil/192.168.1.1"],
)
def test_upnp_goes_nowhere_but_to_the_router(place: str) -> None:
    with pytest.raises(ProtocolError):
        igd.parse_search_untrusted(SEARCHED.replace(PLACE.encode(), place.encode()), GATEWAY)
    elsewhere = DESCRIPTION.replace(b"/ctl/IPConn", place.encode())
    with pytest.raises(ProtocolError):
        igd.parse_description_untrusted(elsewhere, PLACE, GATEWAY)


@pytest.mark.parametrize(
    "document",
    [
        b'<!DOCTYPE a [<!ENTITY x "xxxxxxxx"><!ENTITY y "&x;&x;&x;">]><a>&y;</a>',
        b'<!DOCTYPE a SYSTEM "http://elsewhere/a.dtd"><a/>',
        b"<a>" * 100,
        b"<a>" + b"<b/>" * 3000 + b"</a>",
        b"<a>" + b" " * igd.MAX_DOCUMENT + b"</a>",
        b"\xff\xfe\x00",
    ],
)
def test_hostile_documents_are_refused(document: bytes) -> None:
    with pytest.raises(ProtocolError):
        igd.parse_answer_untrusted(200, document)


def test_a_refusal_is_told() -> None:
    fault = b"<Envelope><Fault><UPnPError><errorCode>718</errorCode></UPnPError></Fault></Envelope>"
    with pytest.raises(ProtocolError, match="718"):
        igd.parse_answer_untrusted(500, fault)


def test_the_default_gateway_is_read(tmp_path: Path) -> None:
    table = tmp_path / "route"
    table.write_text(
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n"
        "eth0\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\n"
        "eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\n"
    )
    assert default_gateway(table) == GATEWAY
    assert default_gateway(tmp_path / "none") is None
