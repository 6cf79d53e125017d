"""Make a relay: a directory with configuration, keys, certificate and database. Repeating it completes and keeps."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from protocol.private_file import write_private_file
from relay import keys, settings, tls
from relay.replacement import check_finished
from relay.settings import Settings
from relay.store.database import Store
from relay.store.migrate import upgrade

PORT = 8443
CONFIGURATION = "relay.yaml"


@dataclass(frozen=True)
class Initialised:
    """What `initialise` made or found."""

    configuration: Path
    settings: Settings
    configuration_was_there: bool


def initialise(directory: Path, *, host: str, port: int | None, url: str | None, name: str | None) -> Initialised:
    """Make what is missing in ``directory``; an existing configuration is left as it is and obeyed.

    Raises OSError, `SettingsError`, `KeysUnusable`, `CertificateUnusable`, what `check_finished` raises, and
    the store's errors.
    """
    check_finished(directory.resolve())
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    configuration = directory.resolve() / CONFIGURATION
    was_there = configuration.exists()
    if not was_there:
        text = _configuration_text(host, port or _port_of(url), url, name)
        settings.parse(text, "the options given")
        write_private_file(configuration, text.encode())
    loaded = settings.load(configuration)
    loaded.directory_path.mkdir(mode=0o700, parents=True, exist_ok=True)
    keys.create(loaded.directory_path / "keys", time.time(), loaded.tickets.key_life)
    if loaded.tls.certificate is None:
        tls.create(loaded, datetime.datetime.now(datetime.UTC))
    tls.ServerCertificate(loaded)
    store = Store(loaded.database_url)
    try:
        upgrade(store.writing_engine)
    finally:
        store.close()
    return Initialised(configuration, loaded, was_there)


def _port_of(url: str | None) -> int:
    """The port that an address names, else the usual one; what is wrong with the address is told by its own check."""
    with contextlib.suppress(ValueError):
        return urlsplit(url or "").port or PORT
    return PORT


def _configuration_text(host: str, port: int, url: str | None, name: str | None) -> str:
    lines = ["# What is not set here has its default; conf/relay.yaml explains every key.", ""]
    if name is not None:
        # JSON strings are YAML strings, whatever they contain.
        lines += [f"name: {json.dumps(name)}", ""]
    lines += ["listen:", f"  host: {json.dumps(host)}", f"  port: {port}"]
    if url is not None:
        lines.append(f"  url: {json.dumps(url)}")
    return "\n".join(lines) + "\n"
