"""TLS 1.3 records that no library makes for us: changes of keys, each of which asks for one of the other side's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

_KEY_UPDATE, _HANDSHAKE, _CONTENT = b"\x18\x00\x00\x01\x01", 22, 23


class KeyUpdates:
    """Goes on after the handshake of a ``side`` (CLIENT, SERVER) whose secrets are in a key log file."""

    def __init__(self, log: Path, side: str, cipher: str) -> None:
        name = f"{side}_TRAFFIC_SECRET_0"
        rows = [line.split() for line in log.read_text().splitlines()]
        self._secret = next(bytes.fromhex(row[2]) for row in rows if row[0] == name)
        self._hash: hashes.HashAlgorithm = hashes.SHA384() if "SHA384" in cipher else hashes.SHA256()
        self._aead: Callable[[bytes], ChaCha20Poly1305 | AESGCM] = ChaCha20Poly1305 if "CHACHA20" in cipher else AESGCM
        self._length = 16 if "AES_128" in cipher else 32
        self._take_keys()

    def _expand(self, label: bytes, length: int) -> bytes:
        # HKDF-Expand-Label (RFC 8446 section 7.1).
        label = b"tls13 " + label
        info = length.to_bytes(2, "big") + bytes([len(label)]) + label + b"\0"
        return HKDFExpand(self._hash, length, info).derive(self._secret)

    def _take_keys(self) -> None:
        self._seal = self._aead(self._expand(b"key", self._length))
        self._iv, self._sequence = int.from_bytes(self._expand(b"iv", 12), "big"), 0

    def _record(self, kind: int, content: bytes) -> bytes:
        head = b"\x17\x03\x03" + (len(content) + 17).to_bytes(2, "big")
        nonce = (self._iv ^ self._sequence).to_bytes(12, "big")
        self._sequence += 1
        return head + self._seal.encrypt(nonce, content + bytes([kind]), head)

    def content(self, data: bytes) -> bytes:
        """A record of content."""
        return self._record(_CONTENT, data)

    def update(self) -> bytes:
        """New keys, and the wish that the other side takes new ones, too (section 4.6.3)."""
        record = self._record(_HANDSHAKE, _KEY_UPDATE)
        self._secret = self._expand(b"traffic upd", self._hash.digest_size)
        self._take_keys()
        return record
