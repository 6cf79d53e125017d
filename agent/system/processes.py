"""Processes that outlive their parent, and the signals by which they are told to end or to read again."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

if sys.platform == "win32":
    import subprocess

    # Ctrl-C and Ctrl-Break are all that a Windows program is told; the agent's own socket knows more.
    ENDING = (signal.SIGINT, signal.SIGBREAK)
    RELOADING: tuple[signal.Signals, ...] = ()

    def detached() -> dict[str, Any]:
        """Arguments of `subprocess.Popen` for a process that goes on without its parent and its console."""
        return {"creationflags": subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP}

else:
    ENDING = (signal.SIGTERM, signal.SIGINT)
    RELOADING = (signal.SIGHUP,)

    def detached() -> dict[str, Any]:
        """Arguments of `subprocess.Popen` for a process that goes on without its parent and its terminal."""
        return {"start_new_session": True}


def tell_to_end(pid: int) -> None:
    """Ask a process to end; on Windows this ends it at once. Raises OSError, `ProcessLookupError` if it is gone."""
    os.kill(pid, signal.SIGTERM)


def in_words(code: int | None) -> str:
    """How a process ended, by its exit code or (negative) signal; None: nobody can tell."""
    if code is None:
        return "how is not known"
    if code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
