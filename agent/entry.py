"""Where the ``towpath`` command begins: Ctrl-C ends it quietly also while it is still being loaded.

Little is imported here, since an interruption of that would still show Python's traceback.
"""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Entry point of the ``towpath`` command."""
    # Only where Ctrl-C would raise: whoever has it ignored (a shell's background, nohup) is not to be ended by it.
    raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if raises:
        # Nothing has begun, so there is nothing to say either; the shell sees 130 as ever.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from agent.cli.main import main as command

    try:
        if raises:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        command()
    except KeyboardInterrupt:
        sys.exit(130)
