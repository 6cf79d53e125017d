"""Starts the tray application when the user signs in to a desktop: what each system wants, as text and place."""

from __future__ import annotations

import contextlib
import importlib
import os
import plistlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAME = "towpath-tray"
LABEL = "org.towpath.tray"
RUN_KEY = r"Software\Microsoft\Windows\CurrentVersion\Run"
# `install.ps1` removes it.
RUN_VALUE = "Towpath tray"


def desktop_entry(command: Sequence[str]) -> str:
    """An XDG autostart entry (Desktop Application Autostart Specification)."""
    quoted = " ".join(map(_exec_word, command))
    return (
        "[Desktop Entry]\nType=Application\nName=Towpath\nComment=State of the Towpath agent\n"
        f"Exec={quoted}\nTerminal=false\nX-GNOME-Autostart-enabled=true\n"
    )


def _exec_word(word: str) -> str:
    """A word of an entry's ``Exec`` (Desktop Entry Specification, "The Exec key"): in double quotes, within which these
    four have a backslash before them; the value as a whole has its backslashes doubled, and a percent sign is doubled.
    """
    if word and all(character.isalnum() or character in "/._-+:@%" for character in word):
        return word.replace("%", "%%")
    quoted = "".join(f"\\{character}" if character in '"`$\\' else character for character in word)
    return f'"{quoted}"'.replace("\\", "\\\\").replace("%", "%%")


def launch_agent(label: str, command: Sequence[str], log: str | None = None, *, keep_alive: bool = False) -> bytes:
    """A property list for ~/Library/LaunchAgents (launchd.plist(5))."""
    document: dict[str, object] = {"Label": label, "ProgramArguments": list(command), "RunAtLoad": True}
    if keep_alive:
        document["KeepAlive"] = {"SuccessfulExit": False}
        document["ThrottleInterval"] = 10
    document["ProcessType"] = "Background" if keep_alive else "Interactive"
    if log is not None:
        document |= {"StandardOutPath": log, "StandardErrorPath": log}
    return plistlib.dumps(document)


def place(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path:
    """Where the entry belongs on this system."""
    if platform == "darwin":
        return Path.home() / "Library" / "LaunchAgents" / f"{LABEL}.plist"
    value = environment.get("XDG_CONFIG_HOME", "")
    config = Path(value) if value.startswith("/") else Path.home() / ".config"
    return config / "autostart" / f"{NAME}.desktop"


def set_autostart(command: Sequence[str], *, wanted: bool, platform: str = sys.platform) -> Path:
    """Write or remove the entry; where it is (on Windows a value of the registry). Raises OSError."""
    if platform == "win32":
        return _set_run_value(command if wanted else None)
    path = place(platform=platform)
    if not wanted:
        path.unlink(missing_ok=True)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    text = launch_agent(LABEL, command) if platform == "darwin" else desktop_entry(command).encode()
    path.write_bytes(text)
    return path


def _set_run_value(command: Sequence[str] | None) -> Path:
    """The user's own Run key, for which nobody has to be an administrator."""
    # The module is there on Windows alone.
    winreg: Any = importlib.import_module("winreg")
    with winreg.CreateKey(winreg.HKEY_CURRENT_USER, RUN_KEY) as key:
        if command is None:
            with contextlib.suppress(FileNotFoundError):
                winreg.DeleteValue(key, RUN_VALUE)
        else:
            winreg.SetValueEx(key, RUN_VALUE, 0, winreg.REG_SZ, subprocess.list2cmdline(command))
    return Path(f"HKCU\\{RUN_KEY}\\{RUN_VALUE}")
