"""Transfers between two real workers: whole trees, links, errors, resume after kills, cancel and pause."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import trio
import trio.testing

from protocol.control import TaskItem, TaskOptions
from tests.agent import engine_world

pytestmark = pytest.mark.usefixtures("workers_forked")


def tree(root: Path) -> dict[str, tuple[str, bytes | str, int]]:
    """Everything below a folder: kind, content or target, mtime."""
    found: dict[str, tuple[str, bytes | str, int]] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path), 0)
        elif path.is_dir():
            found[name] = ("dir", "", path.stat().st_mtime_ns)
        else:
            found[name] = ("file", path.read_bytes(), path.stat().st_mtime_ns)
    return found


def fill(root: Path) -> None:
    for folder in range(5):
        below = root / "data" / f"folder {folder}"
        below.mkdir(parents=True)
        for number in range(40):
            (below / f"file-{number}").write_bytes(os.urandom(number * 100))
    (root / "data" / "empty").mkdir()
    (root / "data" / "large").write_bytes(os.urandom(9 * 1024 * 1024 + 17))
    (root / "data" / "link").symlink_to("large")
    (root / "data" / os.fsdecode(b"not utf-8 \xff\xfe")).write_bytes(b"named in bytes")


async def test_a_tree_arrives_as_it_is(tmp_path: Path) -> None:
    async with engine_world.world(tmp_path) as world:
        fill(world.alpha.root)
        task = await world.submit(
            [TaskItem(source_path="/data", destination_path="/copy", recursive=True)],
            TaskOptions(verify_checksum=True, preserve_timestamp=True, recursive_symlinks="keep"),
        )
        observed = await world.wait(task)
        assert observed.state == "SUCCEEDED", observed
        assert tree(world.beta.root / "copy") == tree(world.alpha.root / "data")
        counters = observed.counters
        assert (counters.files, counters.files_transferred, counters.failed) == (202, 202, 0)
        assert counters.symlinks_transferred == 1
        assert counters.directories == 7
        assert (
            counters.bytes_transferred
            == sum(path.stat().st_size for path in (world.alpha.root / "data").rglob("*") if path.is_file())
            - (world.alpha.root / "data" / "large").stat().st_size
        )
        page = await world.beta.service.successful(task, None, 150)
        rest = await world.beta.service.successful(task, page.next_marker, 150)
        assert len(page.rows) + len(rest.rows) == 203
        with trio.fail_after(10):
            while not (codes := [event.code for event in world.events if event.kind == "event"])[1:]:
                await trio.sleep(0.01)
        assert codes == ["STARTED", "SUCCEEDED"]


async def test_files_by_themselves_and_their_errors(tmp_path: Path) -> None:
    async with engine_world.world(tmp_path) as world:
        (world.alpha.root / "one").write_bytes(b"1")
        (world.alpha.root / "two").write_bytes(b"22")
        task = await world.submit(
            [
                TaskItem(source_path="/one", destination_path="/new/folder/uno"),
                TaskItem(source_path="/missing", destination_path="/missing"),
                TaskItem(
                    source_path="/two",
                    destination_path="/dos",
                    external_checksum="b6d767d2f8ed5d21a44b0e5886680cb9",
                    checksum_algorithm="MD5",
                ),
                TaskItem(source_path="/two", destination_path="/wrong", external_checksum="0" * 32),
            ]
        )
        observed = await world.wait(task)
        assert observed.state == "FAILED"
        assert (world.beta.root / "new" / "folder" / "uno").read_bytes() == b"1"
        assert (world.beta.root / "dos").read_bytes() == b"22"
        assert sorted(path.name for path in world.beta.root.iterdir()) == ["dos", "new"]
        errors = await world.beta.service.skipped(task, None, 10)
        assert {(row["source_path"], row["error_code"]) for row in errors.rows} == {
            ("/missing", "FILE_NOT_FOUND"),
            ("/two", "VERIFY_CHECKSUM"),
        }


async def test_a_second_run_with_a_sync_level_moves_nothing(tmp_path: Path) -> None:
    async with engine_world.world(tmp_path) as world:
        fill(world.alpha.root)
        item = [TaskItem(source_path="/data", destination_path="/copy", recursive=True)]
        await world.wait(await world.submit(item))
        for level in (0, 1, 2, 3):
            options = TaskOptions(sync_level=level, verify_checksum=True, preserve_timestamp=True)
            observed = await world.wait(await world.submit(item, options))
            assert observed.state == "SUCCEEDED"
            assert (observed.counters.files_skipped, observed.counters.files_transferred) == (202, 0), level
        changed = world.alpha.root / "data" / "large"
        times = changed.stat()
        content = bytearray(changed.read_bytes())
        content[5_000_000] ^= 1
        changed.write_bytes(content)
        os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
        observed = await world.wait(await world.submit(item, TaskOptions(sync_level=3)))
        assert observed.counters.files_transferred == 1
        assert (world.beta.root / "copy" / "large").read_bytes() == bytes(content)


async def test_a_ticket_for_one_folder_opens_no_other(tmp_path: Path) -> None:
    async with engine_world.world(tmp_path) as world:
        (world.alpha.root / "secret").write_bytes(b"secret")
        (world.alpha.root / "open").mkdir()
        (world.alpha.root / "open" / "file").write_bytes(b"open")
        task = await world.submit(
            [
                TaskItem(source_path="/secret", destination_path="/secret"),
                TaskItem(source_path="/open", destination_path="/open", recursive=True),
            ],
            paths="/open",
        )
        assert (await world.wait(task)).state == "FAILED"
        assert [path.name for path in world.beta.root.iterdir()] == ["open"]


def workers() -> list[psutil.Process]:
    alive = [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if "agent.transfer.worker" in " ".join(child.cmdline())]


@pytest.mark.parametrize("kills", [4])
async def test_killed_workers_cost_at_most_what_was_in_flight(tmp_path: Path, kills: int) -> None:
    async with engine_world.world(tmp_path) as world:
        fill(world.alpha.root)
        size = 300 * 1024 * 1024
        with (world.alpha.root / "data" / "huge").open("wb") as file:
            for _ in range(size // (1024 * 1024)):
                file.write(os.urandom(1024 * 1024))
        task = await world.submit(
            [TaskItem(source_path="/data", destination_path="/copy", recursive=True)],
            TaskOptions(verify_checksum=True, preserve_timestamp=True),
        )
        killed = 0
        for share in range(1, kills + 1):
            with trio.fail_after(60):
                while True:
                    observed = world.beta.service.get_task(task)
                    if (
                        observed.counters.bytes_transferred > share * size // (kills + 2)
                        or observed.state == "SUCCEEDED"
                    ):
                        break
                    await trio.sleep(0.005)
            for process in workers()[share % 2 :][:1]:
                os.kill(process.pid, signal.SIGKILL)
                killed += 1
        observed = await world.wait(task, seconds=120)
        assert observed.state == "SUCCEEDED", observed
        assert killed >= 2
        assert observed.counters.bytes_sent_again <= killed * 64 * 1024 * 1024
        (world.alpha.root / "data" / "link").unlink()
        assert tree(world.beta.root / "copy").keys() == tree(world.alpha.root / "data").keys()
        assert (world.beta.root / "copy" / "huge").read_bytes() == (world.alpha.root / "data" / "huge").read_bytes()
        print(f"kills survived: {killed}, bytes sent again: {observed.counters.bytes_sent_again}")


async def test_cancel_leaves_no_temporaries(tmp_path: Path) -> None:
    async with engine_world.world(tmp_path) as world:
        with (world.alpha.root / "huge").open("wb") as file:
            # No holes: they would not be sent.
            for _ in range(512):
                file.write(b"x" * 1024 * 1024)
        task = await world.submit([TaskItem(source_path="/huge", destination_path="/huge")])
        with trio.fail_after(60):
            while not world.beta.service.get_task(task).counters.bytes_transferred:
                await trio.sleep(0.01)
        order = world.beta.service._tasks[task].order
        await world.beta.service.put_task(msgspec.structs.replace(order, revision=2, desired="cancel", items=None))
        assert (await world.wait(task)).state == "CANCELED"
        assert list(world.beta.root.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Where beta's files go: a file system of 4 MiB."""
    place = tmp_path / "beta" / "root"
    place.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "towpath-test", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a file system: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("fail", [True, False])
