"""What an agent's error in a file operation is called in the Transfer API.

Clients repeat 5xx answers unless the code contains ``ExternalError``, so trouble at the endpoint is always such a code.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import TowpathError
from relay.refusal import ApiError
from relay.transfer.fields import BAD_REQUEST


@dataclass(frozen=True)
class Operation:
    """One kind of operation: the word in its codes, and the code for a thing that is not there."""

    word: str
    missing: str


LISTING = Operation("DirListingFailed", "ClientError.NotFound")
# Clients print "nothing found" for exactly this code.
STAT = Operation("StatFailed", "NotFound")
MKDIR = Operation("MkdirFailed", "ClientError.NotFound")
RENAME = Operation("RenameFailed", "ClientError.NotFound")
SYMLINK = Operation("SymlinkFailed", "ClientError.NotFound")

_DETAILS = {
    "GC_NOT_CONNECTED": "GCDisconnected",
    "EXISTS": "Exists",
    "NOT_A_DIRECTORY": "NotDirectory",
    "IS_A_DIRECTORY": "IsDirectory",
    "NOT_EMPTY": "NotEmpty",
    "TOO_LARGE": "SizeLimit",
    "NO_SPACE": "NoSpace",
    "QUOTA_EXCEEDED": "QuotaExceeded",
    "COLLECTION_UNAVAILABLE": "CollectionUnavailable",
    "UNKNOWN_COLLECTION": "CollectionUnavailable",
    "TIMEOUT": "Timeout",
    "ENDPOINT_TOO_BUSY": "TooBusy",
}
_FORBIDDEN = frozenset({"PERMISSION_DENIED", "READ_ONLY"})
_MALFORMED = frozenset({"ILLEGAL_NAME", "BAD_REQUEST", "BAD_MARKER"})


def operation_error(operation: Operation, error: TowpathError, where: str) -> ApiError:
    """The answer for an agent's error. ``where`` is the collection's name."""
    message = f"{error.sentence.rstrip('.')} (endpoint “{where}”, {error.code})"
    if error.code == "NOT_FOUND":
        return ApiError(404, operation.missing, message)
    if error.code in _FORBIDDEN:
        return ApiError(403, "EndpointPermissionDenied", message)
    if error.code in _MALFORMED:
        return ApiError(400, BAD_REQUEST, message)
    detail = _DETAILS.get(error.code, "EndpointError")
    return ApiError(502, f"ExternalError.{operation.word}.{detail}", message)


def disconnected(operation: Operation, where: str, *, served: bool) -> ApiError:
    """The answer when no agent serves the collection now. ``served``: one was set up for it."""
    message = f"The agent of “{where}” is not connected; start it on its machine and try again."
    if not served:
        message = f"No agent has been set up for “{where}”; its owner does that with the collection's setup key."
    return ApiError(502, f"ExternalError.{operation.word}.GCDisconnected", message)
