"""What is said inside QUIC, without sockets: frames, credit, introductions, and datagrams put together to runs."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.connect.quic.credit import (
    CONTENT,
    CREDIT,
    END_FRAME,
    HEADER,
    MAX_CONTENT,
    WINDOW,
    Receiver,
    Sender,
    content_header,
)
from agent.connect.quic.datagrams import _runs
from agent.connect.quic.introduction import ClientIntroduction, ServerIntroduction
from protocol.errors import ProtocolError, TowpathError
from protocol.identity import NodeKey
from tests.agent.quic_pair import CLIENT, SERVER, SESSION


@given(st.binary(max_size=400), st.integers(1, 40))
def test_any_bytes_are_frames_or_the_protocol_error(data: bytes, step: int) -> None:
    receiver = Receiver()
    try:
        for start in range(0, len(data), step):
            for _ in receiver.feed_untrusted(data[start : start + step]):
                pass
    except ProtocolError:
        return
    assert receiver.waiting <= WINDOW


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=20), st.integers(1, 64))
def test_content_survives_any_cutting(pieces: list[bytes], step: int) -> None:
    wire = b"".join(content_header(len(piece)) + piece for piece in pieces) + END_FRAME
    receiver = Receiver()
    found = b""
    for start in range(0, len(wire), step):
        for kind, _, content in receiver.feed_untrusted(wire[start : start + step]):
            assert kind == CONTENT
            found += content
    assert found == b"".join(pieces)
    assert receiver.ended


@given(st.lists(st.integers(-5, WINDOW + 5), max_size=30))
def test_credit_never_grows_beyond_the_window(numbers: list[int]) -> None:
    sender = Sender()
    for number in numbers:
        sender.sent(min(sender.left, 100_000))
        try:
            sender.credit_untrusted(number)
        except ProtocolError:
            return
        assert 0 <= sender.left <= WINDOW


def test_credit_is_given_for_what_was_taken() -> None:
    receiver = Receiver()
    given_back = 0
    for _ in range(200):
        list(receiver.feed_untrusted(content_header(MAX_CONTENT) + bytes(MAX_CONTENT)))
        frame = receiver.taken(MAX_CONTENT)
        if frame:
            kind, number = HEADER.unpack(frame)
            assert kind == CREDIT
            given_back += number
    assert 200 * MAX_CONTENT - given_back < WINDOW


@given(st.binary(max_size=5000))
def test_introductions_of_strangers_raise_only_our_errors(data: bytes) -> None:
    for introduction in (
        ClientIntroduction(SESSION, CLIENT, SERVER.certificate_pem),
        ServerIntroduction(SESSION, SERVER, CLIENT.certificate_pem),
    ):
        with suppress(TowpathError):
            introduction.feed_untrusted(data)
        assert not introduction.done


def test_a_signature_is_good_for_one_introduction_only() -> None:
    client = ClientIntroduction(SESSION, CLIENT, SERVER.certificate_pem)
    server = ServerIntroduction(SESSION, SERVER, CLIENT.certificate_pem)
    hello = client.up_untrusted(_der(SERVER))
    proof = client.feed_untrusted(server.feed_untrusted(hello))
    client.feed_untrusted(server.feed_untrusted(proof))
    assert client.done
    assert server.done
    another = ServerIntroduction(SESSION, SERVER, CLIENT.certificate_pem)
    another.feed_untrusted(hello)
    with pytest.raises(TowpathError):
        another.feed_untrusted(proof)
    # Nor is a server's own word any use when it is sent back to it.
    mirrored = ServerIntroduction(SESSION, SERVER, CLIENT.certificate_pem)
    with pytest.raises(TowpathError):
        mirrored.feed_untrusted(mirrored.feed_untrusted(hello) * 2)


def _der(identity: NodeKey) -> bytes:
    import ssl

    return ssl.PEM_cert_to_DER_cert(identity.certificate_pem)


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=9), st.sampled_from([("a", 1), ("b", 2)])), max_size=80))
def test_runs_keep_every_datagram_in_order(datagrams: list[tuple[bytes, tuple[str, int]]]) -> None:
    runs = list(_runs(datagrams))
    assert [(data, address) for run, address in runs for data in run] == datagrams
    for run, _ in runs:
        assert len({len(data) for data in run[:-1]}) <= 1
        assert len(run[-1]) <= len(run[0])
