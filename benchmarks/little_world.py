"""A relay and two agents, alpha and beta, as people have them: what the demonstration starts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def little_world(directory: Path) -> Iterator[dict[str, Any]]:
    file = directory / "world.json"
    towpath = Path(sys.executable).with_name("towpath")
    process = subprocess.Popen(
        [towpath, "demo", "--keep", "--skip-transfer", "--json", file, "--directory", directory / "world"],
        stdout=subprocess.DEVNULL,
    )
    try:
        while not file.exists():
            if process.poll() is not None:
                raise SystemExit("The little world did not come up.")
            time.sleep(0.1)
        yield json.loads(file.read_text())
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
