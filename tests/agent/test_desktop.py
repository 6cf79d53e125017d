"""The tray: what it shows for every state; and how it is started with the desktop."""

from __future__ import annotations

import contextlib
import plistlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.desktop.autostart import desktop_entry, launch_agent, place, set_autostart
from agent.desktop.view import Entry, View, view_of
from tests.agent.desktop_scene import status, task


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
