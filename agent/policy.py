"""What the owner of this machine allows, decided in one place.

The same `Policy` stands before every call on the link and before every request on a lane. The relay can narrow what
is allowed here (by not asking), never widen it: nothing a relay or a peer sends changes a `Policy`, only the
owner's configuration does (`replace`). No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from agent.config.keys import CollectionConfig
from protocol.errors import AccessDenied, ItemFailed, NeedsPerson, RetryLater
from protocol.names import is_reserved

Access = Literal["r", "rw"]
# What the owner holds up on this machine: nothing; what has not begun, while the rest is finished; all transfers.
Pause = Literal["none", "new", "all"]

# What a relay may ask of the agent as such, whatever the collection. Settings, updates, support and anything
# else that only the owner may do are not here and have no route on the link.
LINK_OPERATIONS = frozenset({"events", "collections", "tasks", "sessions", "withdrawals"})


class UnknownCollection(ItemFailed):
    """The owner's configuration has no such collection (any more)."""

    default_code = "UNKNOWN_COLLECTION"


class Policy:
    """The verifier. Every method answers or raises; no answer means yes."""

    def __init__(self, collections: Iterable[CollectionConfig]) -> None:
        self._collections = {collection.id: collection for collection in collections}
        # Set by the owner alone, through the local socket.
        self.pause: Pause = "none"
        # Why this machine holds back for the moment by itself (battery, load); empty if it does not.
        self.held_back = ""

    @property
    def collections(self) -> tuple[CollectionConfig, ...]:
        """What is offered now, in the owner's order."""
        return tuple(self._collections.values())

    @property
    def paused(self) -> bool:
        """Whether the owner holds up all transfers."""
        return self.pause == "all"

    @property
    def draining(self) -> bool:
        """Whether what has begun is finished, and nothing new begins."""
        return self.pause == "new"

    def replace(self, collections: Iterable[CollectionConfig]) -> None:
        """The owner changed the configuration: from now on only this counts, also for running transfers."""
        self._collections = {collection.id: collection for collection in collections}

    def collection(self, collection_id: str) -> CollectionConfig:
        """The configuration of a collection. Raises `UnknownCollection`."""
        collection = self._collections.get(collection_id)
        if collection is None:
            raise UnknownCollection(
                "This agent does not offer such a collection; its owner may have removed it.",
                subject=collection_id,
            )
        return collection

    def has_room(self, collection_id: str, running: int) -> bool:
        """Whether one more session may run on a collection beside those that do; yes for one that is not offered,
        which is refused with its own reason."""
        collection = self._collections.get(collection_id)
        limit = None if collection is None else collection.limits.sessions
        return limit is None or running < limit

    def check(self, collection_id: str, path: tuple[bytes, ...], access: Access) -> CollectionConfig:
        """Whether a path of a collection may be read (``r``) or changed (``rw``).

        ``path`` is a parsed collection path. Its components are looked at again although `protocol.names` made
        them: whoever forgets to parse gets a refusal here, not a file outside the root.
        Raises `AccessDenied` (code ``READ_ONLY`` or ``PERMISSION_DENIED``) or `UnknownCollection`.
        """
        collection = self.collection(collection_id)
        for component in path:
            if component in (b"", b".", b"..") or b"/" in component or b"\0" in component:
                raise AccessDenied("The path leaves the collection.", subject=collection_id)
            if is_reserved(component):
                raise AccessDenied("Names that begin with .towpath. are the agent's own.", subject=collection_id)
        if access not in ("r", "rw"):
            raise AccessDenied("A path can be read or changed here, and nothing else.", subject=collection_id)
        if access == "rw" and collection.read_only:
            raise AccessDenied(
                f"The owner offers collection {collection.name!r} for reading only.",
                code="READ_ONLY",
                subject=collection_id,
            )
        return collection

    def check_operation(self, operation: str) -> None:
        """Whether the relay may ask for this kind of thing now. Raises `AccessDenied`, or `NeedsPerson` while the owner
        has paused this machine and a session is wanted from it."""
        if operation not in LINK_OPERATIONS:
            raise AccessDenied("Only the owner of this machine may do that, and not through a relay.")
        if operation == "sessions" and self.paused:
            raise NeedsPerson(
                "The owner of this machine has paused it; transfers go on when it is resumed.",
                code="PAUSED_BY_OWNER",
                who="source owner",
            )
        if operation == "sessions" and self.held_back:
            raise RetryLater(f"The source holds back: {self.held_back}", code="SOURCE_BUSY")

    def check_new_session(self) -> None:
        """Whether a session may begin that was not known here. Raises `NeedsPerson` while the owner lets this machine
        finish what has begun."""
        if self.draining:
            raise NeedsPerson(
                "The owner of the source is draining it: what has begun is finished, and nothing new begins until it "
                "is resumed.",
                code="PAUSED_BY_OWNER",
                who="source owner",
            )
