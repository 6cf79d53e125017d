"""A project that makes releases, a mirror of them, and a machine that was installed from one."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient.fetcher import FetcherInterface

from agent.config.keys import UpdateConfig
from agent.update.change import change
from agent.update.install import Installation
from agent.update.mirror import Mirror
from agent.update.offer import Offer, this_platform
from agent.update.service import fetch, look
from installers.repository import Keys, Repository
from protocol.errors import TowpathError

PLATFORM = this_platform()


class Web(FetcherInterface):
    """A mirror on this disk. ``twist`` may answer in its place."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.twist: Callable[[str], Iterator[bytes] | None] = lambda name: None
        self.asked: list[str] = []

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix("https://mirror.example/")
        self.asked.append(name)
        twisted = self.twist(name)
        if twisted is not None:
            return twisted
        try:
            return iter([(self.directory / name).read_bytes()])
        except FileNotFoundError:
            raise DownloadHTTPError("not found", 404) from None


def bundle(path: Path, version: str, *, platform: str = PLATFORM, script: str | None = None) -> Path:
    """A bundle whose program is a shell script that knows its version."""
    text = script if script is not None else f'#!/bin/sh\necho "towpath {version}"\n'
    files = {
        "bundle.json": (json.dumps({"version": version, "platform": platform}), 0o644),
        "bin/towpath": (text, 0o755),
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, (content, mode) in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            archive.addfile(info, io.BytesIO(content.encode()))
    return path


class World:
    """A project with keys and a repository, a mirror of it, and a machine with version 0.1.0."""

    def __init__(self, folder: Path, keys: Keys | None = None) -> None:
        self.folder = folder
        self.keys = keys or Keys.generate()
        self.repository = Repository.open(folder / "repository", self.keys)
        self.web = Web(folder / "repository")
        self.publish("0.1.0")
        self.root = (folder / "repository" / "metadata" / "1.root.json").read_bytes()
        self.installation = Installation(folder / "prefix")
        self.installation.unpack(bundle(folder / "first.tar.gz", "0.1.0"), "0.1.0", PLATFORM)
        self.installation.switch("0.1.0")

    def publish(self, version: str, *, share: int = 100, platform: str = PLATFORM, **options: Any) -> None:
        path = bundle(self.folder / f"{version}.tar.gz", version, platform=platform, **options)
        self.repository.add_release(path, version, PLATFORM, share=share)
        self.repository.publish()

    def mirror(self) -> Mirror:
        """As the agent asks it: anew each time, with what it believed before."""
        return Mirror(self.folder / "prefix" / "update", self.root, "https://mirror.example", self.web)

    def look(self) -> Offer | None:
        return look(self.installation, self.mirror(), UpdateConfig(), 1000.0)

    def fetch(self) -> Offer:
        mirror = self.mirror()
        offer = look(self.installation, mirror, UpdateConfig(), 1000.0)
        assert offer is not None
        fetch(self.installation, mirror, offer)
        return offer


class FakeAgent:
    """An agent that is well, unless a version is listed as broken; ``journal`` is what was done to it."""

    def __init__(self, installation: Installation, **broken: str) -> None:
        self.installation = installation
        self.broken = {name.replace("_", "."): how for name, how in broken.items()}
        self.version: str | None = installation.running()
        self.journal: list[str] = []

    def status(self) -> dict[str, Any] | None:
        if self.version is None:
            return None
        how = self.broken.get("v" + self.version)
        if how == "mute":
            return None
        return {"version": "0.0.9" if how == "wrong" else self.version, "link": {"connected": how != "unlinked"}}

    def stop(self) -> None:
        self.journal.append(f"stop {self.version}")
        if self.version is not None and self.broken.get("v" + self.version) == "stuck":
            raise TowpathError("It hangs.")
        self.version = None

    def start(self) -> None:
        version = self.installation.running()
        self.journal.append(f"start {version}")
        if self.broken.get("v" + version) == "dead":
            raise TowpathError("It does not start.")
        self.version = version


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


def changed(world: World, agent: FakeAgent) -> str:
    clock = Clock()
    return change(world.installation, "0.2.0", agent, sleep=clock.sleep, clock=clock)
