"""Tells the service manager how the agent is doing: the datagram protocol of sd_notify(3).

Does nothing where nobody listens. `towpath start` listens on such a socket too, so the agent has one way to say that
it is ready.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import MutableMapping

VARIABLE = "NOTIFY_SOCKET"
WATCHDOG = "WATCHDOG_USEC"
WATCHDOG_PID = "WATCHDOG_PID"
# Nobody listens there any more.
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ECONNREFUSED, errno.ECONNRESET}


class Notifier:
    """One socket to the listener named in the environment, or none."""

    def __init__(self, address: str | None, watchdog: float | None = None) -> None:
        # Seconds within which the service manager wants to hear from us again; None: it does not care.
        self.watchdog = watchdog
        self._address: str | bytes | None = None
        if address and address[0] in "/@":
            # A leading @ stands for the null byte of Linux's abstract names.
            self._address = b"\0" + os.fsencode(address[1:]) if address[0] == "@" else address

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ) -> Notifier:
        """Take the address out of the environment, so that worker processes do not speak for the agent."""
        address = environment.pop(VARIABLE, None)
        microseconds, pid = environment.pop(WATCHDOG, ""), environment.pop(WATCHDOG_PID, "")
        ours = microseconds.isdecimal() and pid in ("", str(os.getpid()))
        return cls(address, int(microseconds) / 1e6 if ours and int(microseconds) > 0 else None)

    def ready(self, sentence: str) -> None:
        """The agent serves now."""
        self._send(f"READY=1\nSTATUS={_one_line(sentence)}\nMAINPID={os.getpid()}")

    def status(self, sentence: str) -> None:
        """What the agent is doing, for `systemctl status`."""
        self._send(f"STATUS={_one_line(sentence)}")

    def alive(self) -> None:
        """The agent's loop turns; to be said at least once in `watchdog` seconds."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """The agent has begun to end."""
        self._send("STOPPING=1\nSTATUS=Stopping.")

    def _send(self, message: str) -> None:
        if self._address is None or sys.platform == "win32":
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
                channel.setblocking(False)
                channel.connect(self._address)
                channel.send(message.encode())
        except OSError as error:
            # The listener of `towpath start` is gone once it has heard READY; the agent does not need it any more. A
            # service manager that cannot be told now, for want of a descriptor or room, must not be silent for ever: it
            # would take the agent for hung.
            if error.errno in _GONE:
                self._address = None


def _one_line(sentence: str) -> str:
    return " ".join(sentence.split())[:500]
