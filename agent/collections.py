"""The collections as open folder trees: shared while they are used, and looked at before every use.

Nothing stays open between uses: an open folder would keep its owner from taking the disk out (EBUSY).

A root that has gone (an unmounted disk, a removed folder) makes its collection unavailable; it is never taken for an
empty folder. `Marks` remember across restarts which file system each root was on, because the empty mount point is
all there is to see when the agent starts before the disk is there; and which others were mounted below it, which
workers look after (`agent.storage.disks`).

Everything here blocks and belongs in threads; every method may be called from any thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from agent.config.keys import CollectionConfig
from agent.storage.unavailable import CollectionUnavailable, for_owner
from protocol.control import CollectionReport
from protocol.errors import NeedsPerson, TowpathError
from protocol.private_file import write_private_file

if TYPE_CHECKING:
    from agent.storage.base import Root
    from agent.storage.disks import Disk
    from agent.storage.mounts import Mark
    from agent.storage.posix import PosixRoot

logger = logging.getLogger("towpath.collections")

MARKS_FILE = "roots.json"


@dataclasses.dataclass(frozen=True)
class _Known:
    """A root as it was when it was last seen, and what was mounted below it then or before."""

    root: str
    mark: Mark
    disks: tuple[Disk, ...] = ()


class Marks:
    """Which file system each root was on when it was last seen, kept in the state directory."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._marks = _load_marks(path)

    def expected(self, config: CollectionConfig) -> Mark | None:
        """The mark of a root, or None if this collection was never opened with this root."""
        known = self._known(config)
        return None if known is None else known.mark

    def disks(self, config: CollectionConfig) -> tuple[Disk, ...]:
        """What is, or was, mounted below a root, as far as others see it: nobody comes to hidden folders that are not
        offered."""
        from agent.storage.hiding import is_hidden

        known = self._known(config)
        disks = () if known is None else known.disks
        return tuple(disk for disk in disks if config.hidden or not any(map(is_hidden, disk.path)))

    def keep(self, config: CollectionConfig, mark: Mark) -> None:
        """Remember a mark. Raises OSError when it cannot be written; it then counts until the agent ends."""
        known = self._known(config)
        if known is None:
            _warn_of(mark)
        self._change(config.id, _Known(config.root, mark, () if known is None else known.disks))

    def keep_disks(self, config: CollectionConfig, root: PosixRoot) -> None:
        """Remember what is mounted below a root whose mark is known. One that is known stays as it was, mounted or not,
        until the root is forgotten. Raises OSError."""
        from agent.storage.disks import MOST

        known = self._known(config)
        if known is None:
            return
        # Those without any marker are looked at again: there may be one by now.
        found = root.look_below({disk.path for disk in known.disks if disk.mark.marker}, place=not config.read_only)
        marks = {disk.path: disk.mark for disk in found}
        disks = [
            disk
            if marks.get(disk.path) is None or not _is_unmarked(disk.mark, marks[disk.path])
            else dataclasses.replace(disk, mark=marks[disk.path])
            for disk in known.disks
        ]
        before = {disk.path for disk in disks}
        new = [disk for disk in found if disk.path not in before]
        room = MOST - len(disks)
        if len(new) > room:
            logger.warning("More than %d disks are mounted below %s; only these are remembered.", MOST, config.root)
        for disk in new[:room]:
            _warn_of(disk.mark)
        self._change(config.id, dataclasses.replace(known, disks=(*disks, *new[:room])), known)

    def forget(self, collection_id: str) -> None:
        """Take the root, and what is mounted below it, as they are next time. Raises OSError."""
        self._change(collection_id, None)

    def _known(self, config: CollectionConfig) -> _Known | None:
        with self._lock:
            known = self._marks.get(config.id)
            return known if known is not None and known.root == config.root else None

    def _change(self, collection_id: str, entry: _Known | None, basis: _Known | None = None) -> None:
        """``basis`` is what the entry was made from: nothing that was forgotten meanwhile comes back."""
        with self._lock:
            before = self._marks.get(collection_id)
            if before == entry or (basis is not None and before != basis):
                return
            if entry is None:
                del self._marks[collection_id]
            else:
                self._marks[collection_id] = entry
            if self._path is not None:
                document = {key: _entry_of(known) for key, known in self._marks.items()}
                write_private_file(self._path, json.dumps(document, indent=2).encode() + b"\n")


def _warn_of(mark: Mark) -> None:
    """Say it where another disk would be taken for the one that is set up."""
    from agent.storage import mounts

    if mounts.is_alike(mark):
        logger.warning(
            "Another disk of type %s mounted at %s in place of the one that is there now would not be noticed: no "
            "marker can be kept on it, and neither the kernel nor udev tells its UUID here.",
            mark.file_system,
            mark.mount_point,
        )


def _is_unmarked(known: Mark, found: Mark) -> bool:
    """Whether a mark is what was known already, now with a marker."""
    return known == dataclasses.replace(found, marker="")


def _entry_of(known: _Known) -> dict[str, object]:
    entry: dict[str, object] = {"root": known.root, "mark": dataclasses.asdict(known.mark)}
    if known.disks:
        entry["disks"] = [
            {"path": b"/".join(disk.path).decode(), "mark": dataclasses.asdict(disk.mark)} for disk in known.disks
        ]
    return entry


