"""What goes into a support bundle: enough to see what is wrong, and no secret, no file content, no list of files.

Everything passes one `Redactor` that knows the secrets of this machine by value.
"""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from agent.redaction import Redactor
from agent.system.files import BINARY, NOFOLLOW

MAX_LOG_TEXT = 4 * 1024 * 1024
MAX_SECRET_FILE = 1024 * 1024
# Where values that must not leave come from: the environment by name, files whole and by line.
_SECRET_WORDS = ("SECRET", "PASSWORD", "TOKEN", "SETUP_KEY", "PASSPHRASE", "API_KEY")
_LIBRARIES = (
    "towpath",
    "trio",
    "h2",
    "hypercorn",
    "starlette",
    "cryptography",
    "blake3",
    "msgspec",
    "pyyaml",
    "psutil",
)


def known_secrets(state_dir: Path, config_dir: Path, cache_dir: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """The secret values of this user's Towpath: keys, tokens and credentials, from where they are kept."""
    for name, value in environment.items():
        if any(word in name.upper() for word in _SECRET_WORDS):
            yield value
    for path in [*state_dir.glob("*.key"), state_dir / "local.loopback"]:
        yield from _lines_of(path)
    for path in (config_dir / "profiles").glob("*.json"):
        yield from _strings(_json(path), secret=False)
    for path in (cache_dir / "tokens").glob("*.sqlite"):
        yield from _values_of_database(path)


def _lines_of(path: Path) -> Iterator[str]:
    try:
        text = path.read_bytes()[:MAX_SECRET_FILE].decode("utf-8", "replace")
    except OSError:
        return
    yield text.strip()
    yield from (line.strip() for line in text.splitlines() if not line.startswith("-----"))
    yield from _strings(_parsed(text), secret=False)


def _json(path: Path) -> object:
    try:
        return _parsed(path.read_bytes()[:MAX_SECRET_FILE].decode("utf-8", "replace"))
    except OSError:
        return None


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _strings(value: object, *, secret: bool) -> Iterator[str]:
    """Strings of a document that stand under a key which names a secret."""
    if isinstance(value, str) and secret:
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            named = any(word in str(key).upper() for word in _SECRET_WORDS)
            yield from _strings(inner, secret=secret or named)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, secret=secret)


def _values_of_database(path: Path) -> Iterator[str]:
    try:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            for table in tables:
                for row in connection.execute(f'SELECT * FROM "{table}"'):  # noqa: S608 - names from the schema itself
                    for value in row:
                        if isinstance(value, str):
                            yield from _strings(_parsed(value), secret=False)
        finally:
            connection.close()
    except sqlite3.Error:
        return


def facts(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The machine and the program, as far as they matter."""
    import psutil

    return {
        "time": time.time(),
        "platform": platform.platform(),
        "python": sys.version,
        "executable": sys.executable,
        "processors": psutil.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "environment": {
            name: value
            for name, value in sorted(environment.items())
            if name.startswith(("TOWPATH_", "GLOBUS_", "XDG_", "LC_", "LANG", "SLURM_JOB", "PBS_JOB"))
            or name.lower() in ("https_proxy", "http_proxy", "no_proxy", "all_proxy")
        },
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def state_listing(state_dir: Path) -> list[dict[str, Any]]:
    """Names, sizes and modes in the state directory; no contents."""
    rows = []
    for path in sorted(state_dir.rglob("*"))[:5000]:
        try:
            status = path.lstat()
        except OSError:
            continue
        rows.append(
            {
                "name": str(path.relative_to(state_dir)),
                "mode": f"{status.st_mode:o}",
                "size": status.st_size,
                "modified": status.st_mtime,
            }
        )
    return rows


def write_bundle(target: Path, parts: Mapping[str, str | object], redactor: Redactor) -> list[str]:
    """Write the parts (texts, or documents that become JSON) into a ZIP file readable by its owner alone.

    The names of the parts, for people. Raises OSError; FileExistsError when the target is there already.
    """
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY | NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, part in parts.items():
            text = part if isinstance(part, str) else json.dumps(part, indent=2, default=str)
            bundle.writestr(name, redactor.clean(text))
    return list(parts)
