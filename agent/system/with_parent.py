"""A process that ends with the one that forked it, whatever it is doing (Linux; prctl(2), PR_SET_PDEATHSIG)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> bool:
    """Have the system end this process (SIGKILL) when ``parent``, whose main thread forked it, is no more; also while
    it is stopped and could notice nothing itself. False where that is so already. Does nothing on other systems."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        return os.getppid() == parent
    else:  # noqa: RET505 - mypy takes what follows an `if` of the platform for unreachable
        return True
