"""Makes releases: keys once, then a repository of plain files that relays and web servers copy.

    python installers/release.py init --keys KEYS --repository SITE
    python installers/release.py add --keys KEYS --repository SITE BUNDLE…   [--channel stable] [--share 100]
    python installers/release.py renew --keys KEYS --repository SITE

``init`` belongs on a machine that is offline otherwise; KEYS never go where SITE is served.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tarfile
from datetime import timedelta
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from installers.repository import LIFE, Keys, Repository  # noqa: E402 - the project need not be installed


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Make releases.")
    parser.add_argument("action", choices=["init", "add", "renew"])
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--keys", type=Path, required=True)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--channel", default="stable")
    parser.add_argument("--share", type=int, default=100, help="percentage of agents that take it by themselves")
    options = parser.parse_args()
    if options.action == "init":
        Keys.generate().save(options.keys)
    keys = Keys.load(options.keys)
    repository = Repository.open(options.repository, keys)
    for bundle in options.bundles:
        add(repository, keys, bundle, options.channel, options.share)
    repository.publish()
    print(f"{options.repository}: timestamp {repository.timestamp.version}")


def add(repository: Repository, keys: Keys, bundle: Path, channel: str = "stable", share: int = 100) -> None:
    """A bundle as update and as what `install.sh` installs."""
    with tarfile.open(bundle) as archive:
        member = archive.extractfile("bundle.json")
        assert member is not None
        info = json.loads(member.read())
    version, platform = info["version"], info["platform"]
    repository.add_release(bundle, version, platform, channel, share)
    if channel != "stable":
        return
    folder = repository.directory / "install"
    folder.mkdir(parents=True, exist_ok=True)
    script = render(keys)
    (folder / "install.sh").write_bytes(script)
    if platform.startswith("windows-"):
        (folder / f"install-{platform}.ps1").write_bytes(render_windows(keys, platform))
    digest = hashlib.sha256(bundle.read_bytes()).hexdigest()
    manifest = (
        f"version: {version}\nplatform: {platform}\nlength: {bundle.stat().st_size}\nsha256: {digest}\n"
        f"bundle: bundles/{digest}.towpath-{version}-{platform}.tar.gz\n"
        f"script: {hashlib.sha256(script).hexdigest()}\n"
        f"expires: {int((repository.now + timedelta(days=LIFE['targets'])).timestamp())}\n"
    ).encode()
    (folder / f"{platform}.manifest").write_bytes(manifest)
    (folder / f"{platform}.manifest.sig").write_bytes(sign(keys, manifest))


def sign(keys: Keys, data: bytes) -> bytes:
    """A signature that `openssl dgst -sha256 -verify` takes, by the offline key that signs releases."""
    key = serialization.load_pem_private_key(keys.signers["targets"][0].private_bytes, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.sign(data, ec.ECDSA(hashes.SHA256()))


def render(keys: Keys) -> bytes:
    """`install.sh` with the project's public key in it."""
    pem = keys.signers["targets"][0].public_key.keyval["public"].strip()
    template = (PROJECT / "installers" / "install.sh.in").read_text()
    return template.replace("@PINNED_KEY@", pem).encode()


def render_windows(keys: Keys, platform: str) -> bytes:
    """`install.ps1` for a platform with the project's public key in it."""
    pem = keys.signers["targets"][0].public_key.keyval["public"].strip()
    body = "".join(line for line in pem.splitlines() if not line.startswith("-----"))
    template = (PROJECT / "installers" / "windows" / "install.ps1.in").read_text()
    return template.replace("@PINNED_KEY_BASE64@", body).replace("@PLATFORM@", platform).encode()


if __name__ == "__main__":
    main()
