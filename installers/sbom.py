"""What is inside a bundle: a bill of materials (CycloneDX 1.5), and the same as a list that pip installs from again.

There is no serial number and no time in it: the same content gives the same bill.
"""

from __future__ import annotations

import hashlib
import json
import pyexpat
import re
import sqlite3
import ssl
import sys
import zlib
from collections.abc import Iterator, Mapping
from email.parser import HeaderParser
from pathlib import Path
from typing import Any


def bill_of_materials(folder: Path, packages: Path, version: str, hashes: Mapping[str, str]) -> dict[str, Any]:
    """The bill of a bundle; ``hashes`` are SHA-256 of the archives that its libraries were installed from, by name.

    What is linked into Python (OpenSSL, SQLite) is named by the versions that this Python reports: it is the one that
    was copied.
    """
    components = [*_python(), *_libraries(packages, hashes), *_shared(folder)]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {"type": "application", "name": "towpath", "version": version}},
        "components": components,
    }


def _python() -> Iterator[dict[str, Any]]:
    openssl = re.search(r"\d+(\.\d+)+[a-z]*", ssl.OPENSSL_VERSION)
    versions = {
        "openssl": openssl[0] if openssl else ssl.OPENSSL_VERSION,
        "sqlite": sqlite3.sqlite_version,
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
        "expat": pyexpat.EXPAT_VERSION.removeprefix("expat_"),
    }
    yield {"type": "application", "name": "cpython", "version": sys.version.split()[0]}
    for name, version in versions.items():
        yield {"type": "library", "name": name, "version": version}


def _libraries(packages: Path, hashes: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for metadata in sorted(packages.glob("*.dist-info")):
        headers = HeaderParser().parsestr((metadata / "METADATA").read_text("utf-8"))
        name, version = canonical(headers["Name"]), headers["Version"]
        if name == "towpath":
            continue
        component = {"type": "library", "name": name, "version": version, "purl": f"pkg:pypi/{name}@{version}"}
        if headers["License-Expression"]:
            component["licenses"] = [{"expression": headers["License-Expression"]}]
        if name in hashes:
            component["hashes"] = [{"alg": "SHA-256", "content": hashes[name]}]
        yield component


def _shared(folder: Path) -> Iterator[dict[str, Any]]:
    """Shared libraries of the building system that came along."""
    for path in sorted((folder / "lib").glob("*.so*")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        yield {"type": "file", "name": f"lib/{path.name}", "hashes": [{"alg": "SHA-256", "content": digest}]}


def canonical(name: str) -> str:
    """A distribution's name as indexes write it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def hashes_of_report(report: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of what pip installed, by name, from its installation report."""
    found = {}
    for item in report["install"]:
        archive = item["download_info"].get("archive_info") or {}
        digest = (archive.get("hashes") or {}).get("sha256")
        if digest:
            found[canonical(item["metadata"]["name"])] = digest
    return found


def requirements(bill: Mapping[str, Any]) -> str:
    """The libraries of a bill as a requirements file with hashes: pip installs these very archives or nothing.

    Raises ValueError for a library whose archive the bill does not know.
    """
    lines = []
    for component in bill["components"]:
        if "purl" not in component:
            continue
        if not component.get("hashes"):
            raise ValueError(f"The bill does not say which archive {component['name']} came from.")
        name, version, digest = component["name"], component["version"], component["hashes"][0]["content"]
        if not re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.!+_-]+ [0-9a-f]{64}", f"{name}=={version} {digest}"):
            raise ValueError(f"The bill is malformed at {name!r}.")
        lines.append(f"{name}=={version} --hash=sha256:{digest}")
    return "\n".join(lines) + "\n"


def read_bill(path: Path) -> dict[str, Any]:
    """A bill from its file. Raises OSError or ValueError."""
    document: dict[str, Any] = json.loads(path.read_text())
    if document.get("bomFormat") != "CycloneDX":
        raise ValueError(f"{path} is no bill of materials.")
    return document
