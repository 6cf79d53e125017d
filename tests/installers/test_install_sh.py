"""`install.sh`: installs what the project signed and nothing else, and takes away exactly what it made."""

from __future__ import annotations

import base64
import io
import json
import os
import plistlib
import shutil
import subprocess
import tarfile
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key

from agent.cli.main import cli
from agent.cli.service_manager import unit_text
from agent.update.offer import this_platform
from installers.release import add, render_windows
from installers.repository import Keys, Repository

PLATFORM = this_platform()
PROGRAM = """#!/bin/sh
# Stands for the real program: writes down what it was asked to do.
echo "$@" >>"$HOME/calls"
case $1 in
    --version) echo "towpath {version}" ;;
    setup) mkdir -p "$HOME/.config/towpath" "$HOME/.local/state/towpath"; : >"$HOME/.config/towpath/agent.yaml"
        [ -n "${TOWPATH_SETUP_KEY:-}" ] || case $* in *--relay*) ;; *) exit 1 ;; esac ;;
    status) exit 1 ;;
    service) echo "[Service]"; echo "ExecStart=$5 run" ;;
esac
"""

pytestmark = [
    pytest.mark.skipif(not shutil.which("openssl") or not shutil.which("curl"), reason="needs openssl and curl"),
    pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell"),
]


