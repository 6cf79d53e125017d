"""What one session may ask of its source: the ticket's scope and the owner's policy, checked for every request."""

from __future__ import annotations

from protocol.errors import AccessDenied, ProtocolError, RetryLater
from protocol.names import CollectionPath, is_within, parse_path_untrusted
from protocol.ticket import LEEWAY, TICKET_EXPIRED, Grant, Ticket, TicketVerifier


class SourcePolicy:
    """Decides for one session. `accept` must have said yes before `check` says anything but no. ``ordered`` is the
    ticket that the relay has given to this source, if it was."""

    def __init__(
        self,
        *,
        session_id: str,
        task_id: str,
        node_id: str,
        fingerprint: str,
        collection_id: str,
        ordered: Ticket | None = None,
    ) -> None:
        self._session_id = session_id
        self._task_id = task_id
        self._node_id = node_id
        self._fingerprint = fingerprint
        self._collection_id = collection_id
        self._ordered = ordered
        self._prefixes: tuple[CollectionPath, ...] = ()
        # Where symlinks may lead; None is anywhere in the collection.
        self.reach: tuple[CollectionPath, ...] | None = ()
        self._expires = 0.0
        self._peer = ""

    def accept(self, verifier: TicketVerifier, token: str, peer_fingerprint: str, now: float) -> Ticket:
        """Check a ticket against this session, this node and the peer's certificate.

        Raises `ProtocolError` (not from this relay, expired) or `AccessDenied` (for somebody or something else).
        """
        ticket = verifier.verify_untrusted(token, now)
        source = ticket.source
        if ticket.session_id != self._session_id or ticket.task_id != self._task_id or source is None:
            raise AccessDenied("The ticket is for another session.", code="TICKET_REFUSED")
        if source.node_id != self._node_id or source.fingerprint != self._fingerprint:
            raise AccessDenied("The ticket names another source.", code="TICKET_REFUSED")
        if source.collection_id != self._collection_id:
            raise AccessDenied("The ticket names another collection.", code="TICKET_REFUSED")
        if ticket.destination.fingerprint != peer_fingerprint:
            raise AccessDenied("The ticket was given to another node.", code="TICKET_REFUSED")
        ordered = self._ordered
        if ordered is not None and ticket.issued <= ordered.issued and reads_elsewhere(source, ordered.source):
            raise RetryLater(
                "The relay has narrowed what the task may read since it gave this ticket; the newer one counts.",
                code=TICKET_EXPIRED,
            )
        self._prefixes = tuple(parse_path_untrusted(path) for path in source.paths)
        self.reach = source.folders()
        self._expires = ticket.expires
        self._peer = peer_fingerprint
        return ticket

    def renew(self, verifier: TicketVerifier, token: str, now: float) -> None:
        """Replace the ticket of a session in progress. Raises as `accept` does, and `RetryLater` when the new one
        reaches other folders: what is open already was opened for the old one, so the session begins anew."""
        if not self._peer:
            raise ProtocolError("A ticket cannot be renewed before there is one.")
        before = self.reach
        self.accept(verifier, token, self._peer, now)
        if self.reach != before:
            raise RetryLater("What the task's owner may reach has changed; the session begins anew.")

    def check(self, path: CollectionPath, now: float) -> None:
        """Whether this path may be read now. Raises `AccessDenied`, or `RetryLater` when the ticket has run out."""
        if now > self._expires + LEEWAY:
            raise RetryLater("The ticket of the session has run out; the relay renews it.", code=TICKET_EXPIRED)
        if not self.covers(path):
            raise AccessDenied("The ticket does not cover this path.", code="PERMISSION_DENIED", who="you")

    def covers(self, path: CollectionPath) -> bool:
        """Whether the ticket covers this path, and so everything below it."""
        return any(is_within(path, prefix) for prefix in self._prefixes)


def reads_elsewhere(one: Grant | None, other: Grant | None) -> bool:
    """Whether two grants for one source are for other paths, or let links lead to others, or one is missing."""
    return one is None or other is None or (one.paths, one.reach) != (other.paths, other.reach)
