"""What can be wrong with a relay, looked at from its machine while it runs or not. Nothing is changed.

Each check yields findings and raises nothing for what it looks at; `examine` runs all that make sense.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import shutil
import socket
import sqlite3
import ssl
import stat
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from protocol import python_build
from protocol.errors import TowpathError
from protocol.findings import AUTHORITY_WARNING, Finding, Level
from relay.keys import RelayKeys
from relay.lock import LOCK, holder_of
from relay.replacement import check_finished
from relay.settings import Settings, load
from relay.store.migrate import newest_revision
from relay.tls import (
    CERTIFICATE_WARNING,
    authority_of,
    ca_certificate_pem,
    certificate_paths,
    names_of,
    read_certificate,
    tls_directory,
)
from relay.user_names import user_name

DAY = 86400.0
# Free bytes where the database is: below the first it will soon be full, below the second it as good as is.
LITTLE_DISK, NO_DISK = 2 << 30, 256 << 20
# How long a server may take to answer (seconds).
PATIENCE = 10.0
# Descriptors that are no connections: database, logs, listening sockets, processes.
_OTHER_FILES = 200
ONLY_HERE = "Only this machine reaches that address; agents and people elsewhere need one with a name that leads here."
_CLOCK_UNKNOWN = Finding(
    "note", "Whether something keeps the clock right cannot be told here: agents refuse tickets that are minutes off."
)


def examine(configuration: Path, now: float) -> Iterator[tuple[str, list[Finding]]]:
    """Titles with findings. ``now`` is Unix seconds."""
    try:
        check_finished(configuration.absolute().parent)
        settings = load(configuration)
    except TowpathError as error:
        yield "Configuration", [Finding("failure", error.sentence, "Mend it; the relay does not start like this.")]
        return
    yield "Configuration", list(check_configuration(settings, configuration))
    yield "Files", list(check_files(settings))
    yield "Database", list(check_database(settings))
    yield "Keys", list(check_keys(settings, now))
    yield "Certificate", list(check_certificate(settings, now))
    yield "Clock", list(check_clock())
    yield "Process", list(check_process(settings))
    yield "Address", list(check_address(settings))


def check_configuration(settings: Settings, configuration: Path) -> Iterator[Finding]:
    """Whether the files are there that the configuration names."""
    here = settings.directory_path
    named = {"updates": settings.updates, "tls.certificate": settings.tls.certificate, "tls.key": settings.tls.key}
    for provider in settings.sign_in.providers:
        named[f"client_secret_file of {provider.id}"] = provider.client_secret_file
        named[f"ca_file of {provider.id}"] = provider.ca_file
    missing = [f"{key}: {here / name}" for key, name in named.items() if name and not (here / name).exists()]
    for one in missing:
        yield Finding("failure", f"{one} is not there.", f"Put it there, or change {configuration}.")
    if not missing:
        yield Finding("ok", f"{configuration} is in order; the address is {settings.public_url}.")


def check_files(settings: Settings) -> Iterator[Finding]:
    """Whether others can read the relay's secrets, and whether its files all belong to one user."""
    here = settings.directory_path
    try:
        owner = here.stat().st_uid
    except OSError as error:
        yield Finding("failure", f"{here}: {error.strerror}.", "See `directory` in the configuration.")
        return
    secrets = [here / settings.database.file, here / LOCK, *(here / "keys").glob("*")]
    secrets += [path for path in tls_directory(settings).glob("*") if path.name != "ca.pem"]
    # What lies in a folder that nobody else may enter is nobody else's to read.
    sheltered = not here.stat().st_mode & 0o077
    fine = True
    for path in secrets:
        with contextlib.suppress(OSError):
            status = path.stat()
            if status.st_mode & 0o077 and not sheltered:
                fine = False
                advice = f"Run `chmod go= {path}`; if others had an account here, renew what is in it."
                yield Finding("failure", f"Other users can read {path} ({stat.filemode(status.st_mode)}).", advice)
            if status.st_uid != owner:
                fine = False
                names = user_name(status.st_uid), user_name(owner)
                advice = f"Run `chown -R {names[1]} {here}`, or the relay cannot read it."
                yield Finding("failure", f"{path} belongs to user {names[0]}, {here} to {names[1]}.", advice)
    if fine:
        yield Finding("ok", f"Only the user {user_name(owner)} can read the secrets in {here}.")
    free = shutil.disk_usage(here).free
    level: Level = "failure" if free < NO_DISK else "warning" if free < LITTLE_DISK else "ok"
    yield Finding(level, f"{free >> 20} MiB are free in {here}.", "" if level == "ok" else "Free some, or move it.")


