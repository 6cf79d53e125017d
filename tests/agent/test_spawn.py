"""Forked processes end where their work ends, and never go on with what their parent does after it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from agent.transfer.processes.spawn import FORKS

pytestmark = pytest.mark.skipif(not FORKS, reason="processes are not forked on this system")

SCRIPT = """
import os, sys
from agent.transfer.processes.spawn import fork_into

def work(sock):
    {work}

try:
    process, sock = fork_into(work, lambda: None)
except BaseException as error:
    os.write(1, f"Back as {{error!r}}. ".encode())
    raise
print(process.wait())
"""


@pytest.mark.parametrize(
    ("work", "code", "errors"),
    [
        ("raise ValueError('a fault')", 1, ">/dev/full"),
        ("raise ValueError('a fault')", 1, ">&-"),
        ("pass", 0, ">/dev/full"),
        ("pass", 0, ">&-"),
    ],
)
def test_a_forked_process_ends_whatever_becomes_of_its_last_words(work: str, code: int, errors: str) -> None:
    """On a full disk it came back as a second agent, for which there seemed to be no process to be had."""
    # As agents are started by service managers: what is said is gathered first.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" 2{errors}', sys.executable, SCRIPT.format(work=work)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        env=environment,
    )
    assert done.stdout == f"{code}\n"
