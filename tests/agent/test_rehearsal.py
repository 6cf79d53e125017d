"""What a waiting worker does once is what its work will do: a handshake that ends well, and a ticket that holds."""

from __future__ import annotations

from typing import Any

import pytest

from agent.connect.lane_tls import SecuredLane, secure_lane
from agent.connect.tls import check_peer
from agent.transfer import rehearsal
from protocol.ticket import Ticket, TicketVerifier


def test_a_rehearsal_shakes_hands_and_verifies_a_ticket(monkeypatch: pytest.MonkeyPatch) -> None:
    presented: list[bytes | None] = []
    verified: list[str] = []
    check, verify = check_peer, TicketVerifier.at_any_time_untrusted

    def noting_check(certificate: bytes | None, fingerprint: str) -> None:
        check(certificate, fingerprint)
        presented.append(certificate)

    def noting_verify(self: TicketVerifier, token: str) -> Ticket:
        ticket = verify(self, token)
        verified.append(ticket.relay_id)
        return ticket

    lanes: list[str | None] = []

    def noting_secure(*arguments: Any, server_name: str | None, alpn: str) -> SecuredLane:
        secured = secure_lane(*arguments, server_name=server_name, alpn=alpn)
        lanes.append(server_name)
        return secured

    monkeypatch.setattr(rehearsal, "check_peer", noting_check)
    monkeypatch.setattr(rehearsal, "secure_lane", noting_secure)
    monkeypatch.setattr(TicketVerifier, "at_any_time_untrusted", noting_verify)
    rehearsal.rehearse()
    assert len(presented) == 1
    assert {name is None for name in lanes} == {False, True}
    assert verified == ["rehearsal"]