def check_database(settings: Settings) -> Iterator[Finding]:
    """Whether the database is there, whole, and of this version."""
    file = settings.directory_path / settings.database.file
    if not file.exists() or not file.stat().st_size:
        yield Finding("failure", f"There is no database {file}.", "Mount its disk, or restore a backup.")
        return
    # Nobody has it open where no log is beside it, and then SQLite need not make one.
    how = "mode=ro" if file.with_name(file.name + "-wal").exists() else "mode=ro&immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(f"file:{file}?{how}", uri=True, timeout=PATIENCE)) as connection:
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone() or ("none",)
    except sqlite3.Error as error:
        busy = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
        level: Level = "warning" if busy else "failure"
        advice = "Stop the relay and restore a backup (`restore --force`)." if level == "failure" else "Try again."
        yield Finding(level, f"{file} cannot be read: {error}.", advice)
        return
    if verdict != "ok":
        yield Finding("failure", f"{file} is damaged: {verdict}.", "Stop the relay and restore a backup.")
    elif revision > newest_revision():
        yield Finding("failure", f"{file} is of a newer version ({revision}).", "Install that, or restore a backup.")
    else:
        later = "" if revision == newest_revision() else "; it is brought up to date at the next start"
        yield Finding("ok", f"{file} is whole ({file.stat().st_size >> 20} MiB, revision {revision}{later}).")


def check_keys(settings: Settings, now: float) -> Iterator[Finding]:
    """Whether the keys can be used, and the ticket key lasts or renews itself."""
    try:
        state = RelayKeys(settings.directory_path / "keys").statistics()
    except (TowpathError, ValueError) as error:
        sentence = error.sentence if isinstance(error, TowpathError) else f"A key cannot be used: {error}."
        yield Finding("failure", sentence, "Restore the folder `keys` from a backup.")
        return
    until = _date(state.ticket_key_expires)
    renew = "Run `towpath-relay root certify --root FILE` with the root key."
    if state.ticket_key_expires <= now:
        yield Finding("failure", f"The ticket key has ended ({until}): no transfer begins.", renew)
    elif not state.root_present and state.ticket_key_expires - now < settings.tickets.key_life / 3:
        yield Finding("warning", f"The ticket key ends on {until} and the root key is not here.", renew)
    else:
        how = "renews itself" if state.root_present else "is renewed by hand, since the root key is not here"
        yield Finding("ok", f"The ticket key lasts until {until} and {how}.")


def check_certificate(settings: Settings, now: float) -> Iterator[Finding]:
    """Whether the certificate is in date, good for the relay's name, and fits its key."""
    chain, key = certificate_paths(settings)
    try:
        leaf = read_certificate(chain)
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, key)
    except TowpathError as error:
        yield Finding("failure", error.sentence, "Restore it, or give another one in `tls`.")
        return
    except (OSError, ssl.SSLError) as error:
        yield Finding("failure", f"{chain} and its key cannot be used: {error}.", "Put a pair there that fits.")
        return
    own = settings.tls.certificate is None
    left = (leaf.not_valid_after_utc.timestamp() - now) / DAY
    until = _date(leaf.not_valid_after_utc.timestamp())
    advice = "Start the relay, which renews it." if own else "Renew it; the relay takes the new file up by itself."
    if left <= 0:
        yield Finding("failure", f"The certificate has ended ({until}): nobody can connect.", advice)
    elif left < CERTIFICATE_WARNING:
        yield Finding("warning", f"The certificate ends on {until}.", advice)
    else:
        yield Finding("ok", f"The certificate lasts until {until}" + (" and renews itself." if own else "."))
    host = (urlsplit(settings.public_url).hostname or "").lower()
    names = names_of(leaf)
    if host not in names and f"*.{host.partition('.')[2]}" not in names:
        shown = ", ".join(sorted(names)[:10])
        yield Finding("failure", f"It is not good for {host}, the name in listen.url, but for {shown}.", advice)
    if own:
        yield from _check_authority(settings, now)


def _check_authority(settings: Settings, now: float) -> Iterator[Finding]:
    try:
        ends = authority_of(settings).not_valid_after_utc.timestamp()
    except TowpathError as error:
        yield Finding("failure", error.sentence, "Restore it from a backup.")
        return
    sentence = f"The relay's own authority {'ended' if ends <= now else 'ends'} on {_date(ends)}"
    advice = "Run `towpath-relay authority renew`, then give its new certificate to agents and clients"
    if ends <= now:
        yield Finding("failure", f"{sentence}: nobody who trusts it can connect.", f"{advice} at once.")
    elif ends - now < AUTHORITY_WARNING * DAY:
        yield Finding(
            "warning", f"{sentence}; agents and clients trust it by file.", f"{advice} until then (docs/operating.md)."
        )


