"""Reading a client's JSON document field by field, so that every mistake is answered by a sentence that names it."""

from __future__ import annotations

import unicodedata
import uuid
from collections.abc import Collection, Mapping
from typing import Any

from relay import times
from relay.refusal import ApiError

BAD_REQUEST = "ClientError.BadRequest"


def bad_request(message: str, code: str = BAD_REQUEST) -> ApiError:
    """A 400 in the words of the Transfer API."""
    return ApiError(400, code, message)


def is_uuid(value: object) -> bool:
    """Whether a value is a UUID in its usual form, of any case."""
    if not isinstance(value, str) or len(value) != 36:
        return False
    try:
        return str(uuid.UUID(value)) == value.lower()
    except ValueError:
        return False


class Fields:
    """One document (or one of its items) from a client. Every method raises `ApiError` 400 for a wrong value.

    A key that is missing and a key that is null mean the same: the default. Unknown keys are ignored, as newer
    clients may send more than this relay knows.
    """

    __slots__ = ("_document", "_what")

    def __init__(self, document: object, what: str) -> None:
        if not isinstance(document, Mapping):
            raise bad_request(f"{what} must be a JSON object.")
        self._document: Mapping[str, Any] = document
        self._what = what

    def __contains__(self, key: str) -> bool:
        return key in self._document

    def raw(self, key: str) -> Any:
        """Whatever stands there, unchecked; None where nothing does."""
        return self._document.get(key)

    def data_type(self, *allowed: str) -> str:
        """The ``DATA_TYPE``; missing means the first of those allowed."""
        value = self._document.get("DATA_TYPE", allowed[0])
        if value not in allowed:
            raise bad_request(f"DATA_TYPE of {self._what} must be {' or '.join(allowed)}.")
        return str(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false; ``default`` for null or nothing."""
        value = self._document.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise bad_request(f"{key} must be true or false.")
        return value

    def text(self, key: str, *, longest: int, shortest: int = 0) -> str | None:
        """A string without control characters, or None."""
        value = self._document.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            raise bad_request(f"{key} must be a string.")
        if not shortest <= len(value) <= longest:
            raise bad_request(f"{key} must have {shortest} to {longest} characters.")
        check_text(key, value)
        return value

    def required_text(self, key: str, *, longest: int, shortest: int = 1) -> str:
        """As `text`, of what must be there."""
        value = self.text(key, longest=longest, shortest=shortest)
        if value is None:
            raise bad_request(f"{key} is missing in {self._what}.")
        return value

    def line(self, key: str, *, longest: int) -> str | None:
        """As `text`, of what stands in one line, without a break (Globus: Task Submission, Collection Bookmarks)."""
        value = self.text(key, longest=longest)
        # Carriage returns are control characters, which no text has.
        if value is not None and "\n" in value:
            raise bad_request(f"{key} must be one line.")
        return value

    def required_name(self, key: str, *, longest: int) -> str:
        """A name that must be there and is not blank, in one line, without blanks around it."""
        value = self.line(key, longest=longest)
        if value is None:
            raise bad_request(f"{key} is missing in {self._what}.")
        name = value.strip()
        if not name:
            raise bad_request(f"{key} must not be blank.")
        return name

    def identifier(self, key: str) -> str:
        """A UUID that must be there, in lower case."""
        value = self._document.get(key)
        if value is None:
            raise bad_request(f"{key} is missing in {self._what}.")
        if not is_uuid(value):
            raise bad_request(f"{key} must be a UUID.")
        return str(value).lower()

    def choice(self, key: str, allowed: Collection[str], default: str) -> str:
        """One of some words; ``default`` for null or nothing."""
        value = self._document.get(key)
        if value is None:
            return default
        if not isinstance(value, str) or value not in allowed:
            raise bad_request(f"{key} must be one of {', '.join(sorted(allowed))}.")
        return value

    def integer(self, key: str, lowest: int, highest: int) -> int | None:
        """A whole number within bounds, both included, or None."""
        value = self._document.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
            raise bad_request(f"{key} must be a whole number from {lowest} to {highest}.")
        return value

    def time(self, key: str) -> float | None:
        """A time as Unix seconds, or None."""
        value = self._document.get(key)
        if value is None:
            return None
        if not isinstance(value, str):
            raise bad_request(f"{key} must be a time such as 2030-01-31T12:00:00+00:00.")
        try:
            return times.parse(value)
        except ValueError as error:
            raise bad_request(f"{key} must be a time such as 2030-01-31T12:00:00+00:00.") from error

    def items(self, key: str, most: int) -> list[Any]:
        """A list, empty when missing."""
        value = self._document.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise bad_request(f"{key} must be a list.")
        if len(value) > most:
            raise bad_request(f"{key} has {len(value)} entries; at most {most} are allowed.")
        return value


def check_text(key: str, value: str) -> None:
    """Refuse what cannot be stored or printed: control characters and halves of surrogate pairs."""
    if not value.isprintable() and any(c not in "\n\t" and unicodedata.category(c) == "Cc" for c in value):
        raise bad_request(f"{key} must not contain control characters.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise bad_request(f"{key} is not valid Unicode text.") from error


def query_integer(value: str | None, name: str, *, default: int, lowest: int, highest: int) -> int:
    """A whole number from the query string. Raises `ApiError` 400."""
    if value is None or value == "":
        return default
    if not value.isascii() or not value.isdigit() or len(value) > 12 or not lowest <= int(value) <= highest:
        raise bad_request(f"{name} must be a whole number from {lowest} to {highest}.")
    return int(value)


def query_boolean(value: str | None, name: str) -> bool | None:
    """``1`` or ``true``, ``0`` or ``false`` from the query string; None for nothing. Raises `ApiError` 400."""
    if not value:
        return None
    if value.lower() not in ("0", "1", "false", "true"):
        raise bad_request(f"{name} must be true or false.")
    return value.lower() in ("1", "true")
