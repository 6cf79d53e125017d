"""A lane's records through memory: many for one call, what is good before what is broken, and TLS's own messages."""

from __future__ import annotations

import contextlib
import select
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.connect import lane_records, lane_tls
from agent.connect.lane_records import AT_ONCE, RECORD, RecordsInMemory, RecordsOnSocket
from agent.connect.lane_tls import SecuredLane, SecuringLane, begin_lane
from tests.agent.test_lane_tls import ALPN, CONTENT, MINE, NAME, THEIRS, both, new, read

# What a record has beside its content: a header, a type and a tag (RFC 8446 section 5.2).
AROUND = 22


class Counting(socket.socket):
    """Remembers how much each call read and was given to send."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(fileno=sock.detach())
        self.received: list[int] = []
        self.given: list[int] = []

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        self.received.append(super().recv_into(buffer, nbytes, flags))
        return self.received[-1]

    def send(self, data: Any, flags: int = 0) -> int:
        self.given.append(len(data))
        return super().send(data, flags)


@contextlib.contextmanager
def lanes(near: type = Counting) -> Iterator[tuple[SecuredLane, SecuredLane, Any, socket.socket]]:
    """Two ends of a lane and their sockets."""
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        # As much as is sent here at once, so that no thread is needed.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * AT_ONCE)
    ours = near(ours)
    with ours, theirs:
        one, two = both((ours, theirs), new(MINE, THEIRS, server=False), new(THEIRS, MINE, server=True))
        yield one, two, ours, theirs


def test_one_call_brings_many_records_and_sends_many() -> None:
    with lanes() as (one, two, sock, _):
        content = CONTENT[: AT_ONCE // 2]
        records = len(content) // RECORD
        one.sendall(content)
        assert sock.given == [len(content) + records * AROUND]
        assert read(two, len(content)) == content
        assert two.records == records
        two.sendall(content)
        data = bytearray(len(content))
        assert one.recv_into(memoryview(data)) == len(content)
        assert data == content
        # With what the peer says behind its handshake.
        assert len(sock.received) == 1


def test_the_callers_memory_is_let_go_of_when_a_call_fails() -> None:
    """cffi's pointer into a view that the collector clears first crashes the interpreter (CPython 3.11)."""
    with lanes() as (one, _, sock, _peer):
        sock.setblocking(False)
        for call in (one.recv_into, one.sendall):
            view = memoryview(bytearray(CONTENT))
            with pytest.raises(OSError) as kept:
                while True:
                    call(view)
            # Fails as long as anything points into it, as a frame of the error would.
            view.release()
            assert kept.value.__traceback__ is not None


def test_more_than_memory_holds_goes_piece_by_piece() -> None:
    with lanes() as (one, two, sock, _), ThreadPoolExecutor(1) as other:
        sent = other.submit(one.sendall, CONTENT)
        assert read(two, len(CONTENT)) == CONTENT
        sent.result()
        assert len(CONTENT) > 10 * AT_ONCE
        assert max(sock.given) == AT_ONCE + AT_ONCE // RECORD * AROUND


def test_records_are_read_straight_into_the_view_and_not_beyond() -> None:
    with lanes() as (one, two, _, _):
        # Else this pyOpenSSL or its OpenSSL has other names for what is below it, and a lane costs more at both ends.
        assert isinstance(one._records, RecordsInMemory)
        two.sendall(CONTENT[:1000])
        data = bytearray(b"." * 300)
        assert one.recv_into(memoryview(data)[100:200], 500) == 100
        assert data == b"." * 100 + CONTENT[:100] + b"." * 100
        with pytest.raises((TypeError, BufferError, ValueError)):
            one.recv_into(memoryview(bytes(100)))
        assert read(one, 900) == CONTENT[100:1000]


def test_an_openssl_with_other_names_does_it_on_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_records, "_NEEDED", ["SSL_read", "BIO_of_another_name"])
    with lanes() as (one, two, _, _):
        assert isinstance(one._records, RecordsOnSocket)
        one.sendall(CONTENT[: 3 * RECORD])
        data = bytearray(4 * RECORD)
        assert two.recv_into(memoryview(data)) == RECORD
        assert read(two, 2 * RECORD) == CONTENT[RECORD : 3 * RECORD]
        assert two.records == 3
        two.settimeout(0.01)
        with pytest.raises(TimeoutError, match="did not answer"):
            two.recv(1)
        two.settimeout(0)
        with pytest.raises(BlockingIOError):
            two.recv(1)
        two.settimeout(None)
        two.sendall(b"read")
        assert one.recv(100) == b"read"
        one.close()
        assert two.recv(1) == b""


