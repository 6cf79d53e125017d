"""Bills of materials, and what is asked about them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from installers.audit import PROJECT, findings, installed
from installers.sbom import bill_of_materials, hashes_of_report, read_bill, requirements

DIGEST = "ab" * 32


def packages(folder: Path) -> Path:
    for name, version, more in (("Typing_Extensions", "4.1", "License-Expression: PSF-2.0\n"), ("towpath", "1", "")):
        metadata = folder / "packages" / f"{name}-{version}.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n{more}\nText\n")
    (folder / "lib").mkdir()
    (folder / "lib" / "libz.so.1").write_bytes(b"")
    return folder / "packages"


def test_a_bill_says_what_is_inside_and_always_the_same(tmp_path: Path) -> None:
    place = packages(tmp_path)
    bill = bill_of_materials(tmp_path, place, "1.0.0", {"typing-extensions": DIGEST})
    assert bill == bill_of_materials(tmp_path, place, "1.0.0", {"typing-extensions": DIGEST})
    rows = {row["name"]: row for row in bill["components"]}
    assert rows["typing-extensions"] == {
        "type": "library",
        "name": "typing-extensions",
        "version": "4.1",
        "purl": "pkg:pypi/typing-extensions@4.1",
        "licenses": [{"expression": "PSF-2.0"}],
        "hashes": [{"alg": "SHA-256", "content": DIGEST}],
    }
    assert rows["cpython"]["version"] == sys.version.split()[0]
    assert rows["openssl"]["version"][0].isdigit()
    assert rows["lib/libz.so.1"]["type"] == "file"
    assert "towpath" not in rows


def test_a_bill_is_installed_from_again_only_with_hashes(tmp_path: Path) -> None:
    place = packages(tmp_path)
    bill = bill_of_materials(tmp_path, place, "1.0.0", {"typing-extensions": DIGEST})
    assert requirements(bill) == f"typing-extensions==4.1 --hash=sha256:{DIGEST}\n"
    with pytest.raises(ValueError, match="typing-extensions"):
        requirements(bill_of_materials(tmp_path, place, "1.0.0", {}))
    evil = {"name": "x\n--index-url http://evil", "version": "1", "purl": "p", "hashes": [{"content": DIGEST}]}
    with pytest.raises(ValueError, match="malformed"):
        requirements({"components": [evil]})
    (tmp_path / "bill").write_text("{}")
    with pytest.raises(ValueError, match="no bill"):
        read_bill(tmp_path / "bill")


def test_hashes_come_from_pips_report() -> None:
    archive = {"url": "https://x/y.whl", "archive_info": {"hashes": {"sha256": DIGEST}}}
    local = {"url": "file:///x", "dir_info": {}}
    rows = [
        {"metadata": {"name": name}, "download_info": info} for name, info in (("H.11", archive), ("towpath", local))
    ]
    assert hashes_of_report({"install": rows}) == {"h-11": DIGEST}


def test_the_whole_of_what_is_needed_is_asked_about() -> None:
    names = installed("towpath", {})
    # Direct, by an extra (hypercorn[trio]), and of a dependency of a dependency.
    assert {"trio", "tuf", "securesystemslib", "sniffio"} <= names.keys()
    assert "pytest" not in names


AUDITOR = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
{answer}
"""
KNOWN = {"name": "click", "version": "8.1.0", "vulns": []}
HOLE = {"id": "CVE-1", "fix_versions": ["8.2"]}


@pytest.mark.parametrize(
    ("rows", "code", "words"),
    [
        ([KNOWN], 0, "Nothing is known against"),
        ([KNOWN | {"vulns": [HOLE]}], 1, "click 8.1.0: CVE-1, mended in 8.2"),
        ([{"name": "click", "skip_reason": "not found"}], 2, "NOT AUDITED"),
        (None, 2, "NOTHING WAS AUDITED: no route to the index"),
    ],
)
def test_silence_is_no_clean_bill(tmp_path: Path, rows: list[object] | None, code: int, words: str) -> None:
    report = json.dumps({"dependencies": rows})
    auditor = tmp_path / "pip-audit"
    answer = "echo no route to the index >&2; exit 1" if rows is None else f"echo '{report}' >\"$2\""
    auditor.write_text(AUDITOR.format(answer=answer))
    auditor.chmod(0o755)
    done = subprocess.run(
        [sys.executable, PROJECT / "installers" / "audit.py", auditor], capture_output=True, text=True, check=False
    )
    assert (done.returncode, words in done.stdout) == (code, True), done
    if rows is not None:
        assert findings({"dependencies": rows}) == ([done.stdout.splitlines()[0]] if code == 1 else [])
