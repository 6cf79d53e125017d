"""The records of a lane after its handshake, through memory: many of them for one system call.

OpenSSL on a socket takes two reads for each record it gets and a write for each it sends, and a record holds 16 KiB at
most. Here 256 KiB are read from the socket at once, and OpenSSL decrypts from there straight into the block's buffer;
what it encrypts goes into memory, and from there to the socket as much at a time. `docs/performance.md` has the
numbers. What is read ahead of the caller is no more than that.

pyOpenSSL has memory too, but copies in and out of it twice, and cannot be given another after the handshake, which is
best left to the socket. So its library is called past it; a pyOpenSSL with other names inside goes on with the socket.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from cryptography.hazmat.bindings.openssl.binding import Binding
from OpenSSL import SSL

# What one record holds at most (RFC 8446 section 5.1).
RECORD = 16 * 1024
# Bytes for one system call: 128 KiB and 512 KiB cost the same.
AT_ONCE = 256 * 1024
# What records add to so many bytes (22 for each), and an answer of TLS itself.
_AROUND = 1024
# Where pyOpenSSL has its OpenSSL from, and what is called there. The package offers what pyOpenSSL needs.
_OPENSSL = Binding()
_NEEDED = ["SSL_read", "SSL_write", "SSL_set_bio", "BIO_new", "BIO_s_mem", "BIO_new_mem_buf", "BIO_read"]
_NEEDED += ["BIO_get_mem_data", "BIO_set_mem_eof_return"]
LATE = "The peer of a lane did not answer in time."

Done = TypeVar("Done")


class Records(Protocol):
    """Content in, content out; for one thread. ``read`` counts records that were read, at most: it errs on the safe
    side where a record is read in pieces."""

    read: int

    def receive(self, view: memoryview, count: int) -> int:
        """Read up to ``count`` bytes into a view that has room for them, at least one; 0 at the end. Raises OSError,
        BlockingIOError where the socket does not block and nothing is here."""

    def send(self, data: bytes | memoryview) -> None:
        """Send all of it. Raises OSError."""


def records_of_connection(connection: SSL.Connection, sock: socket.socket) -> Records:
    """For a connection whose handshake is done. From now on nothing else may be done with it."""
    known = all(hasattr(connection, name) for name in ("_ssl", "_raise_ssl_error"))
    if known and all(hasattr(_OPENSSL.lib, name) for name in _NEEDED):
        return RecordsInMemory(connection, sock)
    return RecordsOnSocket(connection, sock)


class RecordsInMemory:
    """Records that pass through memory of ours."""

    def __init__(self, connection: SSL.Connection, sock: socket.socket) -> None:
        self.read = 0
        # It owns what is below, and says what went wrong.
        self._tls, self._fail = connection._ssl, connection._raise_ssl_error
        self._socket = sock
        self._library, ffi = _OPENSSL.lib, _OPENSSL.ffi
        self._pointer, self._null = ffi.from_buffer, ffi.NULL
        # What was read from the socket, which OpenSSL has as `_unread`. Memory that is never used here costs none.
        self._arrived = ffi.new("char[]", AT_ONCE)
        self._arriving = memoryview(ffi.buffer(self._arrived))
        # What OpenSSL has encrypted, and a part of it that is on its way to the socket, with what is left of that.
        self._encrypted = _made(self._library.BIO_new(self._library.BIO_s_mem()))
        self._leaving = ffi.new("char[]", AT_ONCE + _AROUND)
        self._leaves = memoryview(ffi.buffer(self._leaving))
        self._left = self._leaves[:0]
        # What ended the connection behind records that were still good.
        self._failed: OSError | None = None
        # The socket is OpenSSL's no more. It reads no further than a record, so all that has come is here or there.
        self._offer(0)

    def receive(self, view: memoryview, count: int) -> int:
        if self._failed is not None:
            raise self._failed
        # Let go of when it fails, too: the interpreter crashes where its collector finds a view, in the frames of an
        # error that somebody keeps, before what still points into that view.
        with self._pointer("char[]", view, True) as into:
            return self._decrypt(into, count)

    def _decrypt(self, into: Any, count: int) -> int:
        got, read, tls = 0, self._library.SSL_read, self._tls
        while got < count:
            piece = read(tls, into + got, count - got)
            if piece > 0:
                got += piece
                self.read += 1
                continue
            try:
                self._fail(tls, piece)
            except SSL.WantReadError:
                if got:
                    break
                if not self._fill():
                    return 0
            except SSL.ZeroReturnError:
                # Said again whenever it is asked.
                break
            except SSL.Error as error:
                self._failed = as_os_error(error)
                # The peer hears why, if it listens.
                with contextlib.suppress(OSError):
                    self._socket.setblocking(False)
                    self._flush()
                if got:
                    break
                raise self._failed from error
        return got

    def send(self, data: bytes | memoryview) -> None:
        with self._pointer("char[]", data) as content:
            self._encrypt(content, len(data))

    def _encrypt(self, content: Any, total: int) -> None:
        write, tls, done = self._library.SSL_write, self._tls, 0
        while done < total:
            # All of it or nothing (SSL_MODE_ENABLE_PARTIAL_WRITE is off), and memory takes all.
            wrote = write(tls, content + done, min(total - done, AT_ONCE))
            if wrote <= 0:
                try:
                    self._fail(tls, wrote)
                except SSL.Error as error:
                    raise as_os_error(error) from error
            done += wrote
            self._flush()

    def _fill(self) -> bool:
        """Have OpenSSL offered what comes next; False at the end."""
        if self._library.BIO_get_mem_data(self._unread, self._null):
            return True
        # It may want something said before, as new keys.
        self._flush()
        try:
            count = self._socket.recv_into(self._arriving)
        except TimeoutError:
            raise TimeoutError(LATE) from None
        if count:
            self._offer(count)
        return bool(count)

    def _offer(self, count: int) -> None:
        """Have OpenSSL read the first bytes of what arrived, where they are; then it wants more."""
        self._unread = _made(self._library.BIO_new_mem_buf(self._arrived, count))
        self._library.BIO_set_mem_eof_return(self._unread, -1)
        # Takes what is new over, and frees what it replaces.
        self._library.SSL_set_bio(self._tls, self._unread, self._encrypted)

    def _flush(self) -> None:
        """Send what is encrypted. What cannot be sent stays."""
        while self._left or self._more_leaves():
            self._left = self._left[self._socket.send(self._left) :]

    def _more_leaves(self) -> bool:
        count = self._library.BIO_read(self._encrypted, self._leaving, len(self._leaves))
        self._left = self._leaves[: max(0, count)]
        return bool(self._left)


class RecordsOnSocket:
    """Records as pyOpenSSL receives and sends them by itself, with two system calls for each and one."""

    def __init__(self, connection: SSL.Connection, sock: socket.socket) -> None:
        self.read = 0
        self._connection = connection
        self._socket = sock

    def receive(self, view: memoryview, count: int) -> int:
        try:
            got: int = patiently(self._socket, self._connection.recv_into, view, min(count, RECORD))
        except Ended:
            return 0
        self.read += 1
        return got

    def send(self, data: bytes | memoryview) -> None:
        patiently(self._socket, self._connection.send, data)


def patiently(sock: socket.socket, step: Callable[..., Done], *arguments: Any, deadline: float | None = None) -> Done:
    """Do one step of TLS on a socket, which wants it tried again when it is ready. Raises OSError, TimeoutError after
    the socket's time-out or at ``deadline``, BlockingIOError where it never blocks."""
    while True:
        try:
            return step(*arguments)
        except SSL.WantReadError:
            _wait(sock, selectors.EVENT_READ, deadline)
        except SSL.WantWriteError:
            _wait(sock, selectors.EVENT_WRITE, deadline)
        except SSL.Error as error:
            raise as_os_error(error) from error


def _wait(sock: socket.socket, event: int, deadline: float | None) -> None:
    patience = sock.gettimeout()
    if patience == 0:
        raise BlockingIOError
    if deadline is not None:
        patience = max(0.0, deadline - time.monotonic())
    with selectors.DefaultSelector() as selector:
        selector.register(sock, event)
        if not selector.select(patience):
            raise TimeoutError(LATE)


class Ended(ConnectionError):
    """There is nothing more to read."""


def as_os_error(error: SSL.Error) -> OSError:
    """What pyOpenSSL raised, as an error of the connection."""
    if isinstance(error, SSL.ZeroReturnError) or (isinstance(error, SSL.SysCallError) and error.args[0] == -1):
        return Ended("The peer of a lane ended the connection.")
    if isinstance(error, SSL.SysCallError):
        return OSError(*error.args)
    # A list of what went wrong in OpenSSL, each with library, function and reason.
    reasons = [reason[-1] for reason in error.args[0]] if error.args else []
    return ConnectionAbortedError(f"TLS of a lane failed: {', '.join(reasons) or 'no reason'}.")


def _made(made: Any) -> Any:
    if made == _OPENSSL.ffi.NULL:
        raise MemoryError
    return made
