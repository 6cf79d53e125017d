"""Checks of this machine: configuration, agent, state directory, collections. The network has its own."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from agent.config.exposure import exposures, unusable
from agent.config.keys import CollectionConfig
from agent.doctor.registry import Examination
from protocol import python_build
from protocol.findings import Finding

if TYPE_CHECKING:
    from agent.collections import Marks
    from agent.config.keys import AgentConfig

LOW_DISK = 256 * 1024 * 1024


def check_configuration(examination: Examination) -> Iterator[Finding]:
    """Whether the file can be read and is free of mistakes."""
    from agent.config.keys import ConfigError
    from agent.config.layers import load_config

    file = examination.config_file
    try:
        config = load_config(file)
    except ConfigError as error:
        for problem in error.problems:
            # Where there is no file there is no line either, and the sentence says what to do.
            advice = "Mend this line." if problem.line else ""
            yield Finding(level="failure", sentence=error.told(problem), advice=advice)
        return
    yield Finding(level="ok", sentence=f"{file} has no mistakes.")
    if config.relay.url is None:
        yield Finding(
            level="failure", sentence="This machine belongs to no relay yet.", advice="Run `towpath setup` with a key."
        )
    ca_file = config.relay.ca_file
    if ca_file is not None and not ca_file.is_file():
        yield Finding(
            level="failure",
            sentence=f"The relay's CA certificate {ca_file} is missing.",
            advice="Run `towpath setup` again.",
        )


def check_agent(examination: Examination) -> Iterator[Finding]:
    """Whether the agent runs, answers, and has what it needs."""
    from agent.lock import holder_of

    if examination.config is None:
        return
    status = examination.status
    if status is None:
        holder = holder_of(examination.config.state_dir)
        if holder is None:
            yield Finding(level="failure", sentence="The agent does not run.", advice="Run `towpath start`.")
        elif holder.host != socket.gethostname():
            yield Finding(
                level="note",
                sentence=f"The agent runs on host {holder.host} (process {holder.pid}), not here.",
                advice=f"Run this command on {holder.host}.",
            )
        else:
            yield Finding(
                level="failure",
                sentence=f"Process {holder.pid} holds the agent's lock but does not answer.",
                advice="Look at `towpath logs`; if it stays so, end the process and run `towpath start`.",
            )
        return
    yield Finding(level="ok", sentence=f"The agent runs as process {status['pid']}, version {status['version']}.")
    yield from python_build.findings()
    if status["paused"]:
        yield Finding(level="note", sentence="You have paused this machine.", advice="Run `towpath resume` to go on.")
    if status.get("draining"):
        sentence = "You have this machine finish what has begun, and nothing new begins."
        yield Finding(level="note", sentence=sentence, advice="Run `towpath resume` to take new transfers again.")
    link = status["link"]
    if link["connected"]:
        yield Finding(level="ok", sentence=f"It is linked to {link['relay_url']}.")
    else:
        yield Finding(
            level="failure",
            sentence=f"It is not linked to {link['relay_url']}: {link['last_error'] or 'it is still connecting'}",
            advice="Where this does not say what to do, the network checks below do.",
        )


def check_state(examination: Examination) -> Iterator[Finding]:
    """Whether the state directory is private, can be written, and has room."""
    from agent.state_files import file_system_of, is_shared

    if examination.config is None:
        return
    place = examination.config.state_dir
    try:
        status = place.stat()
    except OSError as error:
        yield Finding(
            level="failure", sentence=f"{place} cannot be used: {error.strerror}.", advice="Run `towpath setup`."
        )
        return
    yield from _kept(place)
    if status.st_mode & 0o077:
        yield Finding(
            level="failure", sentence=f"Other users can look into {place}.", advice=f"Run `chmod 700 {place}`."
        )
    if not os.access(place, os.W_OK | os.X_OK):
        yield Finding(level="failure", sentence=f"This user may not write in {place}.", advice="Mend its owner.")
    free = shutil.disk_usage(place).free
    if free < LOW_DISK:
        yield Finding(
            level="failure",
            sentence=f"Only {free // 2**20} MiB are free where the state is kept.",
            advice="Journals need room: free some, or move `state_dir`.",
        )
    if is_shared(place):
        yield Finding(
            level="note",
            sentence=f"The state is on a network file system ({file_system_of(place)}), which is slower and shared.",
            advice="Set `state_dir` to a local disk if the agent always runs on the same machine.",
        )
    yield Finding(level="ok", sentence=f"{place}: {free // 2**20} MiB free.")


def _kept(place: Path) -> Iterator[Finding]:
    """What the agent cannot start without, where it cannot be read."""
    from agent.collections import MARKS_FILE, Marks
    from agent.identity_file import load_identity, require
    from protocol.errors import TowpathError

    try:
        # Before set-up there is nothing to be damaged; the configuration's check says what to do.
        if load_identity(place) is not None:
            require(place)
    except TowpathError as error:
        advice = (
            "Where that is not to be had: have the agent revoked at the relay, move this directory away and set it up "
            "anew."
        )
        yield Finding(level="failure", sentence=error.sentence, advice=advice)
    try:
        Marks(place / MARKS_FILE)
    except TowpathError as error:
        advice = "Mount all disks before: every root is then taken as it is."
        yield Finding(level="failure", sentence=error.sentence, advice=advice)


def _marks(config: AgentConfig) -> Marks:
    """What the agent has kept of its roots; nothing where that cannot be read, which `check_state` tells."""
    from agent.collections import MARKS_FILE, Marks
    from protocol.errors import TowpathError

    try:
        return Marks(config.state_dir / MARKS_FILE)
    except TowpathError:
        return Marks(None)


def _another_disk(marks: Marks, collection: CollectionConfig) -> str:
    """A sentence if the root is there, but not on the disk it was set up on: an empty mount point."""
    from agent.storage import mounts, posix

    expected = marks.expected(collection)
    if expected is None or not os.path.isdir(collection.root) or not os.access(collection.root, os.R_OK | os.X_OK):
        return ""
    with posix.open_root(collection.root) as root:
        difference = mounts.difference(expected, root.mark(), strict=False)
    return f"The folder {collection.root} of {collection.name} {difference}." if difference else ""


def _disks_away(marks: Marks, collection: CollectionConfig) -> list[str]:
    """Folders below a root where disks were mounted that are away."""
    from agent.storage import posix
    from agent.storage.disks import DiskAway
    from protocol.names import format_path

    away = []
    disks = marks.disks(collection)
    if not disks:
        return []
    with posix.open_root(collection.root, disks=disks) as root:
        for disk in disks:
            try:
                root.open_directory(disk.path).close()
            except (DiskAway, FileNotFoundError):
                away.append(format_path(disk.path, directory=True))
            except OSError:
                # Something else is the matter with it; whoever uses it is told.
                continue
    return away


def _alike(marks: Marks, collection: CollectionConfig) -> list[str]:
    """Where disks are mounted that could not be told from others in their place."""
    from agent.storage import mounts

    expected = marks.expected(collection)
    known = [] if expected is None else [expected, *(disk.mark for disk in marks.disks(collection))]
    return [mark.mount_point for mark in known if mounts.is_alike(mark)]


def _finding_of_root(marks: Marks, collection: CollectionConfig) -> Finding:
    """The first thing that is the matter with a collection's root, or that nothing is."""
    root = Path(collection.root)
    if other := _another_disk(marks, collection):
        return Finding(level="failure", sentence=other, advice="Mount its disk.")
    if not root.is_dir():
        return Finding(
            level="failure",
            sentence=f"The folder {root} of {collection.name} is not there.",
            advice="Mount its disk, or make the folder.",
        )
    if not os.access(root, os.R_OK | os.X_OK):
        return Finding(
            level="failure",
            sentence=f"This user may not read {root} of {collection.name}.",
            advice="Mend its mode.",
        )
    if not collection.read_only and not os.access(root, os.W_OK):
        return Finding(
            level="warning",
            sentence=f"Nobody can write to {collection.name}, because this user may not write in {root}.",
            advice="Mend its mode, or set `access: read-only`.",
        )
    if away := _disks_away(marks, collection):
        return Finding(
            level="warning",
            sentence=f"In {collection.name}, the disks of these folders are not mounted: {', '.join(away)}.",
            advice="Mount them, or have them forgotten with `towpath config accept-root`; until then, tasks wait.",
        )
    return Finding(level="ok", sentence=f"{collection.name}: {root}")