# Each example does a handshake.
@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 3 * RECORD), min_size=1, max_size=12),
    st.lists(st.integers(1, 3 * RECORD), min_size=1, max_size=5),
    st.lists(st.integers(1, 2 * RECORD), min_size=1, max_size=5),
)
def test_however_it_comes_and_is_asked_for_it_is_the_same(sent: list[int], passed: list[int], asked: list[int]) -> None:
    """Records are cut anywhere on their way, and read in any pieces."""
    with _on_its_way(sent) as (two, raw, onwards):
        got, at, rounds = bytearray(), 0, 0
        while at < len(raw):
            piece = raw[at : at + passed[rounds % len(passed)]]
            onwards.sendall(piece)
            at += len(piece)
            rounds += 1
            with contextlib.suppress(BlockingIOError):
                while True:
                    data = bytearray(asked[len(got) % len(asked)])
                    count = two.recv_into(memoryview(data))
                    assert count
                    got += data[:count]
        assert got == b"".join(CONTENT[:size] for size in sent)
        assert two.records >= sum(-(-size // RECORD) for size in sent)


def test_what_is_good_comes_before_what_is_not_and_the_peer_hears_of_it() -> None:
    with _on_its_way([1000, 2000, 3000]) as (two, raw, onwards):
        # Somebody on the way changes the third.
        onwards.sendall(raw[:-1] + bytes([raw[-1] ^ 1]))
        data = bytearray(6000)
        assert two.recv_into(memoryview(data)) == 3000
        assert data[:3000] == CONTENT[:1000] + CONTENT[:2000]
        for _ in range(2):
            with pytest.raises(ConnectionError, match="TLS of a lane failed"):
                two.recv_into(memoryview(data))
        # The last that was said is an encrypted alert of two bytes.
        assert onwards.recv(1000)[-2 - AROUND :][:5] == bytes([23, 3, 3, 0, 2 + AROUND - 5])


@pytest.mark.parametrize("left", [1, 20, 2000])
def test_a_lane_cut_within_a_record_ends_and_gives_nothing_of_it(left: int) -> None:
    with _on_its_way([1000, 2000]) as (two, raw, onwards):
        onwards.sendall(raw[:-left])
        onwards.shutdown(socket.SHUT_WR)
        data = bytearray(6000)
        assert two.recv_into(memoryview(data)) == 1000
        assert two.recv_into(memoryview(data)) == 0
        assert two.recv_into(memoryview(data)) == 0


@contextlib.contextmanager
def _on_its_way(sizes: list[int]) -> Iterator[tuple[SecuredLane, bytes, socket.socket]]:
    """A lane that does not block, what its peer sent it, so many bytes at a time, and the socket to pass that on by."""
    with lanes() as (one, two, sock, theirs):
        raw = b""
        for size in sizes:
            one.sendall(CONTENT[:size])
            raw += theirs.recv(10 * RECORD)
        two.settimeout(0)
        yield two, raw, sock


def test_a_lane_that_never_blocks_reads_what_is_here() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as other:
        served = other.submit(new(THEIRS, MINE, server=True), theirs)
        ours.setblocking(False)
        lane = begin_lane(ours, MINE, THEIRS.certificate_pem, server_name=NAME, alpn=ALPN)
        with pytest.raises(OSError, match="before it was secured"):
            lane.sendall(b"early")
        _shake_hands(lane)
        far: SecuredLane = served.result()
        view = memoryview(bytearray(RECORD))
        with pytest.raises(BlockingIOError):
            lane.recv_now(view, RECORD)
        far.sendall(b"here")
        assert lane.recv_now(view, RECORD) == 4
        lane.sendall(b"there")
        assert far.recv(100) == b"there"
        # What the system does not take now is an error, as nothing waits for it.
        with pytest.raises(OSError, match=r"."):
            for _ in range(100):
                lane.sendall(CONTENT)
        far.close()
        with pytest.raises((BlockingIOError, ConnectionError)):
            while lane.recv_now(view, RECORD):
                pass
            raise ConnectionError


def _shake_hands(lane: SecuringLane) -> None:
    while (wants := lane.shake_hands()) is not None:
        select.select([lane] if wants == "read" else [], [lane] if wants == "write" else [], [], 5)


@pytest.mark.skipif(
    shutil.which("openssl") is None, reason="the openssl program speaks to us as no library of ours can"
)
def test_a_peer_that_changes_its_keys_and_wants_ours_changed_is_understood(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    key.touch(mode=0o600)
    key.write_bytes(MINE.private_key_pem)
    certificate.write_text(MINE.certificate_pem)
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{server.getsockname()[1]}", "-tls1_3", "-alpn", ALPN]
        command += ["-key", str(key), "-cert", str(certificate), "-servername", NAME]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, bufsize=0) as peer:
            assert peer.stdin is not None
            assert peer.stdout is not None
            accepted, _ = server.accept()
            accepted.settimeout(10)
            lane = lane_tls.secure_lane(accepted, THEIRS, MINE.certificate_pem, server_name=None, alpn=ALPN)
            peer.stdin.write(b"before\n")
            assert lane.recv(100) == b"before\n"
            for _ in range(3):
                peer.stdin.write(b"K\n")
                while b"KEYUPDATE" not in peer.stdout.readline():
                    pass
                peer.stdin.write(b"after\n")
                assert lane.recv(100) == b"after\n"
                # Our keys were changed too, as it asked, or it would not understand this.
                lane.sendall(b"answer\n")
                while b"answer" not in peer.stdout.readline():
                    pass
            peer.stdin.close()
            # It says that it goes.
            assert lane.recv(100) == b""
            lane.close()
            peer.wait(10)
