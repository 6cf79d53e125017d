"""The tray application: a process of its own that asks the agent over its local socket and shows what it says."""

from __future__ import annotations

import functools
import json
import logging
import subprocess
import sys
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent import local_socket
from agent.config.layers import load_config, state_dir_of
from agent.desktop.view import Entry, Look, View, failed_tasks, view_of
from protocol.errors import TowpathError
from protocol.private_file import write_private_file

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("towpath.tray")

LOOK_EVERY = 3.0
COLOURS: dict[Look, str] = {
    "off": "#9aa0a6",
    "idle": "#2e7d6b",
    "busy": "#1b6ac9",
    "paused": "#b26a00",
    "trouble": "#c5221f",
}
SIZE = 64
# In the state directory: ids of failed tasks that the user has taken note of.
SEEN_FILE = "tray-seen.json"


def draw(look: Look) -> Image:
    """The icon: a path beside the water, in the colour of the agent's state."""
    from PIL import Image, ImageDraw

    image = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle((2, 2, SIZE - 3, SIZE - 3), 14, fill=COLOURS[look])
    pen.line((16, 46, 30, 32, 34, 32, 48, 18), fill="white", width=7, joint="curve")
    pen.polygon(((36, 12), (54, 12), (54, 30)), fill="white")
    if look == "paused":
        pen.rectangle((14, 12, 19, 28), fill="white")
        pen.rectangle((24, 12, 29, 28), fill="white")
    if look == "trouble":
        pen.ellipse((10, 10, 26, 26), fill="white")
        pen.rectangle((17, 13, 19, 19), fill=COLOURS[look])
        pen.rectangle((17, 21, 19, 23), fill=COLOURS[look])
    return image


def _seen_before(state_dir: Path) -> frozenset[str]:
    """Failures that the user took note of before. A file that cannot be read is none: they are shown again."""
    try:
        seen = json.loads((state_dir / SEEN_FILE).read_bytes())
    except (OSError, ValueError):
        return frozenset()
    return frozenset(map(str, seen)) if isinstance(seen, list) else frozenset()


class Tray:
    """Shows the view and does what is clicked. ``run`` blocks until the user quits."""

    def __init__(self, config_file: Path, *, look_every: float = LOOK_EVERY) -> None:
        import pystray

        self._config_file = config_file
        self._state_dir = state_dir_of(config_file)
        self._look_every = look_every
        self._ended = threading.Event()
        self._seen = _seen_before(self._state_dir)
        self._view: View = view_of(None)
        self._icon: Any = pystray.Icon("towpath", draw("off"), "Towpath", self._menu(pystray))

    def run(self) -> None:
        """Show the icon until the user quits. Raises what the window system says when there is none."""
        self._icon.run(setup=self._started)

    def _started(self, icon: Any) -> None:
        icon.visible = True
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        import pystray

        while not self._ended.wait(0 if self._view.look == "off" and not self._icon.title else self._look_every):
            view = view_of(self._status(), seen=self._seen)
            if view == self._view:
                continue
            if view.look != self._view.look:
                self._icon.icon = draw(view.look)
            self._view = view
            self._icon.title = view.title
            self._icon.menu = self._menu(pystray)
            self._icon.update_menu()

    def _status(self) -> dict[str, Any] | None:
        try:
            return local_socket.ask(self._state_dir, "GET", "/status", timeout=10)
        except TowpathError:
            return None

    # --- menu ----------------------------------------------------------------------------------------------

    def _menu(self, pystray: Any) -> Any:
        return pystray.Menu(*(self._item(pystray, entry) for entry in self._view.menu))

    def _item(self, pystray: Any, entry: Entry) -> Any:
        if entry.text == "-":
            return pystray.Menu.SEPARATOR
        # A single underscore would mark the letter behind it as a key.
        text = entry.text.replace("_", "__") if sys.platform == "linux" else entry.text
        if entry.below:
            return pystray.MenuItem(text, pystray.Menu(*(self._item(pystray, inner) for inner in entry.below)))
        # The default is what a plain click does, and all there is where the window system has no menus for icons.
        clicked = functools.partial(self._clicked, entry)
        return pystray.MenuItem(text, clicked, enabled=bool(entry.action), default=entry.action in ("web", "start"))

    def _clicked(self, entry: Entry, _icon: Any = None, _item: Any = None) -> None:
        # The window system's thread must not wait for the agent.
        threading.Thread(target=self.do, args=(entry,), daemon=True).start()

    def do(self, entry: Entry) -> None:
        """What an entry stands for; trouble becomes a notification."""
        try:
            self._actions()[entry.action](entry.argument)
        except (TowpathError, OSError, KeyError) as error:
            self._icon.notify(str(error), "Towpath")

    def _actions(self) -> dict[str, Callable[[str], object]]:
        return {
            "pause": lambda _: self._ask("/pause"),
            "resume": lambda _: self._ask("/resume"),
            "pause-task": lambda task: self._ask(f"/tasks/{task}/pause"),
            "resume-task": lambda task: self._ask(f"/tasks/{task}/resume"),
            "seen": lambda tasks: self._take_note(tasks.split()),
            "stop": lambda _: self._ask("/stop"),
            "start": lambda _: self._command("start"),
            "update": lambda _: self._command("update", "install"),
            "web": webbrowser.open,
            "sign-in": lambda url: webbrowser.open(f"{url.rstrip('/')}/"),
            "folder": self._open_folder,
            "quit": lambda _: self.end(),
        }

    def _take_note(self, tasks: list[str]) -> None:
        """The user knows of these failures. Of those that the agent has forgotten nothing is kept."""
        status = self._status()
        known = self._seen if status is None else frozenset(failed_tasks(status))
        self._seen = frozenset(tasks) | (self._seen & known)
        write_private_file(self._state_dir / SEEN_FILE, json.dumps(sorted(self._seen)).encode())

    def _ask(self, path: str) -> None:
        local_socket.ask(self._state_dir, "POST", path)

    def _command(self, *words: str) -> None:
        subprocess.run([sys.executable, "-m", "agent", *words, "--config", str(self._config_file)], check=False)

    def _open_folder(self, collection_id: str) -> None:
        config = load_config(self._config_file)
        root = next((row.root for row in config.collections if row.id == collection_id), None)
        if root is None:
            return
        opener = {"darwin": "open", "win32": "explorer"}.get(sys.platform, "xdg-open")
        subprocess.run([opener, root], check=False)

    def end(self) -> None:
        """Take the icon away; the agent goes on."""
        self._ended.set()
        self._icon.stop()