def _missing_at_relay(examination: Examination) -> set[str]:
    """Ids of what the relay has told the running agent that it does not have."""
    rows = [] if examination.status is None else examination.status["collections"]
    return {row["id"] for row in rows if row.get("missing")}


def check_collections(examination: Examination) -> Iterator[Finding]:
    """Whether every root is there, and none gives away the agent's own files."""
    if examination.config is None:
        return
    marks = _marks(examination.config)
    missing = _missing_at_relay(examination)
    for collection in examination.config.collections:
        yield _finding_of_root(marks, collection)
        if collection.id in missing:
            yield Finding(
                level="failure",
                sentence=f"The relay does not have {collection.name} any more: nobody can use it.",
                advice="It was deleted there, another machine serves it, or the relay was restored from a backup older "
                "than it: then ask its operator first, who may have a newer one. Take it out of the configuration with "
                f"`towpath collection remove {collection.id}`, or offer the folder anew with `towpath collection add`.",
            )
        for place in _alike(marks, collection):
            yield Finding(
                level="note",
                sentence=f"Another disk mounted at {place} would be taken for the one of {collection.name}: no marker "
                "can be kept on it, and neither the kernel nor udev tells its UUID here.",
                advice="Mount no other disk there, or offer folders on ext4, XFS or Btrfs.",
            )
    for _, sentence in exposures(examination.config, examination.config_file):
        yield Finding(level="note", sentence=sentence)
    for collection, sentence in unusable(examination.config):
        yield Finding(
            level="failure",
            sentence=sentence,
            advice=f"Name one with `towpath collection update {collection.id} --root`.",
        )
    if not examination.config.collections:
        yield Finding(
            level="warning",
            sentence="This machine offers no collection.",
            advice="Run `towpath collection add FOLDER`.",
        )