def check_clock(
    command: Sequence[str] = ("timedatectl", "show", "--property=NTPSynchronized", "--value"),
) -> Iterator[Finding]:
    """Whether something keeps the clock right, where systemd can tell. Tickets and tokens count by it."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired):
        yield _CLOCK_UNKNOWN
        return
    if done.stdout.strip() == "yes":
        yield Finding("ok", "The clock is kept right.")
    elif done.stdout.strip() == "no":
        advice = "Run chrony or systemd-timesyncd: agents refuse tickets of a relay whose clock is minutes off."
        yield Finding("warning", "Nothing keeps the clock right.", advice)
    else:
        yield _CLOCK_UNKNOWN


def check_process(settings: Settings) -> Iterator[Finding]:
    """Whether a relay runs here, and may open as many files as it may have connections."""
    holder = holder_of(settings.directory_path)
    if holder is None:
        yield Finding("failure", "No relay runs here.", "Start it: `systemctl start towpath-relay`, or `serve`.")
        return
    yield Finding("ok", f"The relay runs as process {holder or 'unknown'}.")
    yield from python_build.findings()
    with contextlib.suppress(OSError, ValueError, StopIteration):
        limits = Path(f"/proc/{int(holder)}/limits").read_text(encoding="utf-8").splitlines()
        most = next(line for line in limits if line.startswith("Max open files")).split()[3]
        wanted = settings.limits.connections + 2 * settings.tunnel.connections + _OTHER_FILES
        if most.isdigit() and int(most) < wanted:
            yield Finding(
                "warning",
                f"It may have {most} open files, and limits.connections and tunnel.connections ask for {wanted}.",
                "Raise LimitNOFILE of its unit (or `ulimit -n`), or lower the two.",
            )


def check_address(settings: Settings) -> Iterator[Finding]:
    """Whether this relay is what answers at the address that users and agents are given."""
    parts = urlsplit(settings.public_url)
    host, port = parts.hostname or "localhost", parts.port or 443
    try:
        found = sorted({str(row[4][0]) for row in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except OSError as error:
        yield Finding("failure", f"The name {host} has no address: {error.strerror or error}.", "Mend the DNS entry.")
        return
    try:
        relay_id = _who_answers(settings, host, port)
    except ssl.SSLCertVerificationError as error:
        advice = "Another server or a proxy has the address, or the certificate is not this relay's."
        yield Finding("failure", f"{settings.public_url} shows a wrong certificate: {error.verify_message}.", advice)
    except TowpathError as error:
        yield Finding("failure", f"It was not asked for: {error.sentence}", "Mend the certificate first.")
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        advice = "Is the relay running, the port open in the firewall, and the name this machine's or its proxy's?"
        yield Finding("failure", f"Nobody answers at {settings.public_url} ({', '.join(found)}): {reason}.", advice)
    else:
        mine = ""
        # What is wrong with the keys is told where they are looked at.
        with contextlib.suppress(OSError, ValueError):
            mine = (settings.directory_path / "keys" / "relay-id").read_text(encoding="utf-8").strip()
        if not mine:
            sentence = f"A relay answers at {settings.public_url}; whether this one, nobody can tell."
            yield Finding("warning", sentence, "Restore the folder `keys` from a backup.")
        elif relay_id == mine:
            yield Finding("ok", f"{settings.public_url} ({', '.join(found)}) is this relay.")
            if names_this_machine(host):
                yield Finding("note", ONLY_HERE, "See docs/operating.md about another name.")
        else:
            yield Finding("failure", f"Another relay ({relay_id}) answers at {settings.public_url}.", "See the DNS.")


def names_this_machine(host: str) -> bool:
    """Whether a host is each machine itself, so that nobody elsewhere gets here by it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _who_answers(settings: Settings, host: str, port: int) -> str:
    context = ssl.create_default_context(cadata=ca_certificate_pem(settings))
    connection = http.client.HTTPSConnection(host, port, timeout=PATIENCE, context=context)
    try:
        connection.request("GET", "/towpath/v1/relay")
        document = json.loads(connection.getresponse().read(1 << 20))
    finally:
        connection.close()
    if not isinstance(document, dict) or not isinstance(document.get("relay_id"), str):
        raise ValueError("it is no relay")
    return str(document["relay_id"])[:64]


def _date(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M} UTC"
