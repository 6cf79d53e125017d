"""The tray: what it shows for every state, and the real thing on a virtual screen."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import plistlib
import shutil
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer
from typing import Any

import pytest

from agent.desktop.autostart import desktop_entry, launch_agent, place, set_autostart
from agent.desktop.view import Entry, View, view_of

TASK = "00000000-0000-4000-8000-0000000000b1"


def status(**changes: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "version": "1",
        "paused": False,
        "held_back": "",
        "config_problem": "",
        "update_available": "",
        "link": {"connected": True, "last_error": "", "relay_url": "https://relay.example"},
        "collections": [{"id": "c1", "name": "Data", "available": True, "reason": ""}],
        "tasks": [],
    }
    return document | changes


def task(**changes: Any) -> dict[str, Any]:
    counters = {
        "bytes_transferred": 250,
        "bytes_total": 1000,
        "files": 4,
        "files_transferred": 1,
        "scan_complete": True,
    }
    row = {"task_id": TASK, "state": "ACTIVE", "who": "", "status_sentence": "", "rate": 1e6, "counters": counters}
    return row | {"error_code": ""} | changes


def texts(view: View) -> list[str]:
    def walk(entries: tuple[Entry, ...]) -> Iterator[str]:
        for entry in entries:
            yield entry.text
            yield from walk(entry.below)

    return list(walk(view.menu))


def actions(view: View) -> set[str]:
    def walk(entries: tuple[Entry, ...]) -> Iterator[str]:
        for entry in entries:
            yield entry.action
            yield from walk(entry.below)

    return set(walk(view.menu)) - {""}


@pytest.mark.parametrize(
    ("document", "look"),
    [
        (None, "off"),
        (status(), "idle"),
        (status(tasks=[task()]), "busy"),
        (status(paused=True, tasks=[task()]), "paused"),
        (status(held_back="On battery."), "paused"),
        (status(draining=True, tasks=[task()]), "paused"),
        (status(link={"connected": False, "last_error": "No route.", "relay_url": "x"}), "trouble"),
        (status(tasks=[task(state="FAILED", status_sentence="Broken.")]), "trouble"),
        (status(collections=[{"id": "c", "name": "N", "available": False, "reason": "Gone."}]), "trouble"),
    ],
)
def test_every_state_has_its_look(document: dict[str, Any] | None, look: str) -> None:
    assert view_of(document).look == look


def test_a_failure_that_was_seen_troubles_nobody_any_more() -> None:
    """The agent keeps failed tasks for days, until the relay has closed them."""
    failures = [task(task_id=name, state="FAILED", status_sentence=f"Broken {name}.") for name in ("a", "b", "c")]
    document = status(tasks=failures)
    view = view_of(document, seen={"a"})
    assert view.look == "trouble"
    assert "Recent problems (2)" in texts(view)
    assert "Broken a." not in texts(view)
    (entry,) = [entry for entry in view.menu if entry.action == "seen"]
    assert entry.argument == "b c"
    seen = view_of(document, seen={"a", *entry.argument.split()})
    assert (seen.look, seen.title) == ("idle", "Towpath: nothing to do")
    assert "seen" not in actions(seen)
    # Others are, as ever.
    away = view_of(document | {"config_problem": "Line 3."}, seen={"a", "b", "c"})
    assert (away.look, "seen" in actions(away)) == ("trouble", False)


def test_a_source_that_others_read_from_has_something_to_do() -> None:
    assert view_of(status(transfer={"sessions": 0})).title == "Towpath: nothing to do"
    assert view_of(status(transfer={"sessions": 1})).title == "Towpath: others read from here"


def test_a_running_transfer_is_shown_with_progress_and_can_be_paused() -> None:
    view = view_of(status(tasks=[task()]))
    assert any("25 % of 1000 B, 1 of 4 files" in text for text in texts(view))
    assert {"pause", "pause-task", "web", "sign-in", "folder", "stop", "quit"} <= actions(view)
    assert "1 transfer running" in view.title
    assert "resume" in actions(view_of(status(paused=True)))
    assert actions(view_of(None)) == {"start", "quit"}


def test_problems_say_what_to_do_and_names_cannot_act_on_the_screen() -> None:
    waiting = task(
        who="destination owner", status_sentence="The disk is full. Free some space \x1b[2J" + "and so on " * 30
    )
    view = view_of(
        status(tasks=[waiting], collections=[{"id": "c", "name": "a\x1bb", "available": True, "reason": ""}])
    )
    text = "\n".join(texts(view))
    assert "A transfer waits for you" in text
    assert "The disk is full." in text
    assert "\x1b" not in text
    assert all(len(line) <= 75 for line in texts(view))


def test_what_has_ended_waits_for_nobody() -> None:
    for state, look in (("CANCELED", "idle"), ("SUCCEEDED", "idle"), ("FAILED", "trouble")):
        view = view_of(status(tasks=[task(state=state, who="destination owner", status_sentence="So it is.")]))
        assert view.look == look
        assert not any("waits for" in text for text in texts(view))


def test_a_transfer_that_was_paused_alone_can_be_let_go_on() -> None:
    """It was gone from the menu, and nothing but the agent's own interface could let it go on."""
    held = task(state="PAUSED", status_code="PAUSED_BY_OWNER", who="destination owner", status_sentence="Paused.")
    view = view_of(status(tasks=[held]))
    assert (view.look, view.title) == ("idle", "Towpath: 1 transfer is paused")
    assert any(text.startswith("Paused: 25 % of 1000 B") for text in texts(view))
    assert "resume-task" in actions(view)
    assert not any("waits for" in text for text in texts(view))
    # With the whole machine paused it would not go on; and what others have paused is theirs.
    assert "resume-task" not in actions(view_of(status(tasks=[held], paused=True)))
    theirs = view_of(status(tasks=[{**held, "state": "WAITING", "who": "source owner"}]))
    assert "A transfer waits for the source owner" in texts(theirs)
    assert "resume-task" not in actions(theirs)


