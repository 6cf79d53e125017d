"""Two tasks never write to one place at once, by whatever way and spelling they reach it."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from agent.config.keys import CollectionConfig
from agent.storage.bind_mounts import BindMounts, Shown
from agent.transfer.tasks import places as places_module
from agent.transfer.tasks.places import Places
from agent.transfer.tasks.turns import Candidate, Claim, next_turns
from protocol.control import AgentEvent, TaskItem, TaskOptions, TaskOrder
from protocol.names import CollectionPath
from tests.agent.engine_world import World, world
from tests.agent.orders import order_of

pytestmark = pytest.mark.usefixtures("workers_forked")


def collection(root: Path | str) -> CollectionConfig:
    return CollectionConfig(id="c", name="c", root=str(root))


async def one_place(first: tuple[Path | str, TaskOrder], second: tuple[Path | str, TaskOrder]) -> bool:
    """Whether the second of two tasks, each in a collection with this root, has to wait for the first. Both ways round
    it is the same."""
    places = Places()
    claims = [await places.look(order, collection(root)) for root, order in (first, second)]
    answers = set()
    for order in (claims, claims[::-1]):
        rows = [Candidate(id=str(n), owner_id="o", claim=claim, runnable=True) for n, claim in enumerate(order)]
        answers.add(next_turns(rows, 8, lambda _collection, _running: True).start == ["0"])
    (answer,) = answers
    return answer


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """``real`` with a folder in it, and links that lead there."""
    (tmp_path / "real" / "inside").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "absolute").symlink_to(tmp_path / "real" / "inside")
    (tmp_path / "other" / "up").symlink_to("../link/inside")
    (tmp_path / "chain").symlink_to("other/up")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("real/to/come")
    return tmp_path


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("/link/x", "/real/x", True),
        ("/link/x", "/real/y", False),
        ("/link", "/real/x", True),
        ("/link/x", "/real", True),
        ("/chain/x", "/real/inside/x", True),
        ("/chain", "/absolute/x/y", True),
        ("/other/up/x", "/absolute/x", True),
        # What is made there by the first task only is nothing that leads anywhere yet.
        ("/nowhere/x", "/real/to/come/x", True),
        ("/nowhere", "/real/to", True),
        ("/real/new/a", "/link/new/a/b", True),
        ("/real/new/a", "/link/new/b", False),
        ("/loop/x", "/real/x", False),
        ("/loop/x", "/loop", True),
        # Who replaces the link is not who follows it.
        ("/link/x", "/link", True),
        ("/other", "/chain/x", True),
        ("/other/y", "/chain/x", False),
        ("/Data/x", "/data/x", True),
        ("/DATA/new", "/data", True),
        ("/caf\u00e9/x", "/cafe\u0301/x", True),
        ("/data/x", "/datas/x", False),
        ("/LINK2/x", "/link2/X/y", True),
        ("/", "/link", True),
    ],
)
async def test_ways_to_one_place(top: Path, first: str, second: str, same: bool) -> None:
    assert await one_place((top, order_of(first)), (top, order_of(second))) is same


async def test_collections_in_one_another(top: Path) -> None:
    def at(root: Path, path: str) -> tuple[Path, TaskOrder]:
        return root, order_of(path)

    assert await one_place(at(top, "/real/x"), at(top / "link", "/x"))
    assert await one_place(at(top, "/real"), at(top / "link" / "inside", "/x"))
    assert await one_place(at(top, "/"), at(top / "chain", "/x"))
    assert not await one_place(at(top, "/real/x"), at(top / "chain", "/x"))
    assert await one_place(at(top / "missing", "/x"), at(top, "/missing"))
    assert await one_place(at(top / "REAL", "/x"), at(top, "/link/x"))


async def test_deletes_take_what_is_named_and_not_what_it_leads_to(top: Path) -> None:
    delete = order_of("/link", kind="DELETE")
    assert not await one_place((top, delete), (top, order_of("/real/x")))
    assert await one_place((top, delete), (top, order_of("/link/x")))
    inside = order_of("/link/inside", kind="DELETE")
    assert await one_place((top, inside), (top, order_of("/real/inside/x")))


async def test_a_pattern_may_mean_every_name_in_its_folder(top: Path) -> None:
    pattern = order_of("/link/in*", kind="DELETE", options=TaskOptions(interpret_globs=True))
    assert await one_place((top, pattern), (top, order_of("/real/inside/x")))
    assert not await one_place((top, pattern), (top, order_of("/other/x")))
    name = order_of("/link/in*", kind="DELETE")
    assert not await one_place((top, name), (top, order_of("/real/inside/x")))


def shown(device: str, folder: str, point: str) -> Shown:
    def split(path: str) -> CollectionPath:
        return tuple(part.encode() for part in path.split("/") if part)

    return Shown(device.encode(), split(folder), split(point))


def test_mounts_that_show_what_is_elsewhere_too() -> None:
    table = BindMounts(
        [
            shown("8:1", "/", "/"),
            shown("8:2", "/", "/disk"),
            # A service's sandbox shows folders over themselves.
            shown("8:1", "/home", "/home"),
            shown("8:1", "/home/me", "/srv/me"),
            shown("8:2", "/sub", "/srv/me/sub"),
            shown("8:2", "/", "/again"),
            # Nobody shows the whole of these.
            shown("8:3", "/a/b", "/part"),
            shown("8:3", "/a", "/whole"),
            shown("8:3", "/z", "/last"),
        ]
    )

    def place(path: str) -> str:
        return "/" + b"/".join(table.place(tuple(part.encode() for part in path.split("/") if part))).decode()

    assert place("/home/me/x") == place("/srv/me/x") == "/home/me/x"
    assert place("/srv/me/sub/x") == "/disk/sub/x"
    assert place("/again") == "/disk"
    assert place("/part/x") == "/whole/b/x"
    assert place("/last/x") == "/last/x"
    assert place("/elsewhere") == "/elsewhere"
    assert table.points_below((b"srv",)) == {(b"srv", b"me"), (b"srv", b"me", b"sub")}
    assert not table.points_below((b"home",))


def test_mounts_that_show_one_another_lead_nowhere_for_ever() -> None:
    rows = [shown("1", "/", "/a"), shown("1", "/x", "/a/x"), shown("1", "/x/y", "/a"), shown("1", "/", "/a/x/y")]
    table = BindMounts(rows)
    for path in ((b"a",), (b"a", b"x"), (b"a", b"x", b"y", b"z")):
        assert set(table.place(path)) <= {b"a", b"x", b"y", b"z"}


@pytest.fixture
def bound(top: Path) -> Iterator[Path]:
    """``mounted`` shows ``real``."""
    (top / "mounted").mkdir()
    if subprocess.run(["mount", "--bind", top / "real", top / "mounted"], capture_output=True, check=False).returncode:
        pytest.skip("no bind mounts here")
    yield top
    subprocess.run(["umount", top / "mounted"], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
async def test_bind_mounts(bound: Path) -> None:
    def at(path: str, root: Path = bound) -> tuple[Path, TaskOrder]:
        return root, order_of(path)

    assert await one_place(at("/mounted/inside/x"), at("/chain/x"))
    assert await one_place(at("/mounted/new"), at("/real/new/x"))
    assert await one_place(at("/mounted/inside/x"), at("/real"))
    assert await one_place(at("/x", bound / "mounted"), at("/link"))
    assert not await one_place(at("/mounted/x"), at("/real/y"))
    # All below a folder are also the folders that are shown below it.
    assert await one_place(at("/"), at("/x", bound / "mounted"))
    subprocess.run(["mount", "--bind", bound / "real" / "inside", bound / "other"], check=True)
    try:
        assert await one_place(at("/other/x"), at("/mounted/inside/x"))
        assert await one_place(at("/other"), at("/mounted"))
    finally:
        subprocess.run(["umount", bound / "other"], check=True)


async def test_a_disk_that_does_not_answer_holds_nobody_up(
    top: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Then places are what they are named."""
    order = order_of("/link/x")
    places = Places()

    async def never(*_arguments: object, **_options: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(places_module.trio.to_thread, "run_sync", never)
    begun = trio.current_time()
    claim = await places.look(order, collection(top))
    assert trio.current_time() - begun == places_module.PATIENCE
    assert claim == places.named(order, collection(top))


SLOWLY = TaskOptions(bandwidth_limit=64 * 1024)


async def waits_for(made: World, later: str, earlier: str) -> None:
    """Watch a task wait for another one that runs."""
    with trio.fail_after(30):
        while made.beta.service.get_task(later).status_code != "DESTINATION_BUSY":
            await trio.sleep(0.005)
        while earlier not in made.beta.service.get_task(later).status_sentence:
            await trio.sleep(0.005)
    assert made.beta.service.get_task(earlier).state in ("QUEUED", "ACTIVE")


def _says(line: AgentEvent) -> str:
    return "" if line.observed is None else line.observed.status_sentence


@pytest.mark.parametrize(("one", "other"), [("/link/same", "/real/same"), ("/Same", "/same")])
async def test_tasks_on_one_place_run_one_after_the_other(tmp_path: Path, one: str, other: str) -> None:
    async with world(tmp_path) as made:
        (made.beta.root / "real").mkdir()
        (made.beta.root / "link").symlink_to("real")
        (made.alpha.root / "one").write_bytes(os.urandom(1024 * 1024))
        (made.alpha.root / "two").write_bytes(b"two")
        first = await made.submit([TaskItem(source_path="/one", destination_path=one)], SLOWLY)
        second = await made.submit([TaskItem(source_path="/two", destination_path=other)])
        await waits_for(made, second, first)
        await made.beta.service.pause_task(first)
        assert (await made.wait(second)).state == "SUCCEEDED"


async def test_a_place_is_whose_who_came_first_also_if_it_takes_longer_to_look_at(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        (made.beta.root / "real").mkdir()
        (made.beta.root / "link").symlink_to("real")
        (made.alpha.root / "one").write_bytes(os.urandom(1024 * 1024))
        (made.alpha.root / "two").write_bytes(b"two")
        node, looked = made.beta.service._node, trio.Event()
        claim = node.claim

        async def slow_for_the_first(order: TaskOrder) -> Claim:
            found = await claim(order)
            if order.options == SLOWLY:
                await looked.wait()
            looked.set()
            return found

        node.claim = slow_for_the_first  # type: ignore[method-assign]
        first = await made.submit([TaskItem(source_path="/one", destination_path="/link/same")], SLOWLY)
        second = await made.submit([TaskItem(source_path="/two", destination_path="/real/same")])
        await waits_for(made, second, first)
        assert not made.beta.service._tasks[second].running


async def test_a_task_that_waits_names_the_one_that_has_its_place_now(tmp_path: Path) -> None:
    """Also to the relay."""
    async with world(tmp_path) as made:
        service = made.beta.service
        (made.alpha.root / "one").write_bytes(os.urandom(1024 * 1024))
        item = [TaskItem(source_path="/one", destination_path="/same")]
        first, second, third = [await made.submit(item, SLOWLY) for _ in range(3)]
        await waits_for(made, third, first)
        await service.pause_task(first)
        await waits_for(made, third, second)
        with trio.fail_after(30):
            while not any(second in _says(line) for line in made.events if line.task_id == third):
                await trio.sleep(0.005)
        assert service.get_task(third).status_code == "DESTINATION_BUSY"


async def test_a_link_made_while_a_task_waits_counts_when_it_is_its_turn(tmp_path: Path) -> None:
    async with world(tmp_path) as made:
        service = made.beta.service
        (made.beta.root / "real").mkdir()
        (made.alpha.root / "one").write_bytes(os.urandom(1024 * 1024))
        (made.alpha.root / "two").write_bytes(b"two")
        await service.suspend(suspended=True)
        later = await made.submit([TaskItem(source_path="/two", destination_path="/link/same")])
        await service.pause_task(later)
        await service.suspend(suspended=False)
        first = await made.submit([TaskItem(source_path="/one", destination_path="/real/same")], SLOWLY)
        with trio.fail_after(30):
            while service.get_task(first).state != "ACTIVE":
                await trio.sleep(0.005)
        (made.beta.root / "link").symlink_to("real")
        await service.resume_task(later)
        await waits_for(made, later, first)


async def test_a_collection_that_moves_to_where_another_task_writes_waits_for_it(tmp_path: Path) -> None:
    """Its task runs when its owner moves it: another worker begins only when the place is free."""
    async with world(tmp_path) as made:
        beta, service = made.beta, made.beta.service
        (made.alpha.root / "one").write_bytes(os.urandom(1024 * 1024))
        item = [TaskItem(source_path="/one", destination_path="/same")]
        other = CollectionConfig(id=str(uuid.uuid4()), name="other", root=str(tmp_path / "elsewhere"))
        Path(other.root).mkdir()
        before = beta.policy.collections[0]
        beta.policy.replace([before, other])
        first = await made.submit(item, SLOWLY)
        second = await made.submit(item, SLOWLY, into=other.id)
        with trio.fail_after(30):
            while {service.get_task(task).state for task in (first, second)} != {"ACTIVE"}:
                await trio.sleep(0.005)
        beta.policy.replace([replace(before, root=other.root), other])
        await service.owner_changed({before.id})
        await waits_for(made, first, second)