def bundle(path: Path, version: str, program: str = PROGRAM) -> Path:
    files = {
        "bundle.json": (json.dumps({"version": version, "platform": PLATFORM}), 0o644),
        "bin/towpath": (program.replace("{version}", version), 0o755),
        "systemd/towpath-agent.service": ("[Service]\nExecStart=x\n", 0o644),
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, (content, mode) in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            archive.addfile(info, io.BytesIO(content.encode()))
    return path


class Machine:
    """A user's empty home, a mirror, and the script as somebody would have it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir()
        (self.home / "mine").write_text("mine")
        self.site = folder / "site"
        self.keys = Keys.generate()
        self.repository = Repository.open(self.site, self.keys)
        self.release("1.0.0")
        self.script = folder / "install.sh"
        self.script.write_bytes((self.site / "install" / "install.sh").read_bytes())
        # No service manager and no cron of the test machine's.
        self.path = folder / "bin"
        self.path.mkdir()
        tools = (
            "sh openssl tar mktemp curl sed cut wc cat cp mv ln ls rm mkdir rmdir sort grep dirname readlink uname "
            "date id basename true gzip"
        )
        for tool in tools.split():
            found = shutil.which(tool)
            if found:
                (self.path / tool).symlink_to(found)

    def release(self, version: str, **options: str) -> None:
        add(self.repository, self.keys, bundle(self.folder / f"{version}.tar.gz", version, **options))
        self.repository.publish()

    def run(self, *arguments: str, piped: bool = False, key: str = "") -> subprocess.CompletedProcess[str]:
        environment = {"HOME": str(self.home), "PATH": str(self.path)}
        if key:
            environment["TOWPATH_SETUP_KEY"] = key
        command = ["sh", "-s", "--", *arguments] if piped else ["sh", str(self.script), *arguments]
        text = self.script.read_text() if piped else None
        return subprocess.run(
            command, input=text, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    def install(self, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        return self.run("--mirror", f"file://{self.site}", *arguments, **options)  # type: ignore[arg-type]

    @property
    def prefix(self) -> Path:
        return self.home / ".local/share/towpath"

    def files(self) -> set[str]:
        return {str(path.relative_to(self.home)) for path in self.home.rglob("*")}

    @property
    def manifest(self) -> Path:
        return self.site / "install" / f"{PLATFORM}.manifest"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("piped", [False, True])
def test_it_installs_enrols_starts_and_leaves_nothing_behind(machine: Machine, piped: bool) -> None:
    (machine.home / "data").mkdir()
    before = machine.files()
    done = machine.install("--root", str(machine.home / "data"), piped=piped, key="twp-key")
    assert done.returncode == 0, done.stderr
    assert os.readlink(machine.prefix / "current") == "versions/1.0.0"
    assert (machine.home / ".local/bin/towpath").resolve() == machine.prefix / "versions/1.0.0/bin/towpath"
    calls = (machine.home / "calls").read_text().splitlines()
    assert f"setup --root {machine.home}/data" in calls
    assert calls[-1] == "start"
    assert "twp-key" not in (machine.home / "calls").read_text() + done.stdout + done.stderr
    assert (machine.prefix / "versions").stat().st_mode & 0o077 == 0

    gone = subprocess.run(
        ["sh", str(machine.prefix / "install.sh"), "--uninstall"],
        env={"HOME": str(machine.home), "PATH": str(machine.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert gone.returncode == 0, gone.stderr
    assert machine.files() - {"calls"} == before
    assert (machine.home / "mine").read_text() == "mine"


@pytest.mark.parametrize("piped", [False, True])
def test_without_a_key_it_enrols_by_a_code_once(machine: Machine, piped: bool) -> None:
    root = machine.home / "data"
    root.mkdir()
    options = ["--relay", "https://relay.example", "--ca-file", "/ca.pem", "--root", str(root), "--name", "Lab"]
    done = machine.install(*options, piped=piped)
    assert done.returncode == 0, done.stderr
    setup = f"setup --relay https://relay.example --root {root} --ca-file /ca.pem --name Lab"
    assert (machine.home / "calls").read_text().splitlines()[-3:] == [setup, "status", "start"]
    assert machine.install(*options, piped=piped).returncode == 0
    assert (machine.home / "calls").read_text().count("setup ") == 1


def test_enrolling_can_be_left_for_later(machine: Machine) -> None:
    done = machine.install("--relay", "https://relay.example", "--root", str(machine.home), "--no-enrol")
    assert done.returncode == 0, done.stderr
    assert "setup" not in (machine.home / "calls").read_text()
    assert "Next: towpath setup --relay https://relay.example" in done.stderr


CRONTAB = """#!/bin/sh
# Stands for cron's: the table is a file.
case $1 in -l) cat "$HOME/../crontab" ;; -) cat >"$HOME/../crontab" ;; *) cp "$1" "$HOME/../crontab" ;; esac
"""
SYSTEMCTL = """#!/bin/sh
echo "systemctl $*" >>"$HOME/calls"
"""


def tool(machine: Machine, name: str, script: str) -> None:
    (machine.path / name).write_text(script)
    (machine.path / name).chmod(0o755)


def test_without_a_service_manager_cron_starts_it_after_a_reboot(machine: Machine) -> None:
    tool(machine, "crontab", CRONTAB)
    (machine.folder / "crontab").write_text("0 4 * * * backup\n")
    options = ["--root", str(machine.home)]
    for _ in range(2):
        assert machine.install(*options, key="twp-key").returncode == 0
    lines = (machine.folder / "crontab").read_text().splitlines()
    assert lines == ["0 4 * * * backup", f"@reboot '{machine.prefix}/current/bin/towpath' start # towpath-agent"]
    # What cron does at the next boot.
    (machine.home / "calls").unlink()
    command = lines[1].removeprefix("@reboot ")
    subprocess.run(["sh", "-c", command], env={"HOME": str(machine.home), "PATH": str(machine.path)}, check=True)
    assert (machine.home / "calls").read_text() == "start\n"
    assert machine.run("--uninstall").returncode == 0
    assert (machine.folder / "crontab").read_text() == "0 4 * * * backup\n"


def test_where_there_is_systemd_it_becomes_a_service_of_the_user(machine: Machine) -> None:
    tool(machine, "systemctl", SYSTEMCTL)
    tool(machine, "loginctl", "#!/bin/sh\nexit 1\n")
    before = machine.files()
    done = machine.install("--root", str(machine.home), key="twp-key")
    assert done.returncode == 0, done.stderr
    assert "ask an administrator for: loginctl enable-linger" in done.stderr
    unit = (machine.home / ".config/systemd/user/towpath-agent.service").read_text()
    program = machine.prefix / "current/bin/towpath"
    assert f"ExecStart={program} run\n" in unit
    calls = (machine.home / "calls").read_text()
    assert "systemctl --user enable --now towpath-agent" in calls
    assert "\nstart\n" not in calls
    assert machine.run("--uninstall").returncode == 0
    assert "systemctl --user disable --now towpath-agent" in (machine.home / "calls").read_text()
    assert machine.files() - {"calls"} == before


LOGINCTL = """#!/bin/sh
# Stands for logind: a file says whether services outlive the user's sessions.
case $1 in
    show-user) [ -f "$HOME/../linger" ] && echo yes || echo no ;;
    enable-linger) : >"$HOME/../linger" ;;
    disable-linger) rm "$HOME/../linger" ;;
