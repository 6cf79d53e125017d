"""One UDP socket for both families: how it sends, what it says of itself, how it is punched from, and QUIC over it."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, closing

import pytest
import trio

from agent.connect.network import Network
from agent.connect.quic.datagrams import Datagrams
from agent.connect.quic.observe import udp_candidates
from agent.connect.quic.punch_udp import punch
from agent.connect.udp import get_hops, has_ipv6, incoming, open_udp, outgoing
from protocol.candidates import Candidate
from relay.rendezvous.observe import Observer
from tests.agent.quic_pair import quic_pair


def works() -> bool:
    with open_udp() as sock:
        if not has_ipv6(sock.family):
            return False
        try:
            sock.sendto(b"", ("::1", 9))
        except OSError:
            return False
    return True


needs_ipv6 = pytest.mark.skipif(not works(), reason="this machine has no IPv6 on loopback")
LOOPBACKS = ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)]


def both() -> trio.socket.SocketType:
    sock = open_udp()
    sock.setblocking(False)
    return trio.socket.from_stdlib_socket(sock)


@pytest.mark.parametrize("host", LOOPBACKS)
def test_runs_of_datagrams_go_out_and_come_in_under_plain_addresses(host: str) -> None:
    with open_udp() as one, open_udp() as other:
        there, here = (host, other.getsockname()[1]), (host, one.getsockname()[1])
        sender, receiver = Datagrams(one), Datagrams(other)
        sent = [bytes([number]) * 900 for number in range(5)]
        assert sender.send((data, there) for data in sent) is None
        got = list(receiver.receive())
        assert b"".join(data for data, _, _ in got) == b"".join(sent)
        assert {source for _, _, source in got} == {here}


def test_addresses_are_translated_both_ways() -> None:
    assert outgoing(socket.AF_INET6, ("192.0.2.1", 5)) == ("::ffff:192.0.2.1", 5)
    assert outgoing(socket.AF_INET, ("192.0.2.1", 5)) == ("192.0.2.1", 5)
    assert outgoing(socket.AF_INET6, ("2001:db8::1", 5)) == ("2001:db8::1", 5)
    assert incoming(("::ffff:192.0.2.1", 5, 0, 0)) == ("192.0.2.1", 5)
    assert incoming(("fe80::1%eth0", 5, 0, 2)) == ("fe80::1", 5)


@pytest.mark.parametrize("host", LOOPBACKS)
async def test_both_sides_punch_and_keep_the_usual_number_of_hops(host: str) -> None:
    with both() as one, both() as other:
        usual = get_hops(one, host)
        places = [(host, sock.getsockname()[1]) for sock in (one, other)]
        found: dict[str, tuple[str, int]] = {}

        async def client() -> None:
            # An address that nobody has beside the right one.
            found["client"] = await punch(one, client=True, secret="s", targets=[("192.0.2.9", 9), places[1]])
            # The server goes on until it hears QUIC.
            await one.sendto(b"\xc0" + bytes(20), outgoing(one.family, found["client"]))

        async def server() -> None:
            found["server"] = await punch(other, client=False, secret="s", targets=[places[0]])

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client)
                nursery.start_soon(server)
        assert found == {"client": places[1], "server": places[0]}
        assert get_hops(one, host) == usual


@needs_ipv6
async def test_the_relay_says_how_both_families_are_seen_at_once() -> None:
    observer = Observer()
    observer.open("::", (0,))
    network = Network(relay=("localhost", 443), stun_ports=list(observer.ports))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(observer.run)
        with both() as sock:
            port = sock.getsockname()[1]
            found = await udp_candidates(network, sock)
        nursery.cancel_scope.cancel()
    seen = {row.host for row in found if row.port == port}
    assert "127.0.0.1" in seen
    # A name for both families is needed for the other half; where localhost has one, it must be there.
    rows = socket.getaddrinfo("localhost", None, type=socket.SOCK_DGRAM)
    assert ("::1" in seen) == any(row[0] == socket.AF_INET6 for row in rows)


async def test_without_the_relays_stun_own_addresses_are_all_there_is() -> None:
    network = Network(relay=None)
    with both() as sock:
        port = sock.getsockname()[1]
        found = await udp_candidates(network, sock)
    hosts = network.interfaces.addresses[:8]
    assert found == [Candidate(kind="mapped-udp", host=host, port=port) for host in hosts]


@needs_ipv6
def test_content_goes_over_quic_between_ipv6_addresses() -> None:
    content = random.Random(6).randbytes(200_000)
    with ExitStack() as stack:
        pair = stack.enter_context(closing(quic_pair("qh3", make=open_udp, host="::1")))
        pair.up()
        near, far = (stack.enter_context(end) for end in pair.open())
        sent = 0
        got = bytearray()

        def moved() -> bool:
            nonlocal sent
            try:
                sent += near.send(content[sent : sent + 65536])
                got.extend(far.recv(65536))
            except BlockingIOError:
                pass
            return len(got) == len(content)

        pair.run(moved)
    assert bytes(got) == content