def _load_marks(path: Path | None) -> dict[str, _Known]:
    from agent.storage.disks import Disk
    from agent.storage.mounts import Mark

    if path is None:
        return {}
    try:
        document = json.loads(path.read_bytes())
        return {
            key: _Known(
                str(entry["root"]),
                Mark(**entry["mark"]),
                tuple(
                    Disk(tuple(disk["path"].encode().split(b"/")), Mark(**disk["mark"]))
                    for disk in entry.get("disks", ())
                ),
            )
            for key, entry in document.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TowpathError(
            f"{path} cannot be read. If all disks are mounted as they should be, remove it and start again.", who="you"
        ) from error


class _Open:
    """A root and how many use it; closed by the last user."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self.users = 1


class Collections:
    """The roots of all collections, open while somebody uses them."""

    def __init__(self, marks: Marks, own: tuple[str, ...] = ()) -> None:
        self._marks = marks
        # Where the agent's own files are, which nobody comes to.
        self._own = own
        self._lock = threading.Lock()
        self._open: dict[tuple[str, str, bool], _Open] = {}

    @contextlib.contextmanager
    def using(self, config: CollectionConfig) -> Iterator[Root]:
        """The root of a collection, known to be there at the beginning of the block.

        Raises `NeedsPerson` with code COLLECTION_UNAVAILABLE.
        """
        try:
            entry = self._take(config)
        except OSError as error:
            sentence = f"The root of collection {config.name!r} cannot be used: {error.strerror}."
            raise CollectionUnavailable(sentence, owners=sentence, subject=config.id) from error
        try:
            yield entry.root
        finally:
            self._give_back(entry)

    def report(self, config: CollectionConfig) -> CollectionReport:
        """Look whether a collection can be used now. The reason is for the owner (`for_others`)."""
        try:
            with self.using(config):
                return report_of(config)
        except NeedsPerson as error:
            return report_of(config, for_owner(error))

    def accept(self, config: CollectionConfig) -> None:
        """The owner says that the root is right as it is now. Raises OSError or `NeedsPerson`."""
        self._marks.forget(config.id)
        with self._lock:
            self._open.pop((config.id, config.root, config.hidden), None)
        with self.using(config):
            pass

    def _take(self, config: CollectionConfig) -> _Open:
        key = (config.id, config.root, config.hidden)
        with self._lock:
            entry = self._open.get(key)
            if entry is not None:
                entry.users += 1
        if entry is not None:
            try:
                entry.root.check_present()
            except NeedsPerson:
                self._give_back(entry)
                self._drop(key, entry)
            except BaseException:
                self._give_back(entry)
                raise
            else:
                return entry
        # Opened outside the lock: one dead file server must not hold up the other collections.
        fresh = _Open(self._open_root(config))
        with self._lock:
            self._open[key] = fresh
        return fresh

    def _open_root(self, config: CollectionConfig) -> Root:
        from agent.storage.guarded import open_guarded
        from agent.storage.hiding import offered

        root = open_guarded(config.root, own=self._own)
        try:
            self._recognise(config, root)
            self._look_below(config, root)
        except BaseException:
            root.close()
            raise
        return offered(root, hidden=config.hidden)

    def _recognise(self, config: CollectionConfig, root: PosixRoot) -> None:
        from agent.storage import mounts

        expected, found = self._marks.expected(config), root.mark()
        if expected is None or expected == dataclasses.replace(found, marker=""):
            try:
                self._marks.keep(config, found if config.read_only else root.place_marker())
            except OSError as error:
                # It counts until the agent ends; a full disk of the agent is no fault of the collection's.
                logger.warning("The file system of %s could not be remembered: %s", config.name, error)
            return
        # A folder that was made anew in the same place is the owner's doing; another disk may be an accident. Before
        # something is deleted there, `Root.check_original` looks more closely.
        why, told = [mounts.difference(expected, found, strict=False, places=places) for places in (True, False)]
        if why:
            raise CollectionUnavailable(
                f"The root of collection {config.name!r} {told}; its owner mounts the disk, or accepts the root.",
                owners=f"The root of collection {config.name!r} {why}. Mount its disk; or, if it has moved for good, "
                f"run `towpath config accept-root {config.id}`.",
                subject=config.id,
            )

    def _look_below(self, config: CollectionConfig, root: PosixRoot) -> None:
        try:
            self._marks.keep_disks(config, root)
        except OSError as error:
            logger.warning("What is mounted below the root of %s could not be remembered: %s", config.name, error)

    def _give_back(self, entry: _Open) -> None:
        with self._lock:
            entry.users -= 1
            if entry.users == 0:
                for key in [key for key, other in self._open.items() if other is entry]:
                    del self._open[key]
                entry.root.close()

    def _drop(self, key: tuple[str, str, bool], entry: _Open) -> None:
        """Let nobody else use it; those who do close it."""
        with self._lock:
            if self._open.get(key) is entry:
                del self._open[key]


def report_of(config: CollectionConfig, reason: str = "") -> CollectionReport:
    """What there is to tell about a collection; ``reason`` says why it is unavailable, if it is."""
    return CollectionReport(
        id=config.id,
        name=config.name,
        read_only=config.read_only,
        shareable=config.shareable,
        available=not reason,
        default_directory=config.default_directory,
        home=config.home,
        reason=reason,
    )


def for_others(report: CollectionReport) -> CollectionReport:
    """A report as the relay gets it: where on this machine something is, is its owner's business."""
    if not report.reason:
        return report
    return msgspec.structs.replace(report, reason="It cannot be used now; its owner's agent says why.")
