"""How numbers of bytes and spans of time are written for people, in commands and in the tray's menu."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def human_bytes(count: float) -> str:
    """A number of bytes in binary units with three figures: ``1.25 GiB``."""
    amount = float(count)
    for unit in _UNITS[:-1]:
        if abs(amount) < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.{_decimals(amount)}f} {unit}"
        amount /= 1024
    return f"{amount:.{_decimals(amount)}f} {_UNITS[-1]}"


def _decimals(amount: float) -> int:
    return 2 if abs(amount) < 10 else 1 if abs(amount) < 100 else 0


def human_seconds(seconds: float) -> str:
    """A span of time: ``42 s``, ``3 min 5 s``, ``2 h 10 min``, ``3 d 4 h``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
