"""The demonstration itself: a relay, two agents, three crashes, and equal trees at the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_demonstration_succeeds_and_leaves_nothing_running(tmp_path: Path) -> None:
    towpath = Path(sys.executable).with_name("towpath")
    directory = tmp_path / "demo"
    result = subprocess.run(
        [towpath, "demo", "--directory", directory], capture_output=True, text=True, timeout=170, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(directory) not in listed
