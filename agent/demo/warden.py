"""The last resort against stray processes: ends the demonstration's children when the demonstration itself is gone.

Runs as a process of its own, ``python -m agent.demo.warden``, and reads lines: ``+N`` puts process group N under
guard, ``-N`` releases it. When its input ends, which also a SIGKILL to the demonstration brings about, it kills
every group still under guard.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress


def guarded_untrusted(lines: Iterable[bytes]) -> set[int]:
    """The groups that are under guard when the input ends. Lines that say nothing sensible are passed over."""
    groups: set[int] = set()
    for line in lines:
        sign, digits = line[:1], line[1:].strip()
        if not digits.isdigit() or len(digits) > 10:
            continue
        if sign == b"+":
            groups.add(int(digits))
        elif sign == b"-":
            groups.discard(int(digits))
    # 0 and 1 would mean our own group and everybody's.
    return groups - {0, 1, os.getpgid(0)}


def main() -> int:
    """Wait for the end of the input, then kill what is still under guard."""
    # Ctrl-C is meant for the demonstration, which then ends its children in good order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for group in guarded_untrusted(sys.stdin.buffer):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
