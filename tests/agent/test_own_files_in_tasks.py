"""Tasks neither take an agent's own files along, nor replace, nor delete them."""

from __future__ import annotations

from pathlib import Path

from agent.storage.base import Root
from agent.storage.guarded import open_guarded
from protocol.control import TaskItem, TaskOptions
from tests.agent.engine_inside import Engine, quick_path
from tests.agent.own_home import fill

__all__ = ["quick_path"]

MIRROR = TaskOptions(delete_destination_extra=True, sync_level=1)


class HomeEngine(Engine):
    """Both sides are homes with an agent in them."""

    def source_root(self) -> Root:
        return open_guarded(str(self.source), own=self.own(self.source))

    def open_destination(self) -> Root:
        return open_guarded(str(self.destination), own=self.own(self.destination))

    def own(self, home: Path) -> tuple[str, ...]:
        return str(home / ".local/state/towpath/agent"), str(home / "conf/agent.yaml")


def files(home: Path) -> set[str]:
    return {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}


async def test_a_mirror_leaves_them_and_takes_none_along(quick_path: Path) -> None:
    engine = HomeEngine(quick_path, MIRROR)
    fill(engine.destination)
    (engine.destination / ".local/more").write_text("extra")
    (engine.source / "work").mkdir()
    (engine.source / "work/b").write_text("new")
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", (observed, engine.codes())
    assert files(engine.destination) == {".local/state/towpath/agent/node.key", "conf/agent.yaml", "work/b"}
    # other, more, mine, a; the folders that hold the agent's own stay.
    assert (observed.counters.deleted, observed.counters.failed) == (4, 0)


async def test_a_transfer_takes_none_along(quick_path: Path) -> None:
    engine = HomeEngine(quick_path)
    fill(engine.source)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert files(engine.destination) == {".local/state/other", "conf/mine", "work/a"}
    assert observed.counters.files == 3


async def test_a_transfer_puts_nothing_there(quick_path: Path) -> None:
    """From a machine where nobody's agent has those names."""
    engine = HomeEngine(quick_path)
    fill(engine.source)
    fill(engine.destination)
    for path in ("conf/agent.yaml", ".local/state/towpath/agent/node.key"):
        (engine.source / path).write_text("bad")
    engine.own = lambda home: () if home == engine.source else HomeEngine.own(engine, home)  # type: ignore[method-assign]
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", 2), observed
    assert engine.codes().count("PERMISSION_DENIED") == 2
    for path in ("conf/agent.yaml", ".local/state/towpath/agent/node.key"):
        assert (engine.destination / path).read_text() == "secret"


async def test_a_delete_leaves_them_and_says_so(quick_path: Path) -> None:
    items = [TaskItem(source_path=f"/{name}", destination_path="") for name in (".local", "conf", "work")]
    engine = HomeEngine(quick_path, TaskOptions(recursive=True), items=items, type="DELETE")
    fill(engine.destination)
    observed = await engine.run()
    assert (observed.state, observed.counters.failed, observed.counters.deleted) == ("FAILED", 2, 4), observed
    assert engine.codes().count("NOT_EMPTY") == 2
    assert files(engine.destination) == {".local/state/towpath/agent/node.key", "conf/agent.yaml"}
