"""Frames of a WebSocket connection that is open (RFC 6455, section 5). Sans I/O.

Written for throughput: content is passed on as it comes, however long its frame is, and is copied once, by the
unmasking in C. The opening handshake and the masking itself are the library's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from websockets.speedups import apply_mask

from protocol.errors import ProtocolError

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_KNOWN = frozenset((CONT, TEXT, BINARY, CLOSE, PING, PONG))
# The longest payload of what is no content.
_SHORT = 125
_FIN, _MASKED = 0x80, 0x80

Buffer = bytes | bytearray | memoryview


def header(opcode: int, size: int, mask: bytes = b"") -> bytes:
    """The head of an unfragmented frame with ``size`` bytes of payload."""
    masked = _MASKED if mask else 0
    if size < 126:
        return bytes((_FIN | opcode, masked | size)) + mask
    if size < 65536:
        return bytes((_FIN | opcode, masked | 126)) + size.to_bytes(2, "big") + mask
    return bytes((_FIN | opcode, masked | 127)) + size.to_bytes(8, "big") + mask


def frame(opcode: int, payload: Buffer, *, masked: bool) -> list[Buffer]:
    """A frame in parts. Without a mask its payload is not copied."""
    if not masked:
        return [header(opcode, len(payload)), payload] if payload else [header(opcode, 0)]
    mask = os.urandom(4)
    head = header(opcode, len(payload), mask)
    return [head, apply_mask(payload, mask)] if payload else [head]


class Parser:
    """What the peer sends. ``masked`` says whether it must mask, as clients do; no other way is taken.

    Frames of content longer than ``longest`` are refused.
    """

    def __init__(self, *, masked: bool, longest: int) -> None:
        self._masked = masked
        self._longest = longest
        self._head = bytearray()
        self._opcode: int | None = None
        self._left = 0
        self._mask = b""
        self._short = bytearray()
        # Between the first and the last frame of a fragmented message.
        self._within = False

    def feed_untrusted(self, data: Buffer) -> Iterator[tuple[int, bytes, bool]]:
        """Opcode, payload, and whether its frame ends with it: content in pieces as it has come (`CONT` only ever
        continues content), everything else whole. Raises `ProtocolError`; what was yielded before stands."""
        view = memoryview(data)
        while True:
            if self._opcode is None:
                view = self._begin(view)
                if self._opcode is None:
                    return
            piece = view[: self._left]
            view = view[len(piece) :]
            if not piece and self._left:
                return
            payload = self._unmasked(piece)
            self._left -= len(piece)
            opcode = self._opcode
            last = not self._left
            if last:
                self._opcode = None
            if opcode in (BINARY, CONT):
                yield opcode, payload, last
                continue
            self._short += payload
            if last:
                whole = bytes(self._short)
                self._short.clear()
                yield opcode, whole, True

    def _unmasked(self, piece: memoryview) -> bytes:
        if not self._mask:
            return bytes(piece)
        payload = apply_mask(piece, self._mask) if piece else b""
        if turn := len(piece) % 4:
            self._mask = self._mask[turn:] + self._mask[:turn]
        return payload

    def _begin(self, view: memoryview) -> memoryview:
        """Take in what there is of a frame's head; sets ``_opcode`` once it is complete."""
        head = self._head
        while True:
            need = _head_size(head)
            taken = need - len(head)
            head += view[:taken]
            view = view[taken:]
            if len(head) < need:
                return view
            if _head_size(head) == need:
                break
        self._check(head)
        head.clear()
        return view

    def _check(self, head: bytearray) -> None:
        first, second = head[0], head[1]
        opcode, size = first & 0x0F, second & 0x7F
        if first & 0x70 or opcode not in _KNOWN:
            raise ProtocolError("The other side broke the rules of WebSocket: a frame of no known kind.")
        if bool(second & _MASKED) is not self._masked:
            raise ProtocolError("The other side broke the rules of WebSocket: a frame with the wrong masking.")
        extended = {126: 2, 127: 8}.get(size, 0)
        if extended:
            size = int.from_bytes(head[2 : 2 + extended], "big")
        fin = bool(first & _FIN)
        if opcode in (BINARY, CONT):
            if size > self._longest:
                raise ProtocolError("The other side broke the rules of WebSocket: a frame that is too long.")
            if (opcode == CONT) is not self._within:
                raise ProtocolError("The other side broke the rules of WebSocket: fragments out of order.")
            self._within = not fin
        elif size > _SHORT or not fin or (opcode == TEXT and self._within):
            raise ProtocolError("The other side broke the rules of WebSocket: a frame that is too long or cut.")
        self._mask = bytes(head[-4:]) if self._masked else b""
        self._opcode, self._left = opcode, size


def _head_size(head: bytearray) -> int:
    """How long a head is, as far as what there is of it says."""
    if len(head) < 2:
        return 2
    extended = {126: 2, 127: 8}.get(head[1] & 0x7F, 0)
    return 2 + extended + (4 if head[1] & _MASKED else 0)