def test_the_title_calls_for_people_only_where_they_can_help() -> None:
    away = {"connected": False, "last_error": "No route.", "relay_url": "x"}
    assert view_of(status(link=away)).title == "Towpath: Not connected to the relay"
    failed, full = task(state="FAILED", status_sentence="Broken."), task(state="WAITING", who="destination owner")
    assert view_of(status(tasks=[failed])).title == "Towpath: A transfer failed"
    assert view_of(status(tasks=[failed, full])).title == "Towpath: something needs you"


def test_what_waits_is_not_nothing() -> None:
    assert view_of(status(tasks=[task(state="WAITING")])).title == "Towpath: 1 transfer waits"
    assert view_of(status(tasks=[task(state="QUEUED"), task(state="WAITING")])).title == "Towpath: 2 transfers wait"


@pytest.mark.parametrize("document", [{}, {"tasks": 1}, status(tasks=[{}]), status(link=None)])
def test_an_agent_of_another_version_is_said_to_be_one(document: dict[str, Any]) -> None:
    """The thread that looks ended, and the icon showed what had been so last for ever."""
    view = view_of(document)
    assert (view.look, actions(view)) == ("trouble", {"quit"})


def test_an_update_is_offered() -> None:
    view = view_of(status(update_available="0.2.0"))
    assert "Install version 0.2.0" in texts(view)
    assert "update" in actions(view)


# --- autostart ---------------------------------------------------------------------------------------------------


def test_autostart_is_written_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = set_autostart(["/a b/python", "-m", "agent", "100%"], wanted=True, platform="linux")
    assert path == tmp_path / "autostart" / "towpath-tray.desktop"
    assert 'Exec="/a b/python" -m agent 100%%\n' in path.read_text()
    set_autostart([], wanted=False, platform="linux")
    assert not path.exists()
    assert desktop_entry(["x"]).startswith("[Desktop Entry]\n")


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("/usr/bin/towpath", "/usr/bin/towpath"),
        ("/home/o'neil/my files/50%", '"/home/o\'neil/my files/50%%"'),
        ('a"b', r'"a\\"b"'),
        ("a\\b", r'"a\\\\b"'),
        ("$HOME `x`", r'"\\$HOME \\`x\\`"'),
        ("", '""'),
    ],
)
def test_words_of_an_entry_are_quoted_as_the_specification_says(word: str, written: str) -> None:
    """Single quotes, as for a shell, mean nothing there."""
    assert f"Exec=run {written}\n" in desktop_entry(["run", word])


