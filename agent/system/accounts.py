"""Names of users and groups, and who this process belongs to."""

from __future__ import annotations

import sys

if sys.platform == "win32":

    def user_name(number: int) -> str:
        """Raises KeyError: Windows' users have no numbers."""
        raise KeyError(number)

    def group_name(number: int) -> str:
        """Raises KeyError, as `user_name`."""
        raise KeyError(number)

    def own_number() -> int:
        """0, as Python says of every file's owner there."""
        return 0

else:
    import grp
    import os
    import pwd

    def user_name(number: int) -> str:
        """The login name of a user. Raises KeyError."""
        return pwd.getpwuid(number).pw_name

    def group_name(number: int) -> str:
        """The name of a group. Raises KeyError."""
        return grp.getgrgid(number).gr_name

    def own_number() -> int:
        """The user this process acts for."""
        return os.geteuid()
