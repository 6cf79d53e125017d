"""The tray itself, on a virtual screen: what it shows there, and what becomes of clicks."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer
from typing import Any

import pytest

from agent.desktop.view import Entry
from tests.agent.desktop_scene import TASK, status, task


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
