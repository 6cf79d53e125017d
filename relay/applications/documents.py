"""Reading the documents of the developers' API: every mistake is answered by a sentence that names the field."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from relay.refusal import ApiError

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
MAX_TEXT = 1000
MAX_LIST = 100
MAX_URI = 2000
_EMAIL = re.compile(r"[^\s@]{1,64}@[^\s@]{1,255}")
_DOMAIN = re.compile(r"(?:\*\.)?[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")


def invalid(sentence: str) -> ApiError:
    """A 400 of the Auth API."""
    return ApiError(400, "INVALID_REQUEST", sentence)


def wrapped(document: object, key: str) -> Mapping[str, Any]:
    """The object under the one key that every document of this API has. Raises `ApiError` 400."""
    inner = document.get(key) if isinstance(document, dict) else None
    if not isinstance(inner, dict):
        raise invalid(f"The body must be a JSON object with the key {key}.")
    return inner


def text(document: Mapping[str, Any], key: str) -> str | None:
    """A text that can be shown, or None when it is missing. Raises `ApiError` 400."""
    value = document.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_TEXT or not value.isprintable():
        raise invalid(f"{key} must be a text of 1 to {MAX_TEXT} characters that can be shown.")
    return value.strip()


def required(document: Mapping[str, Any], key: str) -> str:
    """A text that must be there. Raises `ApiError` 400."""
    value = text(document, key)
    if value is None:
        raise invalid(f"{key} is missing.")
    return value


def switch(document: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false. Raises `ApiError` 400."""
    value = document.get(key, default)
    if not isinstance(value, bool):
        raise invalid(f"{key} must be true or false.")
    return value


def identifier(value: object, key: str) -> str:
    """A UUID in lower case. Raises `ApiError` 400."""
    try:
        return str(uuid.UUID(value if isinstance(value, str) else ""))
    except ValueError as error:
        raise invalid(f"{key} must be a UUID.") from error


def texts(document: Mapping[str, Any], key: str) -> list[str] | None:
    """A list of texts, or None when it is missing. Raises `ApiError` 400."""
    value = document.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > MAX_LIST or not all(isinstance(item, str) for item in value):
        raise invalid(f"{key} must be a list of at most {MAX_LIST} texts.")
    return list(dict.fromkeys(value))


def email(document: Mapping[str, Any], key: str) -> str:
    """A mail address that must be there. Raises `ApiError` 400."""
    value = required(document, key)
    if _EMAIL.fullmatch(value) is None:
        raise invalid(f"{key} must be a mail address.")
    return value


def domains(document: Mapping[str, Any], key: str) -> list[str] | None:
    """Domains, each perhaps with ``*.`` before it. Raises `ApiError` 400."""
    value = texts(document, key)
    if value is None:
        return None
    lower = [domain.lower() for domain in value]
    if not all(_DOMAIN.fullmatch(domain) for domain in lower):
        raise invalid(f"{key} must be a list of domains such as example.org or *.example.org.")
    return lower


def web_address(document: Mapping[str, Any], key: str) -> str | None:
    """An address of a page for people. Raises `ApiError` 400."""
    value = text(document, key)
    if value is not None and urlsplit(value).scheme not in ("http", "https"):
        raise invalid(f"{key} must be the address of a web page.")
    return value


def redirect_uris(document: Mapping[str, Any]) -> list[str] | None:
    """Where a browser may be sent back to: https anywhere, http on the user's own machine (RFC 9700, 2.1; RFC 8252).

    Raises `ApiError` 400.
    """
    value = texts(document, "redirect_uris")
    for uri in value or ():
        _check_redirect(uri)
    return value


def _check_redirect(uri: str) -> None:
    try:
        parts = urlsplit(uri)
        host = parts.hostname or ""
        _ = parts.port
    except ValueError as error:
        raise invalid(f"redirect_uris: {uri[:200]!r} is no address.") from error
    plain = uri.isascii() and uri.isprintable() and not any(c in uri for c in " \\#*") and len(uri) <= MAX_URI
    secure = parts.scheme == "https" or (parts.scheme == "http" and host in _LOOPBACK)
    if not plain or not host or "@" in parts.netloc or not secure:
        raise invalid(
            f"redirect_uris: {uri[:200]!r} must be an https address, or http on localhost, without a fragment, "
            "a wildcard or a password."
        )
