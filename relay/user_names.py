"""What users of this machine are called, for what operators read."""

from __future__ import annotations

import pwd


def user_name(number: int) -> str:
    """The login name of a user; the number where it has none, as in a container."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