esac
"""


@pytest.mark.parametrize("lingered", [True, False])
def test_uninstalling_leaves_lingering_as_it_was(machine: Machine, lingered: bool) -> None:
    tool(machine, "systemctl", SYSTEMCTL)
    tool(machine, "loginctl", LOGINCTL)
    if lingered:
        (machine.folder / "linger").touch()
    # An update by the script must not forget what the first installation found.
    for _ in range(2):
        assert machine.install("--root", str(machine.home), key="twp-key").returncode == 0
        assert (machine.folder / "linger").exists()
    assert machine.run("--uninstall").returncode == 0
    assert (machine.folder / "linger").exists() is lingered


def test_settings_can_be_kept(machine: Machine) -> None:
    (machine.home / "data").mkdir()
    machine.install("--root", str(machine.home / "data"), key="twp-key")
    assert machine.run("--uninstall", "--keep-settings").returncode == 0
    assert (machine.home / ".config/towpath/agent.yaml").exists()
    assert not machine.prefix.exists()


def test_installing_again_takes_the_newer_version_and_repeats_harmlessly(machine: Machine) -> None:
    assert machine.install().returncode == 0
    machine.release("1.1.0")
    assert machine.install().returncode == 0
    assert machine.install().returncode == 0
    assert os.readlink(machine.prefix / "current") == "versions/1.1.0"
    assert sorted(os.listdir(machine.prefix / "versions")) == ["1.0.0", "1.1.0"]


def test_a_program_of_the_users_own_in_the_same_place_stays(machine: Machine) -> None:
    own = machine.home / ".local/bin/towpath"
    own.parent.mkdir(parents=True)
    own.write_text("own")
    done = machine.install()
    assert "it stays" in done.stderr
    assert machine.run("--uninstall").returncode == 0
    assert own.read_text() == "own"


def refused(machine: Machine, words: str) -> None:
    done = machine.install()
    assert done.returncode != 0
    assert words in done.stderr, done.stderr
    assert machine.files() == {"mine"}


def test_a_mirror_with_keys_of_its_own_installs_nothing(machine: Machine) -> None:
    evil = Keys.generate()
    machine.repository = Repository.open(machine.folder / "evil", evil)
    machine.site, machine.keys = machine.folder / "evil", evil
    machine.release("9.0.0", program="#!/bin/sh\ntouch $HOME/owned\n")
    refused(machine, "signature of the project is missing or wrong")


def test_a_changed_manifest_installs_nothing(machine: Machine) -> None:
    machine.manifest.write_text(machine.manifest.read_text().replace("1.0.0", "1.0.1"))
    refused(machine, "signature of the project is missing or wrong")


@pytest.mark.parametrize("same_length", [True, False])
def test_a_changed_bundle_installs_nothing(machine: Machine, same_length: bool) -> None:
    (path,) = (machine.site / "targets" / "bundles").iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data) if same_length else bytes(data) + b"more")
    refused(machine, "not what was signed" if same_length else "longer than it should be")


def test_a_manifest_of_long_ago_installs_nothing(machine: Machine) -> None:
    machine.repository.now -= timedelta(days=731)
    machine.release("1.0.0")
    refused(machine, "run out")


def test_a_manifest_for_another_platform_installs_nothing(machine: Machine) -> None:
    folder = machine.folder / "other"
    folder.mkdir()
    foreign = folder / "b.tar.gz"
    with tarfile.open(foreign, "w:gz") as archive:
        text = json.dumps({"version": "1.0.0", "platform": "plan9-mips"}).encode()
        info = tarfile.TarInfo("bundle.json")
        info.size = len(text)
        archive.addfile(info, io.BytesIO(text))
    add(machine.repository, machine.keys, foreign)
    other = machine.site / "install" / "plan9-mips.manifest"
    machine.manifest.write_bytes(other.read_bytes())
    machine.manifest.with_suffix(".manifest.sig").write_bytes(other.with_suffix(".manifest.sig").read_bytes())
    refused(machine, "for plan9-mips")


def test_a_program_that_does_not_run_here_is_not_installed(machine: Machine) -> None:
    machine.release("1.0.0", program="#!/bin/sh\nexit 1\n")
    done = machine.install()
    assert "does not run on this system" in done.stderr
    assert not (machine.prefix / "current").exists()


def test_the_script_is_plain_posix_shell(machine: Machine) -> None:
    shells = [shell for shell in ("dash", "bash", "sh") if shutil.which(shell)]
    assert shells
    for shell in shells:
        assert subprocess.run([shell, "-n", str(machine.script)], check=False).returncode == 0, shell


# --- other systems, as far as they can be looked at from here --------------------------------------------------------


def test_the_installer_of_windows_pins_the_same_key_and_touches_the_user_alone(machine: Machine) -> None:
    text = render_windows(machine.keys, "windows-x86_64").decode()
    pem = machine.script.read_text()
    body = text.split("$PinnedKey = '")[1].split("'")[0]
    assert body in pem.replace("\n", "")
    key = load_der_public_key(base64.b64decode(body))
    signature = machine.manifest.with_suffix(".manifest.sig").read_bytes()
    key.verify(signature, machine.manifest.read_bytes(), ec.ECDSA(hashes.SHA256()))  # type: ignore[union-attr,call-arg,arg-type]
    # What the script cuts out of the key by position is its point.
    spki = base64.b64decode(body)
    numbers = key.public_numbers()  # type: ignore[union-attr]
    assert (len(spki), spki[26]) == (91, 4)
    assert (spki[27:59], spki[59:91]) == (numbers.x.to_bytes(32, "big"), numbers.y.to_bytes(32, "big"))  # type: ignore[union-attr]
    assert "@" not in text.split("param(")[0].split("PinnedKey")[-1]
    assert "HKLM" not in text
    assert "HKCU:" in text
    assert "RunAs" not in text
    for made, removed in (
        ("'Towpath' -Value", "-Name 'Towpath' -Err"),
        ("New-Item -Force $UninstallKey", "$UninstallKey }"),
    ):
        assert made in text
        assert removed in text


def test_units_and_property_lists_carry_the_real_command() -> None:
    unit = unit_text(
        "[Unit]\nConditionPathExists=x\n[Service]\nExecStart=y\nType=notify\n", ["/a b/towpath"], Path("/c%/a.yaml")
    )
    assert 'ExecStart="/a b/towpath" run --config /c%%/a.yaml\n' in unit
    assert "ConditionPathExists=/c%%/a.yaml\n" in unit
    result = CliRunner().invoke(cli, ["service", "manifest", "--program", "/x/towpath", "--launchd"])
    document = plistlib.loads(result.stdout_bytes)
    assert document["Label"] == "org.towpath.agent"
    assert document["ProgramArguments"][:3] == ["/x/towpath", "run", "--config"]
    systemd = CliRunner().invoke(cli, ["service", "manifest", "--program", "/x/towpath", "--systemd"]).stdout
    assert "ExecStart=/x/towpath run --config " in systemd
    assert "WatchdogSec=" in systemd
