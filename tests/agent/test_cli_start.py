"""How `towpath` starts: what a bare ``--help`` loads, and what shells are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agent.cli.service import _print_tasks
from tests.agent.cli_scene import Run, relay, towpath

__all__ = ["relay", "towpath"]

TOWPATH = Path(sys.executable).with_name("towpath")
# Each costs more than all of the rest; a command loads what it needs when it runs.
HEAVY = ("globus_sdk", "requests", "trio", "cryptography", "rich", "sqlalchemy", "starlette", "msgspec.json", "httpx")


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; from agent.cli.main import main\n"
        "sys.argv = ['towpath', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "transfer" in done.stdout


def interrupted_at(module: str, *words: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """The command, with Ctrl-C at the moment when it loads a module."""
    script = (
        "import os, runpy, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"sys.argv = ['towpath', *{words!r}]\n"
        f"{before}\n"
        "runpy.run_module('agent', run_name='__main__')\n"
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot press Ctrl-C for itself alone")
def test_an_interruption_while_the_command_is_loaded_shows_no_traceback() -> None:
    early = interrupted_at("click", "--version")
    assert (early.returncode, early.stdout, early.stderr) == (-signal.SIGINT, "", ""), "130 to a shell"
    late = interrupted_at("agent.cli.service", "status")
    assert (late.returncode, late.stderr.strip()) == (130, "Interrupted.")
    ignored = interrupted_at("click", "--version", before="signal.signal(signal.SIGINT, signal.SIG_IGN)")
    assert (ignored.returncode, ignored.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_its_script(shell: str) -> None:
    done = subprocess.run([TOWPATH, "completion", shell], capture_output=True, text=True, check=True, timeout=60)
    assert f"_TOWPATH_COMPLETE={shell}_complete" in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("towpath trans", {"transfer"}),
        ("towpath transfer --sync", {"--sync-level"}),
        ("towpath transfer --sync-level ch", {"checksum"}),
        ("towpath task wa", {"wait"}),
    ],
)
def test_words_are_completed(words: str, expected: set[str]) -> None:
    environment = {
        **os.environ,
        "_TOWPATH_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run([TOWPATH], capture_output=True, text=True, env=environment, check=False, timeout=60)
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == expected


def test_of_tasks_that_are_over_few_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """They stay until the relay closes them, days later: there may be thousands."""
    counters = {"files": 1, "files_transferred": 1, "bytes_transferred": 1, "deleted": 0}
    state = ["SUCCEEDED"] * 30 + ["ACTIVE"] + ["FAILED"] * 30
    base = {"status_code": "OK", "status_sentence": "", "who": "", "path": "", "counters": counters}
    tasks = [{**base, "task_id": f"t{number}", "state": name} for number, name in enumerate(state)]
    _print_tasks(tasks)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1].rstrip(":") for line in lines[:-1]] == ["t30", "t56", "t57", "t58", "t59", "t60"]
    assert "and 55 earlier task(s)" in lines[-1]


def test_nobody_signs_in_to_offer_a_folder_that_is_not_there(
    towpath: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collection was made before the folder was looked at, and stayed at the relay."""
    monkeypatch.setattr("agent.cli.enrolment_login.setup_key_by_sign_in", lambda *_: pytest.fail("signed in"))
    code, _, said = towpath("setup", "--relay", "https://relay.example", "--root", str(tmp_path / "dtaa"))
    assert (code, "dtaa is not a directory. Make it first, or name another." in said) == (1, True)


def test_one_task_is_paused_and_resumed_or_all(towpath: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(_state_dir: Path, method: str, path: str) -> dict[str, str]:
        asked.append(f"{method} {path}")
        return {"message": "done"}

    monkeypatch.setattr("agent.local_socket.ask", ask)
    task = "00000000-0000-4000-8000-0000000000b1"
    for words in (["pause"], ["resume"], ["pause", task], ["resume", task], ["reconnect"]):
        assert towpath(*words) == (0, "done\n", "")
    all_and_one = ["/pause", "/resume", f"/tasks/{task}/pause", f"/tasks/{task}/resume"]
    assert asked == [f"POST {path}" for path in [*all_and_one, "/relay/reconnect"]]
    assert towpath("resume", "../pause")[0] == 2
