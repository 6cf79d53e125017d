"""Removing entries below a folder: what goes, what stays, and what is said then."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from agent.storage.guarded import open_guarded
from agent.storage.own_files import HoldsOwn
from agent.storage.posix import open_root
from agent.transfer.deleting.remove import Removal
from tests.agent.engine_inside import contents, tree


def test_a_folder_that_holds_something_goes_only_with_all_below_it(tmp_path: Path) -> None:
    tree(tmp_path, ["full/below/file", "full/file"])
    (tmp_path / "empty").mkdir()
    removal = Removal()
    with open_root(str(tmp_path)) as root, root.open_directory(()) as top:
        with pytest.raises(OSError, match="not empty") as caught:
            removal.entry(top, top.lstat(b"full"), recursive=False)
        assert caught.value.errno == errno.ENOTEMPTY
        assert (removal.count, len(contents(tmp_path))) == (0, 5)
        removal.entry(top, top.lstat(b"empty"), recursive=False)
        assert removal.count == 1
        removal.entry(top, top.lstat(b"full"), recursive=True)
    assert (removal.count, contents(tmp_path)) == (5, {})


def test_what_is_gone_already_counts_as_none(tmp_path: Path) -> None:
    tree(tmp_path, ["file", "folder/file"])
    removal = Removal()
    with open_root(str(tmp_path)) as root, root.open_directory(()) as top:
        entries = list(top.scan())
        for node in entries:
            Removal().entry(top, node, recursive=True)
        for node in entries:
            removal.entry(top, node, recursive=True)
    assert removal.count == 0


def test_all_but_the_agents_own_goes_and_the_next_entry_is_no_worse_for_it(tmp_path: Path) -> None:
    tree(tmp_path, ["home/a", "home/conf/agent.yaml", "home/conf/mine", "home/z/file", "other/file"])
    removal = Removal()
    own = [str(tmp_path / "home/conf/agent.yaml")]
    with open_guarded(str(tmp_path), own=own) as root, root.open_directory(()) as top:
        with pytest.raises(HoldsOwn):
            removal.entry(top, top.lstat(b"home"), recursive=True)
        assert removal.count == 4
        removal.entry(top, top.lstat(b"other"), recursive=True)
    assert removal.count == 6
    assert set(contents(tmp_path)) == {"home", "home/conf", "home/conf/agent.yaml"}


def test_a_removal_that_ends_in_the_middle_keeps_no_folder_open(tmp_path: Path) -> None:
    tree(tmp_path, ["a/b/c/file"])

    def end() -> None:
        raise KeyboardInterrupt

    with open_root(str(tmp_path)) as root, root.open_directory(()) as top:
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        with pytest.raises(KeyboardInterrupt):
            Removal(end).entry(top, top.lstat(b"a"), recursive=True)
        assert not before or len(os.listdir("/proc/self/fd")) == before
    assert set(contents(tmp_path)) == {"a", "a/b", "a/b/c"}
