"""First light: one large file and many small ones, alpha to beta over loopback, beside rsync in the same run.

    python benchmarks/first_light.py [--directory DIR] [--large-mib 4096] [--files 20000] [--runs 1]

Ours is the whole thing as a user gets it: submitted through the relay, encrypted, digested, durable on disk and read
back. rsync runs as a daemon (clear) and over ssh where they are installed, each followed by a sync, so that both sides
of a ratio are durable. Trees are new for every run; sources are read once before each run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from globus_sdk import TransferData

from agent.cli.profile import Profile
from agent.cli.relay_client import Relay
from agent.demo.free_port import free_port

MIB = 1024 * 1024


@contextmanager
def little_world(directory: Path) -> Iterator[dict[str, Any]]:
    file = directory / "world.json"
    towpath = Path(sys.executable).with_name("towpath")
    process = subprocess.Popen(
        [towpath, "demo", "--keep", "--skip-transfer", "--json", file, "--directory", directory / "world"],
        stdout=subprocess.DEVNULL,
    )
    try:
        while not file.exists():
            if process.poll() is not None:
                raise SystemExit("The little world did not come up.")
            time.sleep(0.1)
        yield json.loads(file.read_text())
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def make_sources(root: Path, large_mib: int, files: int) -> None:
    (root / "large").mkdir()
    # Random once, then repeated: nothing here compresses or skips equal blocks.
    block = os.urandom(64 * MIB)
    with (root / "large" / "file").open("wb") as file:
        for start in range(0, large_mib, 64):
            file.write(block[: min(64, large_mib - start) * MIB])
    for number in range(files):
        folder = root / "small" / f"{number // 100:04d}"
        if not number % 100:
            folder.mkdir(parents=True)
        (folder / f"{number:06d}").write_bytes(os.urandom(4096))


def warm(path: Path) -> None:
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.read(MIB):
                    continue
    os.sync()


def ours(world: dict[str, Any], name: str, number: int) -> float:
    ends = world["endpoints"]
    profile = Profile(
        relay_url=world["relay_url"],
        ca_file=world["ca_file"],
        client_id=world["client_id"],
        client_secret=world["client_secret"],
    )
    with Relay(profile) as relay:
        data = TransferData(
            source_endpoint=ends["alpha"]["collection_id"],
            destination_endpoint=ends["beta"]["collection_id"],
            verify_checksum=True,
            preserve_timestamp=True,
        )
        data.add_item(f"/{name}", f"/{name}-{number}", recursive=True)
        started = time.monotonic()
        task = relay.transfer.submit_transfer(data)["task_id"]
        while (document := relay.transfer.get_task(task).data)["status"] == "ACTIVE":
            time.sleep(0.05)
        elapsed = time.monotonic() - started
        if document["status"] != "SUCCEEDED":
            raise SystemExit(f"The task failed: {document['fatal_error']}")
    return elapsed


def timed(command: list[str]) -> float:
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    os.sync()
    return time.monotonic() - started


@contextmanager
def rsync_peers(directory: Path, source: Path) -> Iterator[dict[str, Callable[[str, Path], float]]]:
    """rsync as a daemon in clear and over ssh, as far as they are installed."""
    peers: dict[str, Callable[[str, Path], float]] = {}
    processes: list[subprocess.Popen[bytes]] = []
    try:
        if shutil.which("rsync"):
            port = free_port()
            config = directory / "rsyncd.conf"
            config.write_text(
                f"port = {port}\naddress = 127.0.0.1\nuse chroot = no\nuid = {os.getuid()}\ngid = {os.getgid()}\n"
                f"[source]\npath = {source}\nread only = yes\n"
            )
            processes.append(subprocess.Popen(["rsync", "--daemon", "--no-detach", f"--config={config}"]))
            peers["rsync daemon, clear"] = lambda name, to: timed(
                ["rsync", "-a", f"rsync://127.0.0.1:{port}/source/{name}/", f"{to}/"]
            )
            sshd = shutil.which("sshd") or "/usr/sbin/sshd"
            if Path(sshd).exists():
                shell, process = _sshd(directory, sshd)
                processes.append(process)
                peers["rsync over ssh"] = lambda name, to: timed(
                    ["rsync", "-a", "-e", shell, f"127.0.0.1:{source}/{name}/", f"{to}/"]
                )
        time.sleep(1)
        yield peers
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def _sshd(directory: Path, sshd: str) -> tuple[str, subprocess.Popen[bytes]]:
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True)
    port = free_port()
    config = directory / "sshd_config"
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {directory}/host\nAuthorizedKeysFile {directory}/user.pub\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nPidFile none\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    process = subprocess.Popen([sshd, "-D", "-f", config], stderr=subprocess.DEVNULL)
    options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    return f"ssh -p {port} -i {directory}/user {options} -c aes128-gcm@openssh.com", process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--large-mib", type=int, default=4096)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="first-light-", dir=options.directory) as name:
        directory = Path(name)
        with little_world(directory) as world:
            root = Path(world["endpoints"]["alpha"]["root"])
            make_sources(root, options.large_mib, options.files)
            with rsync_peers(directory, root) as peers:
                for work, unit, amount in (("large", "MiB/s", options.large_mib), ("small", "files/s", options.files)):
                    _compare(world, peers, directory, root, work, unit, amount, options.runs)


def _compare(
    world: dict[str, Any],
    peers: dict[str, Callable[[str, Path], float]],
    directory: Path,
    root: Path,
    work: str,
    unit: str,
    amount: int,
    runs: int,
) -> None:
    for number in range(runs):
        warm(root / work)
        mine = ours(world, work, number)
        print(f"{work:6} towpath              {mine:7.2f} s  {amount / mine:9.0f} {unit}", flush=True)
        for peer, run in peers.items():
            to = directory / f"{work}-{peer.replace(' ', '-')}-{number}"
            to.mkdir()
            warm(root / work)
            theirs = run(work, to)
            ratio = theirs / mine
            print(
                f"{work:6} {peer:20} {theirs:7.2f} s  {amount / theirs:9.0f} {unit}  ours is {ratio:.2f} x", flush=True
            )


if __name__ == "__main__":
    main()