async def test_a_full_disk_ends_the_task_or_is_waited_for(tmp_path: Path, small_disk: Path, *, fail: bool) -> None:
    async with engine_world.world(tmp_path) as world:
        (world.alpha.root / "small").write_bytes(os.urandom(100_000))
        (world.alpha.root / "large").write_bytes(os.urandom(9_000_000))
        options = TaskOptions(verify_checksum=True, fail_on_quota_errors=fail)
        task = await world.submit([TaskItem(source_path="/", destination_path="/", recursive=True)], options)
        observed = await world.wait(task, states=frozenset({"FAILED", "WAITING"}))
        if fail:
            assert (observed.state, observed.error_code) == ("FAILED", "NO_SPACE")
            assert "no room for" in observed.status_sentence
            assert not [path for path in small_disk.rglob("*") if path.name.startswith(".towpath.")]
        else:
            assert (observed.state, observed.status_code, observed.who) == ("WAITING", "NO_SPACE", "destination owner")
            subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
            observed = await world.wait(task)
            assert observed.state == "SUCCEEDED"
            assert tree(small_disk).keys() == tree(world.alpha.root).keys()


async def test_tasks_wait_while_the_machine_holds_back_and_go_on_afterwards(tmp_path: Path) -> None:
    async with engine_world.world(tmp_path) as world:
        fill(world.alpha.root)
        assert world.beta.service is not None
        await world.beta.service.suspend(suspended=True)
        task = await world.submit(
            [TaskItem(source_path="/data", destination_path="/copy", recursive=True)],
            TaskOptions(preserve_timestamp=True, recursive_symlinks="keep"),
        )
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert world.beta.service.get_task(task).status_code == "HELD_BACK"
        assert not world.beta.service.statistics().running
        assert not (world.beta.root / "copy").exists()
        await world.beta.service.suspend(suspended=False)
        with trio.fail_after(60):
            while world.beta.service.get_task(task).state != "ACTIVE":
                await trio.sleep(0.01)
        # Once more while it runs: the worker settles, and another one finishes.
        await world.beta.service.suspend(suspended=True)
        observed = await world.wait(task, states=frozenset({"PAUSED", "SUCCEEDED"}))
        assert observed.state == "SUCCEEDED" or observed.status_code == "HELD_BACK"
        await world.beta.service.suspend(suspended=False)
        assert (await world.wait(task)).state == "SUCCEEDED"
        assert tree(world.beta.root / "copy") == tree(world.alpha.root / "data")
