"""The project's side of updates: a TUF repository as plain files, which any web server or relay may serve.

The keys of ``root`` and ``targets`` are offline keys: they sign releases on the maintainers' machine and never lie on
a server. ``snapshot`` and ``timestamp`` say what is newest, and only for a short time, so that a mirror that stands
still is noticed. Every key is ECDSA on P-256, which every OpenSSL verifies: `install.sh` does so without Python.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

ROLES = ("root", "targets", "snapshot", "timestamp")
LIFE = {"root": 3650, "targets": 730, "snapshot": 60, "timestamp": 60}
PRETTY = JSONSerializer(compact=False)


@dataclass
class Keys:
    """The signers of every role. A role may have several, of which ``threshold`` have to sign."""

    signers: dict[str, list[CryptoSigner]] = field(default_factory=dict)
    threshold: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 1))

    @classmethod
    def generate(cls, counts: Mapping[str, int] | None = None) -> Keys:
        """New keys; ``counts`` says how many a role has (1)."""
        counts = counts or {}
        return cls({role: [CryptoSigner.generate_ecdsa() for _ in range(counts.get(role, 1))] for role in ROLES})

    def save(self, directory: Path) -> None:
        """One PEM file a key, readable by the owner alone."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for role, signers in self.signers.items():
            for number, signer in enumerate(signers):
                path = directory / f"{role}-{number}.pem"
                path.touch(0o600)
                path.write_bytes(signer.private_bytes)

    @classmethod
    def load(cls, directory: Path) -> Keys:
        """The keys that `save` wrote."""
        signers: dict[str, list[CryptoSigner]] = {role: [] for role in ROLES}
        for path in sorted(directory.glob("*-*.pem")):
            key = serialization.load_pem_private_key(path.read_bytes(), None)
            signers[path.stem.rpartition("-")[0]].append(CryptoSigner(key))
        return cls(signers)


class Repository:
    """A repository below a directory: ``metadata/`` and ``targets/``."""

    def __init__(self, directory: Path, keys: Keys, now: datetime | None = None) -> None:
        self.directory = directory
        self.keys = keys
        self.now = now or datetime.now(UTC).replace(microsecond=0)
        self.root = Root(consistent_snapshot=True)
        self.targets = Targets()
        self.snapshot = Snapshot()
        self.timestamp = Timestamp()

    @classmethod
    def open(cls, directory: Path, keys: Keys) -> Repository:
        """The repository as it was published last, or a new one."""
        made = cls(directory, keys)
        metadata = directory / "metadata"
        if not (metadata / "timestamp.json").exists():
            made.use_keys()
            return made
        made.timestamp = Metadata[Timestamp].from_file(str(metadata / "timestamp.json")).signed
        made.snapshot = (
            Metadata[Snapshot].from_file(str(metadata / f"{made.timestamp.snapshot_meta.version}.snapshot.json")).signed
        )
        made.targets = (
            Metadata[Targets]
            .from_file(str(metadata / f"{made.snapshot.meta['targets.json'].version}.targets.json"))
            .signed
        )
        newest = max(metadata.glob("*.root.json"), key=lambda path: int(path.name.split(".")[0]))
        made.root = Metadata[Root].from_file(str(newest)).signed
        return made

    def use_keys(self) -> None:
        """Name the present keys in the root."""
        for role in ROLES:
            signers = self.keys.signers[role]
            self.root.roles[role] = Role([signer.public_key.keyid for signer in signers], self.keys.threshold[role])
            for signer in signers:
                self.root.keys[signer.public_key.keyid] = signer.public_key

    def add(self, name: str, data: bytes) -> None:
        """Sign a file and put it where mirrors have it."""
        info = TargetFile.from_data(name, data, ["sha256", "sha512"])
        self.targets.targets[name] = info
        path = self.directory / "targets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f"{info.hashes['sha256']}.{path.name}").write_bytes(data)

    def add_release(self, bundle: Path, version: str, platform: str, channel: str = "stable", share: int = 100) -> None:
        """A bundle, and the channel's word that it is the newest for its platform."""
        name = f"bundles/towpath-{version}-{platform}.tar.gz"
        self.add(name, bundle.read_bytes())
        offer = {
            "version": version,
            "platform": platform,
            "channel": channel,
            "bundle": name,
            "share": share,
            "released": self.now.timestamp(),
        }
        self.add(f"channels/{channel}/{platform}.json", json.dumps(offer).encode())

    def publish(self, *, root: bool = False) -> None:
        """Write new versions of everything that changes with a release; ``root`` too when keys have changed."""
        metadata = self.directory / "metadata"
        metadata.mkdir(parents=True, exist_ok=True)
        if root or not (metadata / "1.root.json").exists():
            if (metadata / f"{self.root.version}.root.json").exists():
                self.root.version += 1
            self.write("root", self.root, f"{self.root.version}.root.json")
        first = not (metadata / "timestamp.json").exists()
        for signed in (self.targets, self.snapshot, self.timestamp):
            signed.version += 0 if first else 1
        self.write("targets", self.targets, f"{self.targets.version}.targets.json")
        self.snapshot.meta["targets.json"] = MetaFile(self.targets.version)
        self.write("snapshot", self.snapshot, f"{self.snapshot.version}.snapshot.json")
        self.timestamp.snapshot_meta = MetaFile(self.snapshot.version)
        self.write("timestamp", self.timestamp, "timestamp.json")

    def write(self, role: str, signed: Root | Targets | Snapshot | Timestamp, name: str) -> None:
        """Sign one piece of metadata with all keys of its role."""
        signed.expires = self.now + timedelta(days=LIFE[role])
        metadata = Metadata(signed)
        for signer in self.keys.signers[role]:
            metadata.sign(signer, append=True)
        metadata.to_file(str(self.directory / "metadata" / name), PRETTY)
