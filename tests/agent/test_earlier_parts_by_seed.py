"""Versions of one file that take turns, by seed: longer, shorter, with holes, with other rights and attributes, each as
it was when it is back. The task is killed, its power fails, and it meets faults anywhere, syncs among them of which
something is lost for good. Whatever happens, the file is one of them in the end, also on the disk."""

from __future__ import annotations

import errno
import os
import random
from contextlib import suppress
from pathlib import Path

import pytest

from agent.storage import page_cache
from agent.storage.base import Bytes
from agent.storage.faulty import Call, FaultyRoot
from agent.transfer.receiving import common_holes, large_files, reuse
from agent.transfer.settling import settle
from protocol.control import TaskObserved, TaskOptions
from tests.agent.engine_inside import Crashed, Engine, open_files, quick_path
from tests.slices import chosen_seeds

__all__ = ["quick_path"]

MIB = 1024 * 1024
PWRITE = os.pwrite
SIZES = [3 * MIB, 5 * MIB + 17, 8 * MIB, 8 * MIB + 1, 12 * MIB + 4096]
FAULTS = [errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.ENOSPC, errno.EBUSY]


class Disk:
    """What of a file is on the disk: what was there at its last sync. After a failed one the system takes what it could
    not write for written, and keeps it in memory only."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._synced: dict[int, bytes] = {}
        self._lost: dict[int, dict[int, bytes]] = {}

    def written(self, fd: int, data: Bytes, offset: int) -> int:
        """In place of `os.pwrite`: there is something to be synced again."""
        count = PWRITE(fd, data, offset)
        lost = self._lost.get(os.fstat(fd).st_ino, {})
        for start in range(offset // MIB * MIB, offset + count, MIB):
            lost.pop(start, None)
        return count

    def synced(self, fd: int) -> None:
        now, inode = _content(fd), os.fstat(fd).st_ino
        before = self._synced.get(inode, b"")
        content = bytearray(now)
        for offset in self._lost.get(inode, {}):
            end = min(offset + MIB, len(now))
            content[offset:end] = before[offset:end].ljust(max(0, end - offset), b"\0")
        self._synced[inode] = bytes(content)

    def failed(self, fd: int) -> None:
        now, inode = _content(fd), os.fstat(fd).st_ino
        before = self._synced.get(inode, b"")
        lost = self._lost.setdefault(inode, {})
        for offset in range(0, len(now), MIB):
            content = now[offset : offset + MIB]
            if content != before[offset : offset + MIB] and self._chance.random() < 0.7:
                lost[offset] = content

    def forget(self, fd: int, _offset: int = 0, _length: int = 0) -> None:
        """Memory forgets: what is lost shows."""
        inode = os.fstat(fd).st_ino
        before = self._synced.get(inode, b"")
        for offset, content in self._lost.pop(inode, {}).items():
            if os.pread(fd, MIB, offset) == content:
                PWRITE(fd, before[offset : offset + MIB].ljust(len(content), b"\0")[: len(content)], offset)

    def fail_power(self, part: Path) -> None:
        """Of what was not synced something is there, and something is not."""
        with part.open("r+b") as file:
            fd = file.fileno()
            self.forget(fd)
            now, before = _content(fd), self._synced.get(os.fstat(fd).st_ino, b"")
            size = self._chance.choice([len(now), len(before)])
            file.truncate(size)
            for offset in range(0, min(size, len(before)), MIB):
                if self._chance.random() < 0.5:
                    PWRITE(fd, before[offset : offset + MIB][: size - offset], offset)


def _content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def _mode(path: str) -> int:
    with suppress(FileNotFoundError):
        return os.stat(path).st_mode
    return 0


class Versions:
    """A folder of the source that is one of several; each file stays what it was."""

    def __init__(self, base: Path, chance: random.Random) -> None:
        self._base, self._mounted = base, -1
        (base / "source").rmdir()
        common = chance.randbytes(13 * MIB)
        self.bodies: list[bytes] = []
        self.modes: list[int] = []
        self.names: list[list[str]] = []
        for number in range(3):
            size = chance.choice(SIZES)
            body = bytearray(common[:size] if chance.random() < 0.5 else chance.randbytes(size))
            for _ in range(chance.randrange(3)):
                body[chance.randrange(size)] ^= 1
            path = base / f"source-{number}" / "file"
            path.parent.mkdir()
            with path.open("wb") as file:
                file.truncate(size)
                holes = chance.random() < 0.4
                for offset in range(0, size, MIB):
                    if holes and chance.random() < 0.7:
                        body[offset : offset + MIB] = bytes(len(body[offset : offset + MIB]))
                    else:
                        os.pwrite(file.fileno(), body[offset : offset + MIB], offset)
            if chance.random() < 0.3:
                with suppress(OSError):
                    os.setxattr(path, f"user.of-{number}", b"1")
            mode = chance.choice([0o644, 0o600, 0o444, 0o666])
            path.chmod(mode)
            if chance.random() < 0.3:
                os.link(path, path.with_name("second"))
            self.bodies.append(bytes(body))
            self.modes.append(mode)
            self.names.append(os.listxattr(path))
        # Of which there is one file only, so that it is known whose a temporary is.
        alone = [not (base / f"source-{number}" / "second").exists() for number in range(3)]
        self.private = {number for number, mode in enumerate(self.modes) if not mode & 0o077 and all(alone)}

    def mount(self, number: int) -> None:
        source = self._base / "source"
        if self._mounted >= 0:
            source.rename(self._base / f"source-{self._mounted}")
        (self._base / f"source-{number}").rename(source)
        self._mounted = number


class Scene:
    """One task over all these turns."""

    def __init__(self, base: Path, seed: int, patch: pytest.MonkeyPatch) -> None:
        self.random = random.Random(seed)
        chance = self.random
        self.disk = disk = Disk(random.Random(seed + 1))
        options = TaskOptions(
            verify_checksum=chance.random() < 0.5,
            preserve_timestamp=chance.random() < 0.5,
            preserve_xattrs=chance.random() < 0.5,
            preserve_hard_links=chance.random() < 0.5,
        )
        self.engine = Engine(base, options, processes=chance.randrange(2))
        self.versions = Versions(base, chance)
        self.left_open = 0
        self.readable: list[int] = []
        self._mounted = 0

        def fsync(root: FaultyRoot, fd: int) -> None:
            try:
                root.script.before("fsync")
            except OSError:
                disk.failed(fd)
                raise
            root.inner.fsync(fd)
            disk.synced(fd)

        patch.setattr(FaultyRoot, "fsync", fsync)
        patch.setattr(page_cache, "forget", disk.forget)
        patch.setattr(os, "pwrite", disk.written)
        # What has arrived is in the journal soon.
        patch.setattr(settle, "BATCH_BYTES", 2 * MIB)
        patch.setattr(reuse, "WORTH_ASKING", 2 * MIB)
        patch.setattr(large_files, "WORTH_ASKING", 4 * MIB)
        patch.setattr(common_holes, "WORTH_ASKING", 4 * MIB)

    def turn(self, number: int) -> None:
        """What happens in the next run."""
        self._mounted = self.random.randrange(3)
        self.versions.mount(self._mounted)
        chance = self.random
        last = chance.randrange(25, 60) if number < 10 else 1 << 60
        rate = chance.choice([0.0, 0.0, 0.02, 0.05]) if number < 10 else 0.0
        syncs = chance.choice([0.0, 0.3]) if number < 10 else 0.0
        refused = chance.random() < 0.4 and number < 10
        luck = random.Random(chance.random())

        def plan(call: Call) -> int | None:
            if call.number >= last:
                raise Crashed
            if call.operation == "pwrite" and self._mounted in self.versions.private:
                self.readable += [path for path in self.engine.temporaries() if _mode(path) & 0o077]
            if call.operation == "fsync" and luck.random() < syncs:
                return errno.EIO
            if refused and (call.operation, call.name) == ("rename", b"file") and luck.random() < 0.7:
                return luck.choice(FAULTS)
            if luck.random() < rate:
                return luck.choice(FAULTS)
            return None

        self.engine.plan = plan
        many = random.Random(chance.random())
        broken = chance.choice([0.0, 0.0, 0.1])
        self.engine.source_plan = lambda call: (
            errno.EIO if call.operation == "preadv" and many.random() < broken and number < 10 else None
        )

    async def run(self) -> TaskObserved:
        for number in range(40):
            self.turn(number)
            # Who is killed closes nothing, and goes on living here.
            self.left_open = len(open_files(self.engine.base))
            with suppress(Crashed):
                return await self.engine.run(60)
            if self.random.random() < 0.5:
                for part in self.engine.temporaries():
                    self.disk.fail_power(Path(part))
            self.engine = self.engine.revived()
        raise AssertionError("It never comes to its end.")


# Some of them saw a version that had become private come into a part that everybody could read.
ALWAYS = {0, 1, 2, 58, 112}
SEEDS = [pytest.param(seed, marks=() if seed in ALWAYS else pytest.mark.soak) for seed in chosen_seeds(range(400))]


@pytest.mark.parametrize("seed", SEEDS)
async def test_versions_that_take_turns(quick_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    scene = Scene(quick_path, seed, monkeypatch)
    observed = await scene.run()
    engine, versions = scene.engine, scene.versions
    assert not scene.readable, (seed, scene.readable)
    assert engine.temporaries() == [], seed
    assert len(open_files(quick_path)) <= scene.left_open, seed
    if observed.state != "SUCCEEDED":
        assert observed.counters.failed, (seed, observed)
        return
    for path in engine.destination.iterdir():
        body = path.read_bytes()
        names = os.listxattr(path)
        found = (body, path.stat().st_mode & 0o777, names)
        wanted = [
            (content, mode & 0o755, there if engine.options.preserve_xattrs else [])
            for content, mode, there in zip(versions.bodies, versions.modes, versions.names, strict=True)
        ]
        assert found in wanted, (seed, path.name, found[1:], [each[1:] for each in wanted])
        with path.open("r+b") as file:
            scene.disk.forget(file.fileno())
        assert path.read_bytes() == body, (seed, "on the disk")
