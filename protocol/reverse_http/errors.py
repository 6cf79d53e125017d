"""Why a call over the link failed, apart from what the other side's application answered."""

from __future__ import annotations

from protocol.errors import ProtocolError, RetryLater


class LinkLost(RetryLater):
    """The connection ended, or is about to, before the answer was complete."""

    default_code = "LINK_LOST"


class CallTimeout(RetryLater):
    """The answer did not come in time. The link itself is unharmed."""

    default_code = "TIMEOUT"


class CallReset(RetryLater):
    """The other side gave this one call up (RST_STREAM)."""

    default_code = "CALL_RESET"


class AnswerTooLarge(ProtocolError):
    """The answer is longer than the caller was ready to take."""

    default_code = "TOO_LARGE"


class Flood(ProtocolError):
    """The peer sent more of something than any honest peer does."""

    default_code = "FLOOD"
