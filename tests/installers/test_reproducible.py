"""The same sources and libraries give the same bytes, so that anybody can check what was signed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from installers import build_bundle
from installers.sbom import read_bill

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


def members(bundle: Path) -> dict[str, str]:
    """Digests of what is in a bundle, by name."""
    digests = {}
    with tarfile.open(bundle) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            digests[member.name] = hashlib.sha256(
                content.read() if content else repr(member.linkname).encode()
            ).hexdigest()
    return digests


def test_a_bundle_built_again_from_its_bill_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "again").mkdir()
    first = build_bundle.build(tmp_path / "first", "0.1.0", None)
    bill = read_bill(first.with_name(first.name.replace(".tar.gz", ".sbom.json")))
    again = build_bundle.build(tmp_path / "again", "0.1.0", None, like=bill)
    a, b = members(first), members(again)
    assert sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name)) == []
    assert first.read_bytes() == again.read_bytes()


def test_a_wheel_built_again_is_the_same(tmp_path: Path) -> None:
    wheels = []
    for name in ("first", "again"):
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*command, "--wheel-dir", tmp_path / name, build_bundle.PROJECT], check=True)
        (wheel,) = (tmp_path / name).iterdir()
        wheels.append(wheel.read_bytes())
    assert wheels[0] == wheels[1]
