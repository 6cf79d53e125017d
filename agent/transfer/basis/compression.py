"""Compression of content on a lane, for as long as it pays. No input or output here.

zstd, from the standard library (Python 3.14) or its backport; where neither is there nothing is offered, and everything
travels as it is. Digests are always those of the content itself, so compression can spoil nothing unnoticed.

Whether it pays is measured: a piece sent as it is takes 1/network seconds a byte, a compressed one 1/compressor +
ratio/network. A small sample decides first; what does not pay (content that is compressed already, a network faster
than the compressor) is looked at again ever more seldom.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from protocol.control import Compression as _Mode
from protocol.session import ZSTD, ZSTD_ALWAYS


def _zstd() -> Any:
    try:
        return importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    except ImportError:
        return None


zstd = _zstd()

Mode: TypeAlias = _Mode
Buffer: TypeAlias = bytes | bytearray | memoryview

LEVEL = 3
# A decoder must not be made to hold more than the largest block (2**24 bytes).
WINDOW_LOG = 24
# Content shorter than this is not worth a look.
LEAST = 4096
SAMPLE = 128 * 1024
# The time with compression must be this part of the time without, at most.
WORTH = 0.9
# Bytes a second that no compressor keeps up with.
TOO_FAST = 500e6
# At most so many pieces are sent as they are before the next look.
LONGEST_PAUSE = 64
# While compressing, one piece in so many is sent as it is, to see how fast the network is.
PROBE_EVERY = 32
# What the last piece weighs in the network's rate: about a tenth.
_KEEP = 0.9


def usable() -> bool:
    """Whether this process has zstd."""
    return zstd is not None


def offered(mode: Mode) -> list[str]:
    """What a destination tells its source of the compression it wants."""
    if mode == "off" or not usable():
        return []
    return [ZSTD] if mode == "auto" else [ZSTD, ZSTD_ALWAYS]


def wanted(abilities: Sequence[str]) -> Mode:
    """What a source makes of its destination's abilities."""
    if ZSTD not in abilities or not usable():
        return "off"
    return "on" if ZSTD_ALWAYS in abilities else "auto"


def compress(content: Buffer) -> bytes:
    """One whole frame."""
    packed: bytes = zstd.compress(content, LEVEL)
    return packed


def inflate_untrusted(data: Buffer, size: int) -> bytes | None:
    """The content of a frame that claims to hold ``size`` bytes; None when it does not hold just these. Never makes
    more of it, whatever the frame says."""
    decompressor = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG})
    try:
        content: bytes = decompressor.decompress(data, max_length=size)
        if not decompressor.eof:
            # The end of a frame may still be behind the last byte of content.
            content += decompressor.decompress(b"", max_length=1)
    except (zstd.ZstdError, EOFError):
        return None
    whole = decompressor.eof and not decompressor.unused_data and len(content) == size
    return content if whole else None


class Compression:
    """Decides for one lane. Its thread calls `attempt` before it sends a piece and `sent` after."""

    def __init__(
        self, squeeze: Callable[[Buffer], bytes] = compress, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._squeeze = squeeze
        self._clock = clock
        # Bytes that went out of late, and how long that took (seconds); both fade.
        self._bytes = self._seconds = 0.0
        self.compressing = False
        self._since_probe = 0
        self._skip = 0
        self._pause = 1

    def sent(self, size: int, seconds: float) -> None:
        """So many bytes took so long to send. While compressing, what did not have to wait says only that the
        compressor is slower than the network, which is known."""
        if self.compressing and self._since_probe and seconds * 4 * self._bytes < size * self._seconds:
            return
        self._bytes = self._bytes * _KEEP + size
        self._seconds = self._seconds * _KEEP + seconds

    def attempt(self, content: Buffer, mode: Mode) -> bytes | None:
        """The content compressed, or None when it is to be sent as it is."""
        if mode == "off" or len(content) < LEAST:
            return None
        if mode == "on":
            packed = self._squeeze(content)
            return packed if len(packed) < len(content) else None
        if self._skip:
            self._skip -= 1
            return None
        if not self._bytes or self._bytes > TOO_FAST * self._seconds:
            self.compressing = False
            return None
        if not self.compressing:
            if self._worth(content[:SAMPLE]) is None:
                return None
            self.compressing = True
        self._since_probe = (self._since_probe + 1) % PROBE_EVERY
        paid = self._worth(content) if self._since_probe else None
        if paid is not None:
            # What a sample promises and the whole does not keep is looked at ever more seldom all the same.
            self._pause = max(1, self._pause // 2)
        return paid

    def _worth(self, content: Buffer) -> bytes | None:
        started = self._clock()
        packed = self._squeeze(content)
        seconds = self._clock() - started
        network = self._seconds / self._bytes
        if seconds / len(content) + network * len(packed) / len(content) > WORTH * network:
            self.compressing = False
            self._skip, self._pause = self._pause, min(self._pause * 2, LONGEST_PAUSE)
            return None
        return packed
