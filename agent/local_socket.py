"""The owner's private socket: where it is, who may connect, and a client for it.

A Unix socket with mode 0600 in a directory with mode 0700 of the same user; on top of that the kernel says which user
is at the other end. The address of a Unix socket is at most about 100 bytes long and network file systems carry none,
so where the state directory will not do the socket lies in the runtime directory, and ``local.socket`` in the state
directory says where.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agent.local_gate import LOOPBACK, LOOPBACK_FILE, UNIX_HOST, load_loopback
from agent.state_files import is_shared
from agent.system.accounts import own_number
from protocol.errors import TowpathError
from protocol.private_file import write_private_file

ADDRESS_FILE = "local.socket"
DIRECTORY = "control"
NAME = "agent.sock"
# sun_path holds 108 bytes on Linux and 104 elsewhere, the final null byte included.
MAX_ADDRESS = 103
MAX_ANSWER = 64 * 1024 * 1024


class NotRunning(TowpathError):
    """No agent answers on the local socket of this state directory."""

    default_code = "NOT_RUNNING"


class LocalRefused(TowpathError):
    """The agent answered, but not with success."""


def places(state_dir: Path, environment: Mapping[str, str] = os.environ) -> Iterator[Path]:
    """Where the socket may be, best place first: never first on a file system that other machines see."""
    beside = state_dir / DIRECTORY / NAME
    shared = is_shared(state_dir)
    if not shared:
        yield beside
    digest = hashlib.sha256(os.fsencode(state_dir.absolute())).hexdigest()[:16]
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/") and Path(runtime).is_dir():
        yield Path(runtime) / f"towpath-{digest}" / NAME
    yield Path(tempfile.gettempdir()) / f"towpath-{own_number()}-{digest}" / NAME
    if shared:
        yield beside


def listen(state_dir: Path) -> tuple[socket.socket, Path]:
    """Bind the socket and write down where it is. The caller holds the instance lock, so what is there is stale.

    Raises `TowpathError` if no place will do.
    """
    reasons = []
    for path in places(state_dir):
        if len(os.fsencode(path)) > MAX_ADDRESS:
            reasons.append(f"{path}: the path is too long for a socket")
            continue
        try:
            _private_directory(path.parent)
            listener = _bind(path)
        except OSError as error:
            reasons.append(f"{path}: {error.strerror or error}")
            continue
        write_private_file(state_dir / ADDRESS_FILE, os.fsencode(path.absolute()) + b"\n")
        return listener, path
    raise TowpathError("There is no place for the agent's local socket. " + "; ".join(reasons) + ".", who="you")


def _bind(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The directory is private already; between bind and chmod nobody else can reach the socket.
        listener.bind(os.fspath(path))
        path.chmod(0o600)
        listener.listen(16)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _private_directory(directory: Path) -> None:
    """Make the directory, or make sure that it is ours alone. Raises OSError."""
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        status = directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != own_number():
            raise PermissionError(1, "it is not a directory of this user") from None
        if status.st_mode & 0o077:
            directory.chmod(0o700)


def forget(state_dir: Path, path: Path) -> None:
    """Remove the socket, its directory, and the note of where it was. Raises OSError."""
    path.unlink(missing_ok=True)
    (state_dir / ADDRESS_FILE).unlink(missing_ok=True)
    # A directory of its own, perhaps in the folder for temporaries: nothing of an agent that is gone is left behind.
    with contextlib.suppress(OSError):
        path.parent.rmdir()


def peer_user(connection: socket.socket) -> int | None:
    """The user id at the other end as the kernel knows it; None where this system cannot say. Raises OSError."""
    user: int | None = None
    if sys.platform == "linux":
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        user = struct.unpack("3i", credentials)[1]
    elif sys.platform == "darwin":
        # struct xucred of sys/ucred.h: version, uid, number of groups; SOL_LOCAL 0, LOCAL_PEERCRED 1.
        credentials = connection.getsockopt(0, 1, 76)
        user = struct.unpack_from("=II", credentials)[1]
    return user


def is_allowed(user: int | None) -> bool:
    """Whether a user may control this agent: its own and root."""
    return user is None or user in (own_number(), 0)


# --- the client ----------------------------------------------------------------------------------------------


def address(state_dir: Path) -> Path:
    """Where the running agent listens. Raises `NotRunning`, also if the place is not this user's own."""
    try:
        path = Path(os.fsdecode((state_dir / ADDRESS_FILE).read_bytes()[:4096].strip()))
        status = path.parent.lstat()
    except OSError as error:
        raise _nobody(state_dir) from error
    # Somebody else's directory could hold somebody else's agent, which would learn what we ask.
    foreign = status.st_uid not in (own_number(), (state_dir / ADDRESS_FILE).stat().st_uid)
    if not stat.S_ISDIR(status.st_mode) or foreign or status.st_mode & 0o077:
        raise NotRunning(f"The socket directory {path.parent} is not private to this user; nothing was asked.")
    return path


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__(UNIX_HOST, timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Raises OSError."""
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            channel.settimeout(self.timeout)
            channel.connect(os.fspath(self._path))
        except BaseException:
            channel.close()
            raise
        self.sock = channel


def _nobody(state_dir: Path) -> NotRunning:
    return NotRunning(f"No agent runs here; `towpath start` starts it. (Its state is in {state_dir}.)")


def ask(state_dir: Path, method: str, path: str, *, timeout: float = 15.0) -> dict[str, Any]:
    """One request to the running agent; the JSON object of a 2xx answer. Blocks.

    Raises `NotRunning`, or `LocalRefused` with the agent's own sentence.
    """
    connection, headers = _connection(state_dir, timeout)
    try:
        with contextlib.closing(connection):
            connection.request(method, path, headers={"connection": "close", **headers})
            response = connection.getresponse()
            body = response.read(MAX_ANSWER + 1)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, ConnectionRefusedError | FileNotFoundError):
            # It was killed and could not take its address away.
            raise _nobody(state_dir) from error
        reason = str(error) or type(error).__name__
        raise NotRunning(f"No agent answers on {state_dir} ({reason}).") from error
    if len(body) > MAX_ANSWER:
        raise LocalRefused("The agent's answer is too large.")
    document = _object(body)
    if not 200 <= response.status < 300:
        raise LocalRefused(str(document.get("sentence") or f"The agent answered with status {response.status}."))
    return document


def _connection(state_dir: Path, timeout: float) -> tuple[http.client.HTTPConnection, dict[str, str]]:
    """The way to the running agent, not yet connected, and what has to be shown there. Raises `NotRunning`."""
    try:
        where = load_loopback(state_dir)
    except OSError as error:
        raise NotRunning(f"{state_dir / LOOPBACK_FILE} cannot be read ({error.strerror}).") from error
    if where is not None:
        return http.client.HTTPConnection(LOOPBACK, where.port, timeout=timeout), {
            "authorization": f"Bearer {where.token}"
        }
    return _Connection(address(state_dir), timeout), {}


def _object(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body) if body else {}
    except ValueError as error:
        raise LocalRefused("The agent's answer cannot be read.") from error
    return document if isinstance(document, dict) else {}
