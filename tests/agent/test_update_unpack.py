"""Bundles are unpacked into their own folder and nowhere else, by every Python that runs an agent."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.update import unpack
from agent.update.offer import UpdateRefused
from agent.update.unpack import unpack_untrusted


def file(name: str, content: bytes = b"new", mode: int = 0o644) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), mode
    return info, content


def odd(name: str) -> tuple[tarfile.TarInfo, bytes]:
    """A file with a name that only an extended header can hold."""
    info, content = file("short")
    info.pax_headers = {"path": name}
    return info, content


def odd_link(name: str, leads: str) -> tuple[tarfile.TarInfo, bytes]:
    info, content = link(name, "short")
    info.pax_headers = {"linkpath": leads}
    return info, content


def other(kind: bytes, name: str, leads: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, leads
    return info, b""


def folder(name: str) -> tuple[tarfile.TarInfo, bytes]:
    return other(tarfile.DIRTYPE, name)


def link(name: str, leads: str) -> tuple[tarfile.TarInfo, bytes]:
    return other(tarfile.SYMTYPE, name, leads)


def second(name: str, leads: str) -> tuple[tarfile.TarInfo, bytes]:
    return other(tarfile.LNKTYPE, name, leads)


def tar_of(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return path


def test_what_a_bundle_holds_is_there_afterwards(tmp_path: Path) -> None:
    members = [
        folder("lib"),
        file("./bin/python3.11", b"program", 0o6777),
        link("bin/python3", "python3.11"),
        link("lib/bin", "../bin"),
        link("lib/nowhere", "not/there"),
        second("bin/python", "bin/python3.11"),
        file("lib/ö", b"text", 0o000),
    ]
    unpack_untrusted(tar_of(tmp_path / "good.tar.gz", members), tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "lib" / "bin" / "python3").read_bytes() == b"program"
    assert (out / "bin" / "python3.11").samefile(out / "bin" / "python")
    modes = {name: (out / name).stat().st_mode & 0o7777 for name in ("bin/python3.11", "lib/ö", "lib", "bin")}
    assert modes == {"bin/python3.11": 0o755, "lib/ö": 0o644, "lib": 0o755, "bin": 0o755}
    assert os.readlink(out / "lib" / "nowhere") == "not/there"


HOSTILE = {
    "above": [file("../evil")],
    "absolute": [file("/tmp/evil-absolute")],
    "above, from below": [folder("a"), file("a/../../evil")],
    "itself": [file(".")],
    "an absolute link": [link("link", "/etc/passwd")],
    "a link out": [link("a/link", "../../evil")],
    "a file through a link": [folder("a"), link("b", "a"), file("b/evil")],
    "a folder in place of a link": [folder("a"), link("b", "a"), folder("b")],
    "a link in place of a folder": [folder("a"), link("a", "..")],
    # Where it leads seems to be inside as long as one looks at its text, or before the last link is there.
    "a link through a link": [folder("a/b"), link("a/b/up", "../.."), link("out", "a/b/up/../evil")],
    "a link that is led out later": [
        link("out", "a/up/evil"),
        folder("a/b"),
        link("a/up", "b/up"),
        link("a/b/up", "../../.."),
    ],
    "a second name of something else": [second("b", "../outside")],
    "a second name of what a link leads to": [file("a"), link("b", "a"), second("c", "b")],
    "a second name through a link": [file("a/x"), link("b", "a"), second("c", "b/x")],
    "a second name of a folder": [folder("a"), second("b", "a")],
    "a second name of nothing": [second("b", "a"), file("a")],
    "a pipe": [other(tarfile.FIFOTYPE, "pipe")],
    "a device": [other(tarfile.CHRTYPE, "device")],
    "a file twice": [file("a"), file("a", b"other")],
    "a file through its link": [file("a"), link("b", "a"), file("b", b"other")],
    "a folder in place of a file": [file("a"), file("a/b")],
    "a NUL": [odd("a\0b")],
    "a link to a NUL": [odd_link("a", "b\0c")],
    "folders without end": [odd("a/" * 5000 + "b")],
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE)
def test_a_bundle_reaches_nothing_but_its_folder(tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    (tmp_path / "outside").write_bytes(b"theirs")
    path = tar_of(tmp_path / "evil.tar.gz", members)
    with pytest.raises(UpdateRefused):
        unpack_untrusted(path, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["evil.tar.gz", "out", "outside"]
    assert (tmp_path / "outside").stat().st_nlink == 1
    assert not Path("/tmp/evil-absolute").exists()


NAMES = st.lists(st.sampled_from(["a", "b", "c", ".."]), min_size=1, max_size=4).map("/".join)
MEMBERS = st.one_of(
    st.builds(file, NAMES), st.builds(folder, NAMES), st.builds(link, NAMES, NAMES), st.builds(second, NAMES, NAMES)
)


@settings(max_examples=150, deadline=None)
@given(st.lists(MEMBERS, max_size=8))
def test_whatever_is_unpacked_stays_inside(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    place = tmp_path_factory.mktemp("bundle")
    path = tar_of(place / "bundle.tar.gz", members)
    try:
        unpack_untrusted(path, place / "out")
    except UpdateRefused:
        assert members
    else:
        inside = str(place / "out")
        for above, folders, files in os.walk(inside):
            for name in [*folders, *files]:
                assert os.path.realpath(os.path.join(above, name)).startswith(inside)
    assert sorted(os.listdir(place)) == ["bundle.tar.gz", "out"]


def test_filters_that_came_with_later_pythons_are_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def extract(*_: Any, numeric_owner: bool = False) -> None:
        """As in Python 3.11.2, where it knows no filter."""

    monkeypatch.setattr(tarfile.TarFile, "extract", extract)
    monkeypatch.setattr(tarfile.TarFile, "extractall", extract)
    unpack_untrusted(tar_of(tmp_path / "good.tar.gz", [file("bin/towpath")]), tmp_path / "out")
    assert (tmp_path / "out" / "bin" / "towpath").read_bytes() == b"new"


@pytest.mark.parametrize(("bound", "most"), [("MAX_UNPACKED", 5), ("MAX_MEMBERS", 1)])
def test_a_bundle_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, most: int) -> None:
    path = tar_of(tmp_path / "large.tar.gz", [file("a"), file("b")])
    monkeypatch.setattr(unpack, bound, most)
    with pytest.raises(UpdateRefused, match="too much"):
        unpack_untrusted(path, tmp_path / "out")
    monkeypatch.setattr(unpack, bound, most + 1)
    unpack_untrusted(path, tmp_path / "other")


def test_a_size_below_zero_makes_room_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    less, content = file("less", b"")
    less.pax_headers = {"size": "-512"}
    path = tar_of(tmp_path / "large.tar.gz", [(less, content), file("a"), file("b")])
    monkeypatch.setattr(unpack, "MAX_UNPACKED", 5)
    with pytest.raises(UpdateRefused, match="too much"):
        unpack_untrusted(path, tmp_path / "out")


@pytest.mark.parametrize("kind", ["gz", "xz"])
def test_a_bundle_that_is_damaged_is_refused(tmp_path: Path, kind: str) -> None:
    """Whatever it is compressed with."""
    path = tmp_path / "bundle"
    with tarfile.open(path, f"w:{kind}") as archive:  # type: ignore[call-overload]
        for name in "abc":
            info, content = file(name, bytes(range(256)) * 2000 + os.urandom(100_000))
            archive.addfile(info, io.BytesIO(content))
    whole, refused = path.read_bytes(), 0
    for at in range(0, len(whole), len(whole) // 20):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            unpack_untrusted(path, tmp_path / f"out{at}")
        except (UpdateRefused, OSError):
            refused += 1
    print(f"damaged {kind}: {refused} refused")
    # Only who has signed the bundle vouches for its bytes.
    assert refused


def test_a_bundle_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    whole = tar_of(tmp_path / "good.tar.gz", [file("a", os.urandom(4096))])
    whole.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(UpdateRefused):
        unpack_untrusted(whole, tmp_path / "out")