def test_autostart_on_windows_is_a_value_of_the_users_own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, object] = {}

    def delete(_key: object, name: str) -> None:
        if values.pop(name, None) is None:
            raise FileNotFoundError(name)

    winreg = types.ModuleType("winreg")
    vars(winreg).update(
        HKEY_CURRENT_USER="HKCU",
        REG_SZ=1,
        CreateKey=lambda root, path: contextlib.nullcontext((root, path)),
        SetValueEx=lambda key, name, _reserved, kind, value: values.update({name: (key[0], kind, value)}),
        DeleteValue=delete,
    )
    monkeypatch.setitem(sys.modules, "winreg", winreg)
    where = set_autostart([r"C:\My Programs\python.exe", "-m", "agent", "tray"], wanted=True, platform="win32")
    assert values == {"Towpath tray": ("HKCU", 1, '"C:\\My Programs\\python.exe" -m agent tray')}
    assert str(where).endswith("Run\\Towpath tray")
    for _ in range(2):
        set_autostart([], wanted=False, platform="win32")
    assert values == {}
    assert "'Towpath tray'" in (Path(__file__).parents[2] / "installers/windows/install.ps1.in").read_text()


def test_the_launch_agent_of_macos_is_a_property_list() -> None:
    document = plistlib.loads(launch_agent("org.towpath.agent", ["/x/towpath", "run"], "/x/log", keep_alive=True))
    assert document["ProgramArguments"] == ["/x/towpath", "run"]
    assert document["KeepAlive"] == {"SuccessfulExit": False}
    assert document["RunAtLoad"] is True
    assert place(platform="darwin").parts[-3:] == ("Library", "LaunchAgents", "org.towpath.tray.plist")


# --- the real thing ----------------------------------------------------------------------------------------------


class FakeAgent:
    """Answers on a local socket as an agent does, and keeps what it was asked."""

    def __init__(self, state_dir: Path) -> None:
        self.document = status(tasks=[task()])
        self.asked: list[str] = []
        agent = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                if self.command == "POST":
                    agent.asked.append(self.path)
                    agent.document["paused"] = self.path == "/pause"
                body = json.dumps(agent.document).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = answer  # noqa: N815 - http.server's names
            do_POST = answer  # noqa: N815

            def address_string(self) -> str:
                return "local"

            def log_message(self, *_: object) -> None:
                pass

        (state_dir / "control").mkdir(mode=0o700)
        path = state_dir / "control" / "agent.sock"
        self.server = UnixStreamServer(str(path), Handler)
        (state_dir / "local.socket").write_text(f"{path}\n")
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def screen() -> Iterator[str]:
    """A virtual screen with a tray."""
    for tool in ("Xvfb", "trayer", "import"):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}")
    pytest.importorskip("Xlib")
    pytest.importorskip("PIL")
    number = next(n for n in range(90, 200) if not Path(f"/tmp/.X11-unix/X{n}").exists())
    display = f":{number}"
    environment = {**os.environ, "DISPLAY": display}
    null = subprocess.DEVNULL
    with contextlib.ExitStack() as stack:
        for command in (
            ["Xvfb", display, "-screen", "0", "640x480x24", "-nolisten", "tcp"],
            ["trayer", "--edge", "top", "--align", "right", "--height", "32", "--widthtype", "request"],
        ):
            process = stack.enter_context(subprocess.Popen(command, env=environment, stdout=null, stderr=null))
            stack.callback(process.terminate)
            deadline = time.monotonic() + 20
            while not Path(f"/tmp/.X11-unix/X{number}").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        yield display


def colours(display: str, target: Path) -> set[tuple[int, ...]]:
    """The colours on the screen, by a screenshot that is kept for looking at."""
    from PIL import Image

    subprocess.run(["import", "-window", "root", "-display", display, str(target)], check=True, timeout=30)
    with Image.open(target) as image:
        return {colour for _, colour in image.convert("RGB").getcolors(maxcolors=1 << 24) or []}  # type: ignore[misc]


