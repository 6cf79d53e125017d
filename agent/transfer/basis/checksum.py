"""Digests of whole files in the algorithms users name, as fixed-width lower-case hex."""

from __future__ import annotations

import hashlib
from typing import Any

import xxhash
from blake3 import blake3

from agent.storage.base import Root
from agent.transfer.basis.jobs import FileJob
from agent.transfer.basis.patience import VERIFY_CHECKSUM
from protocol.errors import ItemFailed, RetryLater, TowpathError
from protocol.names import escape
from protocol.session import DigestBlocks

_CHUNK = 1024 * 1024
_HEX_DIGITS = {"MD5": 32, "SHA1": 40, "SHA256": 64, "SHA512": 128, "XXH3-128": 32, "BLAKE3": 64}
_HEX = frozenset("0123456789abcdefABCDEF")
ALGORITHMS = tuple(_HEX_DIGITS)


def normalised_algorithm(name: str) -> str:
    """The one spelling used inside. Raises `ItemFailed` for an algorithm we do not have."""
    plain = name.upper().replace("_", "-").replace("SHA-", "SHA")
    if plain == "XXH128":
        plain = "XXH3-128"
    if plain not in _HEX_DIGITS:
        raise ItemFailed(
            f"The checksum algorithm {name!r} is not known here; use one of {', '.join(ALGORITHMS)}.",
            code="BAD_ALGORITHM",
            who="you",
        )
    return plain


def new_digest(algorithm: str) -> Any:
    """A hash object. Raises `ItemFailed` for an algorithm we do not have."""
    name = normalised_algorithm(algorithm)
    if name == "BLAKE3":
        return blake3()
    if name == "XXH3-128":
        return xxhash.xxh3_128()
    return hashlib.new(name.lower(), usedforsecurity=False)


def check_given(value: str, algorithm: str | None) -> None:
    """Raise `ItemFailed` for a checksum that the algorithm (MD5 when not named) cannot have, before anything is read
    for it."""
    name = normalised_algorithm(algorithm or "MD5")
    if len(value) != _HEX_DIGITS[name] or not set(value) <= _HEX:
        raise ItemFailed(
            f"The checksum {value[:200]!r} cannot be {name}, which has {_HEX_DIGITS[name]} hexadecimal digits, "
            "leading zeros among them; name its algorithm, or correct it.",
            code="BAD_CHECKSUM",
            who="you",
        )


def unexpected_digest(job: FileJob, found: str, *, again: bool) -> TowpathError:
    """A file is not what its given checksum says. ``again``: it may have been misread, so that it is worth another
    look; the same content twice is what the source holds."""
    name, given = normalised_algorithm(job.algorithm or "MD5"), (job.external_checksum or "").lower()
    difference = f"The {name} digest of {escape(job.source_path)} is {found}, not {given} as was given"
    subject = escape(job.source_path)
    if again:
        sentence = f"{difference}; it is read again."
        return RetryLater(sentence, code=VERIFY_CHECKSUM, who="source owner", subject=subject)
    sentence = f"{difference}; the source holds other content than expected."
    return ItemFailed(sentence, code=VERIFY_CHECKSUM, who="source owner", subject=subject)


def file_digest(root: Root, descriptor: int, algorithm: str) -> str:
    """Read an open file from its beginning and digest it. Raises OSError, `ItemFailed`."""
    digest = new_digest(algorithm)
    buffer = memoryview(bytearray(_CHUNK))
    offset = 0
    while count := root.preadv(descriptor, [buffer], offset):
        digest.update(buffer[:count])
        offset += count
    return str(digest.hexdigest()).rjust(_HEX_DIGITS[normalised_algorithm(algorithm)], "0")


def published_digest(root: Root, job: FileJob, temporary: bytes) -> str:
    """The digest of a file that is complete, as its user has asked for it. Raises OSError, and `TowpathError` where it
    is not the one that was given."""
    descriptor = job.group.handle.open_temporary(temporary)
    try:
        value = file_digest(root, descriptor, job.algorithm or "MD5")
    finally:
        root.close_file(descriptor)
    if job.external_checksum is not None and value != job.external_checksum.lower():
        again = job.found_digest != value
        job.found_digest = value
        raise unexpected_digest(job, value, again=again)
    return value


def block_digests(root: Root, descriptor: int, request: DigestBlocks) -> list[bytes]:
    """BLAKE3 of some blocks of an open file, the last one of the file perhaps shorter. Raises OSError."""
    buffer = memoryview(bytearray(request.block))
    digests = []
    for index in range(request.first, request.first + request.count):
        read = 0
        while read < request.block:
            count = root.preadv(descriptor, [buffer[read:]], index * request.block + read)
            if not count:
                break
            read += count
        digests.append(blake3(buffer[:read]).digest())
    return digests
