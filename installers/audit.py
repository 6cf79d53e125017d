"""Asks whether anything that the agent and the relay need is known to be vulnerable (pip-audit).

    python installers/audit.py PIP-AUDIT [BILL]

Without a bill of materials: what is installed beside this Python for the project to run. Exit code 0: nothing known;
1: something is; 2: nobody could be asked, so nothing is known at all.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from packaging.requirements import Requirement  # noqa: E402 - as below

from installers.sbom import canonical, read_bill  # noqa: E402 - the project need not be installed


def installed(name: str, found: dict[str, str], extras: frozenset[str] = frozenset()) -> dict[str, str]:
    """Versions of a distribution and all that it needs here, by name."""
    try:
        metadata = distribution(name)
    except PackageNotFoundError:
        return found
    if canonical(name) in found and not extras:
        return found
    found[canonical(name)] = metadata.version
    for line in metadata.requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            installed(requirement.name, found, frozenset(requirement.extras))
    return found


def wanted(bill: Path | None) -> dict[str, str]:
    """What to ask about."""
    if bill is not None:
        return {row["name"]: row["version"] for row in read_bill(bill)["components"] if "purl" in row}
    return installed("towpath", {})


def findings(report: dict[str, Any]) -> list[str]:
    """One line for each vulnerability of a pip-audit report."""
    return [
        f"{row['name']} {row['version']}: {hole['id']}, mended in {', '.join(hole['fix_versions']) or 'no version yet'}"
        for row in report["dependencies"]
        for hole in row.get("vulns", [])
    ]


def main() -> int:
    """See the module."""
    program, bill = sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None
    versions = wanted(bill)
    versions.pop("towpath", None)
    with tempfile.TemporaryDirectory(prefix="towpath-audit-") as folder:
        asked, answer = Path(folder) / "requirements.txt", Path(folder) / "report.json"
        asked.write_text("".join(f"{name}=={version}\n" for name, version in sorted(versions.items())))
        command = [program, "-r", str(asked), "--no-deps", "--disable-pip", "-f", "json", "-o", str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            report = json.loads(answer.read_text())
        except (OSError, ValueError):
            said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            print(f"The databases of vulnerabilities cannot be asked, so NOTHING WAS AUDITED: {said[0][:300]}")
            return 2
    holes = findings(report)
    print("\n".join(holes))
    unknown = [row["name"] for row in report["dependencies"] if "skip_reason" in row]
    if unknown:
        print(f"NOT AUDITED, because the databases say nothing of {len(unknown)} of {len(versions)} libraries:")
        print(", ".join(unknown))
    if not holes and not unknown:
        print(f"Nothing is known against {len(versions)} libraries.")
    return 1 if holes else 2 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