def test_the_tray_shows_the_agents_state_on_a_screen(tmp_path: Path, screen: str) -> None:
    state_dir = tmp_path / "agent.state"
    state_dir.mkdir(mode=0o700)
    (tmp_path / "agent.yaml").write_text("relay: {}\n")
    agent = FakeAgent(state_dir)
    environment = {**os.environ, "DISPLAY": screen, "PYSTRAY_BACKEND": "xorg"}
    command = [sys.executable, "-m", "agent", "tray", "--config", str(tmp_path / "agent.yaml")]
    keep = Path(os.environ.get("TOWPATH_SCREENSHOTS", str(tmp_path)))
    blue, orange, grey = (27, 106, 201), (178, 106, 0), (154, 160, 166)

    def until(colour: tuple[int, ...], name: str) -> None:
        deadline = time.monotonic() + 40
        while colour not in colours(screen, keep / f"tray-{name}.png"):
            assert time.monotonic() < deadline, f"{name} never showed"
            time.sleep(0.3)

    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            until(blue, "busy")
            agent.document["paused"] = True
            until(orange, "paused")
            agent.server.shutdown()
            agent.server.server_close()
            (state_dir / "local.socket").unlink()
            until(grey, "off")
            assert process.poll() is None
        finally:
            process.kill()
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read()


