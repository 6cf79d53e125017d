"""What the README tells people to set sends nothing of theirs to anybody but their relay."""

from __future__ import annotations

import subprocess
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
# What unmodified clients look for at Globus where nothing else is named, and send their tokens to.
SERVICES = ("AUTH", "TRANSFER", "GROUPS", "SEARCH", "TIMER", "FLOWS")


def test_the_environment_of_the_readme_names_the_relay_for_every_service() -> None:
    lines = README.read_text().splitlines()
    begin = next(at for at, line in enumerate(lines) if line.startswith("    export GLOBUS_SDK_SERVICE_URL_AUTH"))
    end = next(at for at, line in enumerate(lines) if line.startswith("    globus login"))
    script = "\n".join(line.strip() for line in lines[begin:end])
    told = subprocess.run(["sh", "-c", f"{script}\nenv"], env={}, capture_output=True, text=True, check=True).stdout
    named = dict(line.split("=", 1) for line in told.splitlines() if line.startswith("GLOBUS_SDK_SERVICE_URL_"))
    assert {name.removeprefix("GLOBUS_SDK_SERVICE_URL_") for name in named} == set(SERVICES)
    assert {address.rstrip("/") for address in named.values()} == {"https://relay.example.org:8443"}
