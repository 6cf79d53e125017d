"""What the agent asks of the system once at its start: file handles, priority; and what kind of job it runs in."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Mapping

from agent.system.limits import raise_open_files

logger = logging.getLogger("towpath.agent")

# Lanes, sessions, roots and journals together; more is of no use.
WANTED_FILES = 16384
# The niceness on a machine that many people share.
SHARED_NICENESS = 10
# A variable that a batch system sets in its jobs, and the system's name.
_BATCH_SYSTEMS = {
    "SLURM_JOB_ID": "Slurm",
    "PBS_JOBID": "PBS",
    "LSB_JOBID": "LSF",
    "JOB_ID": "Grid Engine",
    "FLUX_JOB_ID": "Flux",
    "COBALT_JOBID": "Cobalt",
}


def raise_file_limit() -> int:
    """Raise the soft limit of open files towards the hard one; the limit that holds now."""
    return raise_open_files(WANTED_FILES)


def step_back() -> None:
    """Let everybody else's work go first: processor and, where the system can, disk. Worker processes inherit it."""
    import psutil

    process = psutil.Process()
    with contextlib.suppress(OSError, psutil.Error):
        if sys.platform == "win32":
            process.nice(psutil.BELOW_NORMAL_PRIORITY_CLASS)
        else:
            # Not added again by an agent that the last one has started (an update).
            os.nice(max(0, SHARED_NICENESS - os.nice(0)))
    if hasattr(process, "ionice") and hasattr(psutil, "IOPRIO_CLASS_IDLE"):
        with contextlib.suppress(OSError, psutil.Error):
            process.ionice(psutil.IOPRIO_CLASS_IDLE)


def batch_job(environment: Mapping[str, str] = os.environ) -> str:
    """The batch job this process is part of, such as ``Slurm job 4711``; empty outside of one."""
    for variable, system in _BATCH_SYSTEMS.items():
        number = environment.get(variable, "")
        if number[:1].isdigit():
            return f"{system} job {number[:64]}"
    return ""