@contextlib.contextmanager
def ended_at_last(command: list[str], **options: Any) -> Iterator[Any]:
    """A process for the length of a block."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.terminate()


SYSTEM_GI = Path("/usr/lib/python3/dist-packages/gi")


def gtk(folder: Path) -> dict[str, str]:
    """What makes the system's GTK importable here, and nothing else of the system's; skips where there is none."""
    (folder / "gtk").mkdir()
    (folder / "gtk" / "gi").symlink_to(SYSTEM_GI)
    environment = {**os.environ, "PYTHONPATH": str(folder / "gtk"), "PYSTRAY_BACKEND": "gtk"}
    code = "import gi; gi.require_version('Gtk', '3.0'); from gi.repository import Gtk"
    if subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False).returncode:
        pytest.skip("needs GTK with its Python bindings for this Python (python3-gi, gir1.2-gtk-3.0)")
    return environment


def place_of(display: str, colour: tuple[int, ...], target: Path) -> tuple[int, int] | None:
    """The middle of what has this colour on the screen."""
    from PIL import Image

    subprocess.run(["import", "-window", "root", "-display", display, str(target)], check=True, timeout=30)
    with Image.open(target) as image:
        rgb = image.convert("RGB")
        spots = [(x, y) for x in range(rgb.width) for y in range(rgb.height) if rgb.getpixel((x, y)) == colour]
    if not spots:
        return None
    return sum(x for x, _ in spots) // len(spots), sum(y for _, y in spots) // len(spots)


@pytest.mark.soak
def test_a_mouse_opens_the_menu_and_clicks_in_it(tmp_path: Path, screen: str) -> None:
    """Real clicks on a real menu: the agent is paused, then let go on, and the menu says so in between."""
    for tool in ("xdotool", "dbus-daemon"):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}")
    environment = gtk(tmp_path) | {"DISPLAY": screen, "NO_AT_BRIDGE": "1"}
    keep = Path(os.environ.get("TOWPATH_SCREENSHOTS", str(tmp_path)))
    state_dir = tmp_path / "agent.state"
    state_dir.mkdir(mode=0o700)
    (tmp_path / "agent.yaml").write_text("relay: {}\n")
    agent = FakeAgent(state_dir)
    agent.document["tasks"] = []
    green, orange = (46, 125, 107), (178, 106, 0)

    def mouse(*words: object) -> str:
        command = ["xdotool", *map(str, words)]
        return subprocess.run(command, env=environment, check=True, timeout=30, capture_output=True, text=True).stdout

    def icon(colour: tuple[int, ...]) -> tuple[int, int]:
        deadline = time.monotonic() + 40
        while (place := place_of(screen, colour, keep / "tray-mouse.png")) is None:
            assert time.monotonic() < deadline, "the icon never showed"
            time.sleep(0.3)
        return place

    def click_until(done: Callable[[], bool], colour: tuple[int, ...], first: int) -> None:
        """Click on one entry after the other, from above, until it is done."""
        x, y = icon(colour)
        for row in range(first, 220, 12):
            mouse("mousemove", x, y, "click", 3, "sleep", "0.3")
            subprocess.run(["import", "-window", "root", "-display", screen, str(keep / "tray-menu.png")], check=True)
            mouse("mousemove", x - 15, y + row, "sleep", "0.1", "click", 1, "sleep", "0.3", "key", "Escape")
            if done():
                return
        pytest.fail("no entry of the menu does it")

    command = [sys.executable, "-m", "agent", "tray", "--config", str(tmp_path / "agent.yaml")]
    # What opens web pages writes down what it was asked for.
    opener = tmp_path / "opener"
    opener.write_text(f'#!/bin/sh\nprintf "%s\\n" "$1" >>{tmp_path}/opened\n')
    opener.chmod(0o755)
    environment["BROWSER"] = f"{opener} %s"
    bus = ["dbus-daemon", "--session", "--nofork", "--nopidfile", "--print-address"]
    with (
        ended_at_last(bus, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as session,
        subprocess.Popen(
            command,
            env=environment | {"DBUS_SESSION_BUS_ADDRESS": session.stdout.readline().strip()},
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        try:
            click_until(lambda: "/pause" in agent.asked, green, 45)
            click_until(lambda: "/resume" in agent.asked, orange, 45)
            click_until((tmp_path / "opened").exists, green, 100)
            assert agent.asked == ["/pause", "/resume"]
            assert (tmp_path / "opened").read_text().startswith("https://relay.example")
            assert process.poll() is None
        finally:
            process.kill()
            assert process.stderr is not None
            said = process.stderr.read()
            assert "Traceback" not in said, said
            agent.server.shutdown()
            agent.server.server_close()


def test_clicks_reach_the_agent(tmp_path: Path, screen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", screen)
    monkeypatch.setenv("PYSTRAY_BACKEND", "xorg")
    state_dir = tmp_path / "agent.state"
    state_dir.mkdir(mode=0o700)
    (tmp_path / "agent.yaml").write_text("relay: {}\n")
    agent = FakeAgent(state_dir)
    from agent.desktop.tray import Tray

    tray = Tray(tmp_path / "agent.yaml")
    tray.do(Entry("x", "pause"))
    tray.do(Entry("x", "resume"))
    tray.do(Entry("x", "pause-task", TASK))
    assert agent.asked == ["/pause", "/resume", f"/tasks/{TASK}/pause"]
    agent.document["tasks"] = [task(task_id=name, state="FAILED") for name in ("old", "new")]
    tray.do(Entry("x", "seen", "old"))
    tray.do(Entry("x", "seen", "new"))
    assert Tray(tmp_path / "agent.yaml")._seen == {"old", "new"}, "over a restart"
    agent.document["tasks"] = [task(task_id="newest", state="FAILED")]
    tray.do(Entry("x", "seen", "newest"))
    assert Tray(tmp_path / "agent.yaml")._seen == {"newest"}, "what the agent has forgotten is not kept"
    with monkeypatch.context() as patch:
        patch.setattr(tray, "_status", lambda: None)
        tray.do(Entry("x", "seen", "other"))
    assert Tray(tmp_path / "agent.yaml")._seen == {"newest", "other"}, "an agent that is away has forgotten nothing"
    (state_dir / "tray-seen.json").write_text("{")
    assert not Tray(tmp_path / "agent.yaml")._seen
    agent.server.shutdown()
    agent.server.server_close()
    # Its window goes while there is a screen; later its library would complain from the garbage collector.
    del tray
    gc.collect()


def test_without_a_desktop_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "agent.yaml").write_text("relay: {}\n")
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    command = [sys.executable, "-m", "agent", "tray", "--config", str(tmp_path / "agent.yaml")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "towpath top" in result.stderr
    assert socket.gethostname()
