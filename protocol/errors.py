"""What can go wrong, as classes that say what a caller may do next.

One tree serves both sides and both wires (the link and the session). The class of an error decides whether
work is tried again; its code is what Globus clients show; its sentence is what a person reads. Nothing in
the project matches an error by its text.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

Disposition = Literal["retry", "permanent", "fatal", "person"]
Who = Literal["", "you", "source owner", "destination owner", "relay operator"]

MAX_SENTENCE = 2000


class TowpathError(Exception):
    """Root of every error that may cross the wire or reach a user.

    ``code`` is a stable upper-case word (a Globus event code where one exists), ``sentence`` one sentence
    for people that names the thing and the next step, ``who`` the person who can mend it.
    """

    disposition: ClassVar[Disposition] = "permanent"
    default_code: ClassVar[str] = "UNKNOWN"

    def __init__(self, sentence: str, *, code: str | None = None, who: Who = "", subject: str = "") -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.code = code or self.default_code
        self.who = who
        # The escaped path or the id the error is about, where there is one.
        self.subject = subject
        # The HTTP status it came with, for an error that the other side of the link answered.
        self.status: int | None = None

    def to_document(self) -> dict[str, Any]:
        """The error as it travels: a plain mapping of short strings."""
        return {
            "class": self.disposition,
            "code": self.code,
            "sentence": self.sentence[:MAX_SENTENCE],
            "who": self.who,
            "subject": self.subject[:MAX_SENTENCE],
        }


class RetryLater(TowpathError):
    """A passing fault: the same request may succeed later without anybody doing anything."""

    disposition = "retry"
    default_code = "CONNECT_FAILED"


class ItemFailed(TowpathError):
    """Permanent for this item: trying again changes nothing, the rest of the task goes on."""

    disposition = "permanent"


class TaskFailed(TowpathError):
    """Fatal for the whole task."""

    disposition = "fatal"


class NeedsPerson(TowpathError):
    """The task waits until a person mends something (a full disk, an expired consent), then goes on by itself."""

    disposition = "person"


class ProtocolError(TowpathError):
    """A peer sent something that no honest peer sends. The only error a ``*_untrusted`` function raises."""

    disposition = "retry"
    default_code = "PROTOCOL_ERROR"


class AccessDenied(TowpathError):
    """The owner's policy, a ticket or an access rule says no. Trying again changes nothing."""

    disposition = "permanent"
    default_code = "PERMISSION_DENIED"


_BY_DISPOSITION: dict[str, type[TowpathError]] = {
    "retry": RetryLater,
    "permanent": ItemFailed,
    "fatal": TaskFailed,
    "person": NeedsPerson,
}


def error_from_document_untrusted(document: object) -> TowpathError:
    """Rebuild an error that a peer reported. Unknown classes count as retryable; all strings are cut to size.

    Raises `ProtocolError` for what is no object."""
    if not isinstance(document, dict):
        raise ProtocolError("The peer reported an error in a form that cannot be read.")
    kind = _BY_DISPOSITION.get(str(document.get("class")), RetryLater)
    who = document.get("who")
    return kind(
        str(document.get("sentence") or "The peer gave no reason.")[:MAX_SENTENCE],
        code=str(document.get("code") or "UNKNOWN")[:64],
        who=who if who in ("you", "source owner", "destination owner", "relay operator") else "",
        subject=str(document.get("subject") or "")[:MAX_SENTENCE],
    )
