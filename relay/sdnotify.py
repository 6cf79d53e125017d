"""Tell systemd how the service is doing (sd_notify(3)); without systemd this does nothing."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> None:
    """Send one state line such as ``READY=1`` to the socket systemd named. Raises OSError when it cannot be reached."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        # A name beginning with @ lives in the abstract namespace.
        sender.connect("\0" + address[1:] if address.startswith("@") else address)
        sender.sendall(state.encode())


def watchdog_interval() -> float | None:
    """Seconds between signs of life that systemd asks for, half of its patience; None when it asks for none."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    watched = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not microseconds.isdigit() or watched != str(os.getpid()):
        return None
    return int(microseconds) / 2_000_000
