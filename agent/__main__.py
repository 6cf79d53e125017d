"""``python -m agent`` is the ``towpath`` command."""

from __future__ import annotations

from agent.entry import main

if __name__ == "__main__":
    main()
