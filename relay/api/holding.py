"""What requests hold of the relay's memory until they are answered: bounded for all, of which nobody has everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request
from starlette.types import Scope

from protocol.places import Places
from relay.api.client_authentication import caller_of
from relay.audit.notes import notes
from relay.refusal import ApiError, unavailable

# Memory is counted in pieces of so many bytes. The first one of a request is not, which is all that most have.
PIECE = 64 * 1024
# So many of the largest bodies are held at a time, of all people together, until their requests are answered.
BODIES_AT_ONCE = 4
# What is made of bodies may be as much as this many of the largest ones, but this many bytes always.
DOCUMENTS_AT_ONCE = 8
_DOCUMENTS_AT_LEAST = 512 << 20
# Bytes of all answers together that are not taken yet.
_ANSWERS = 256 << 20
_KEY: Final = "holding"


@dataclass(frozen=True)
class Memory:
    """What all requests together may hold, for bodies of at most ``max_body`` bytes, for what is made of them, and for
    answers until they are taken."""

    bodies: Places
    documents: Places
    answers: Places
    largest_document: int

    @classmethod
    def of(cls, max_body: int) -> Memory:
        documents = max(_DOCUMENTS_AT_LEAST, DOCUMENTS_AT_ONCE * max_body)
        # One caller gets three quarters of all places (`Places`), also for a single document.
        return cls(
            bodies=Places(max(1, BODIES_AT_ONCE * max_body // PIECE)),
            documents=Places(documents // PIECE),
            answers=Places(_ANSWERS // PIECE),
            largest_document=documents // 4 * 3 - PIECE,
        )


class Holding:
    """What one request holds. Found again by `holding_of` while it is answered."""

    def __init__(self, scope: Scope, memory: Memory) -> None:
        self._scope = scope
        self._memory = memory
        self._pieces: list[tuple[Places, str]] = []
        self._body = self._documents = 0
        scope.setdefault("state", {})[_KEY] = self

    def body(self, size: int) -> None:
        """Of the body so much is there by now. Raises `ApiError` 503 where too much is held."""
        self._body = self._grow(self._memory.bodies, self._body, size)

    def document(self, size: int) -> None:
        """So many bytes are about to be made of it. Raises `ApiError`: 400 where that is more than anybody may have at
        any time, 503 where too much is held now."""
        if size > self._memory.largest_document:
            sentence = "The document would take too much memory; split it, and send one part after the other."
            raise ApiError(400, "ClientError.BadRequest", sentence)
        self._documents = self._grow(self._memory.documents, self._documents, size)

    def answer(self, size: int) -> None:
        """So many bytes are about to be sent at once. Raises `ApiError` 503 where too much waits to be taken."""
        self._grow(self._memory.answers, 0, size)

    def _grow(self, places: Places, pieces: int, size: int) -> int:
        while size > (pieces + 1) * PIECE:
            caller = self._caller()
            if not places.take(caller):
                raise unavailable("The relay holds too much for requests at the moment; ask again in a few seconds.")
            self._pieces.append((places, caller))
            pieces += 1
        return pieces

    def _caller(self) -> str:
        """The person, where they have shown who they are, or else where they call from."""
        if who := notes(self._scope).get("who"):
            return str(who)
        return caller_of(Request(self._scope))

    def let_go(self) -> None:
        """Nothing is held any more."""
        for places, caller in self._pieces:
            places.leave(caller)
        self._pieces.clear()


def holding_of(request: Request) -> Holding:
    """What the request holds; `relay.api.frame` sees to it that there is such a thing."""
    held: Any = request.scope["state"][_KEY]
    assert isinstance(held, Holding)
    return held
