"""Checks of what a relay orders, before anything is done: the ticket must cover it and the owner must allow it.
Pure."""

from __future__ import annotations

from agent.policy import Policy
from protocol.control import MAX_ITEMS, SessionOrder, TaskOrder
from protocol.errors import AccessDenied, ProtocolError, TaskFailed
from protocol.identity import fingerprint_of_certificate_untrusted
from protocol.names import CollectionPath, is_within, parse_path_untrusted
from protocol.ticket import Grant, Ticket, TicketVerifier


def check_order(
    order: TaskOrder, verifier: TicketVerifier, policy: Policy, node_id: str, fingerprint: str, now: float
) -> Ticket:
    """Whether this node may run a task as its destination. Raises `TowpathError`."""
    if not order.items or len(order.items) > MAX_ITEMS:
        raise TaskFailed("The order of the task holds no items, or too many.", code="BAD_ORDER")
    ticket = verifier.verify_untrusted(order.ticket, now)
    if ticket.task_id != order.task_id or ticket.session_id != order.session_id:
        raise AccessDenied("The ticket is for another task.", code="TICKET_REFUSED")
    _check_side(ticket.destination, order.destination.collection_id, node_id, fingerprint, "rw")
    if order.type == "TRANSFER":
        source = order.source
        if source is None or ticket.source is None or ticket.source.collection_id != source.collection_id:
            raise AccessDenied("The ticket names another source.", code="TICKET_REFUSED")
        if fingerprint_of_certificate_untrusted(source.certificate) != ticket.source.fingerprint:
            raise AccessDenied("The source's certificate is not the one the ticket names.", code="TICKET_REFUSED")
    policy.check(order.destination.collection_id, (), "rw")
    prefixes = [parse_path_untrusted(path) for path in ticket.destination.paths]
    for item in order.items:
        _check_path(item.source_path if order.type == "DELETE" else item.destination_path, prefixes)
    return ticket


def _check_path(text: str, prefixes: list[CollectionPath]) -> None:
    try:
        path = parse_path_untrusted(text)
    except ProtocolError:
        # The item fails by itself, with a sentence about its name.
        return
    if not any(is_within(path, prefix) for prefix in prefixes):
        raise AccessDenied("The ticket does not cover a path of the task.", code="TICKET_REFUSED")


def _check_side(grant: Grant, collection_id: str, node_id: str, fingerprint: str, access: str) -> None:
    if grant.node_id != node_id or grant.fingerprint != fingerprint:
        raise AccessDenied("The ticket was given to another node.", code="TICKET_REFUSED")
    if grant.collection_id != collection_id or (access == "rw" and grant.access != "rw"):
        raise AccessDenied("The ticket does not cover this collection.", code="TICKET_REFUSED")


def check_session_order(
    order: SessionOrder, verifier: TicketVerifier, policy: Policy, node_id: str, fingerprint: str, now: float
) -> Ticket:
    """Whether this node may serve a session as its source. Raises `TowpathError`."""
    ticket = verifier.verify_untrusted(order.ticket, now)
    if ticket.task_id != order.task_id or ticket.session_id != order.session_id or ticket.source is None:
        raise AccessDenied("The ticket is for another session.", code="TICKET_REFUSED")
    _check_side(ticket.source, ticket.source.collection_id, node_id, fingerprint, "r")
    if fingerprint_of_certificate_untrusted(order.peer.certificate) != ticket.destination.fingerprint:
        raise AccessDenied("The destination's certificate is not the one the ticket names.", code="TICKET_REFUSED")
    policy.check(ticket.source.collection_id, (), "r")
    return ticket
