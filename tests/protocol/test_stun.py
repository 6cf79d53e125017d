"""STUN messages: the RFC's own samples, round trips, and everything a hostile network can make of them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import stun
from protocol.errors import ProtocolError

# RFC 5769, sections 2.2 and 2.3 (its message integrity is an attribute of no interest here).
RESPONSE_V4 = bytes.fromhex(
    "0101003c2112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000080001a147e112a643"
    "000800142b91f599fd9e90c38c7489f92af9ba53f06be7d780280004c07d4c96"
)
RESPONSE_V6 = bytes.fromhex(
    "010100482112a442b7e7a701bc34d686fa87dfae8022000b7465737420766563746f7220002000140002a1470113a9faa5d3f179"
    "bc25f4b5bed2b9d900080014a382954e4be67bf11784c97c8292c275bfe3ed4180280004c8fb0b4c"
)

ADDRESSES = st.tuples(st.ip_addresses().map(str), st.integers(1, 65535))


def test_the_samples_of_the_rfc_are_read() -> None:
    assert stun.parse_answer_untrusted(RESPONSE_V4).mapped == ("192.0.2.1", 32853)
    assert stun.parse_answer_untrusted(RESPONSE_V6).mapped == ("2001:db8:1234:5678:11:2233:4455:6677", 32853)


@given(ADDRESSES, st.one_of(st.none(), ADDRESSES))
def test_answers_come_back_as_they_were(mapped: stun.Endpoint, other: stun.Endpoint | None) -> None:
    transaction = stun.new_transaction()
    answer = stun.parse_answer_untrusted(stun.encode_answer(transaction, mapped, other))
    plain = [None if row is None else (row[0].removeprefix("::ffff:"), row[1]) for row in (mapped, other)]
    if ":" not in (plain[0] or ("", 0))[0].replace("::ffff:", ""):
        assert answer.mapped == plain[0]
    assert answer.transaction == transaction
    assert (answer.other is None) == (other is None)


@pytest.mark.parametrize("change_port", [False, True])
def test_requests_come_back_as_they_were(change_port: bool) -> None:
    transaction = stun.new_transaction()
    data = stun.encode_request(transaction, change_port=change_port)
    assert stun.parse_request_untrusted(data) == stun.BindingRequest(transaction, change_port)
    assert stun.stream_length_untrusted(data) == len(data)
    assert stun.looks_like_stun(data[:8]) is True


@given(st.binary(max_size=8))
def test_tls_is_never_taken_for_stun(rest: bytes) -> None:
    assert stun.looks_like_stun(b"\x16" + rest) is False


@given(st.binary(max_size=1200))
def test_noise_raises_only_the_protocol_error(data: bytes) -> None:
    for parse in (stun.parse_request_untrusted, stun.parse_answer_untrusted, stun.stream_length_untrusted):
        try:
            parse(data)
        except ProtocolError:
            continue


FINGERPRINT, INTEGRITY = 0x8028, b"\x00\x08\x00\x14"


def attribute_types(message: bytes) -> list[int]:
    """RFC 8489, section 14."""
    found, position = [], 20
    while position < len(message):
        found.append(int.from_bytes(message[position : position + 2], "big"))
        position += 4 + (int.from_bytes(message[position + 2 : position + 4], "big") + 3) // 4 * 4
    return found


@given(st.binary(min_size=16, max_size=16), st.integers(0, 255), st.integers(0, 65535))
def test_a_request_that_says_whose_port_it_is_comes_as_it_was(token: bytes, slot: int, port: int) -> None:
    note = stun.PortNote(token, slot, port)
    data = stun.encode_request(bytes(12), note=note)
    assert stun.parse_request_untrusted(data) == stun.BindingRequest(bytes(12), note=note)
    # Nobody need understand it: it lies in the range of RFC 8489 that may be ignored.
    assert int.from_bytes(data[stun.HEADER : stun.HEADER + 2], "big") >= 0x8000


NOTED = stun.encode_request(bytes(12), note=stun.PortNote(b"n" * 16, 1, 4000))


@pytest.mark.parametrize("message", [RESPONSE_V4, RESPONSE_V6, stun.encode_request(bytes(12), change_port=True), NOTED])
def test_every_flipped_bit_is_noticed(message: bytes) -> None:
    parse = stun.parse_request_untrusted if message[0] == 0 else stun.parse_answer_untrusted
    length = message.find(INTEGRITY) + 2
    noticed = 0
    for position, bit in itertools.product(range(len(message)), range(8)):
        broken = bytearray(message)
        broken[position] ^= 1 << bit
        try:
            parse(bytes(broken))
        except ProtocolError:
            noticed += 1
            continue
        # A flip may hide the fingerprint: in its own type, or in the length of an attribute before, which swallows it.
        assert FINGERPRINT not in attribute_types(bytes(broken))
        assert position >= len(message) - 8 or position in (length, length + 1)
    print(f"bits flipped: {8 * len(message)}, noticed: {noticed}")


@given(st.data(), st.sampled_from([RESPONSE_V4, RESPONSE_V6]))
def test_every_shorter_message_is_refused(data: st.DataObject, message: bytes) -> None:
    with pytest.raises(ProtocolError):
        stun.parse_answer_untrusted(message[: data.draw(st.integers(0, len(message) - 1))])


def test_unknown_attributes_that_must_be_understood_are_told() -> None:
    plain = stun.encode_request(bytes(12))
    extended = bytearray(plain[: stun.HEADER]) + bytes.fromhex("00060004") + b"user"
    extended[2:4] = (8).to_bytes(2, "big")
    request = stun.parse_request_untrusted(bytes(extended))
    assert request.unknown == (6,)
    with pytest.raises(ProtocolError):
        stun.parse_answer_untrusted(stun.encode_unknown(request.transaction, request.unknown))
