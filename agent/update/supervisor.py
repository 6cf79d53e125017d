"""Who runs this agent: a user's service manager, the system's, `towpath start`, or a person or job in the foreground.

Decides whether and how its version can be changed while it runs: whoever stops it must be able to start it as it was.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from protocol.errors import TowpathError

CGROUP_FILE = Path("/proc/self/cgroup")
_UNIT = re.compile(r"towpath-agent(@[^/]*)?\.service\Z")


# Set by `towpath start` for the agent it starts; launchd names its job in the other.
DETACHED = "TOWPATH_DETACHED"
LAUNCHD = "XPC_SERVICE_NAME"
LAUNCHD_JOB = "org.towpath.agent"


class NotReplaceable(TowpathError):
    """Nobody would start this agent again as it was: the owner has to change its version."""

    default_code = "NOT_REPLACEABLE"


def own_unit(cgroups: str) -> tuple[str, bool] | None:
    """The agent's unit from the text of ``/proc/self/cgroup``, and whether a user's service manager runs it; None
    outside of such a unit (a detached agent, a container, another supervisor).

    systemd.exec(5) promises no variable for this on all releases; where the process lies is certain.
    """
    for line in cgroups.splitlines():
        # hierarchy:controllers:path; systemd's own hierarchy is the unified one or the one it names.
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (number == "0" or controllers == "name=systemd") and _UNIT.search(path):
            return path.rsplit("/", 1)[-1], "/user@" in path
    return None


def check_changeable(file: Path = CGROUP_FILE, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a user's systemd runs this agent, so that a helper has to leave its unit first.

    Raises `NotReplaceable` where a stopped agent would not come back as it was.
    """
    try:
        unit = own_unit(file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        # Not Linux, or /proc is hidden: then no systemd runs it.
        unit = None
    if unit is not None and unit[1]:
        return True
    if unit is not None:
        raise NotReplaceable(
            f"The system's service manager runs this agent ({unit[0]}); whoever administers it installs the update "
            "with `towpath update install` while the service is stopped.",
            who="you",
        )
    if DETACHED not in environment and environment.get(LAUNCHD) != LAUNCHD_JOB:
        raise NotReplaceable(
            "This agent was started in the foreground, by a person or a job; end it, run `towpath update install`, "
            "and start it again.",
            who="you",
        )
    return False
