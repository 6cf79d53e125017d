"""Tasks with folders of more names than are held in memory: they do what they do with few, whatever becomes of the disk
on which names are put aside. What a mirror deletes is decided there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from agent.storage.base import Root
from agent.storage.faulty import Call
from protocol.control import TaskOptions
from tests.agent import engine_inside
from tests.agent.engine_inside import Crashed, Engine, Line, contents, open_files, quick_path, skipped, tree, when
from tests.agent.faulty_spill import DAMAGES, Faults, with_small_limits
from tests.agent.folding_root import FoldingRoot, folded

__all__ = ["quick_path"]

MIRROR = TaskOptions(delete_destination_extra=True, sync_level=1)
MANY = [f"many/{number}" for number in range(30)]
EXTRA = [f"many/old {number}" for number in range(12)]
# In another spelling at the destination, where that is one name.
SPELT = ["many/readme", "many/caf\u00e9"]
OTHERS = ["many/README", "many/cafe\u0301"]


def plain(root: Root) -> Root:
    return root


WRAPS = pytest.mark.parametrize("wrap", [plain, FoldingRoot.around])


def scene(base: Path, wrap: Callable[[Root], Root]) -> Engine:
    engine = Engine(base, MIRROR, wrap=wrap)
    tree(engine.source, [*MANY, *SPELT, "few/a", "few/b"])
    tree(engine.destination, [*MANY[:20], *EXTRA, *OTHERS, "few/a", "few/c"])
    return engine


def check(engine: Engine) -> None:
    """The mirror has ended equal, and no name of the source was ever removed."""
    wrapped = engine.wrap is not plain
    spelled = folded if wrapped else bytes
    there = {spelled(os.fsencode(name)) for name in contents(engine.destination)}
    assert there == {spelled(os.fsencode(name)) for name in contents(engine.source)}
    removed = {call.name for call in engine.calls if call.operation == "unlink" and b".towpath." not in call.name}
    extra = {os.fsencode(os.path.basename(name)) for name in (*EXTRA, *(() if wrapped else OTHERS), "c")}
    assert removed == extra
    assert engine.temporaries() == []
    # None of the files has a name; what is open has not been closed.
    assert not [name for name in os.listdir(engine.state) if name.startswith("names")]
    assert open_files(engine.state) == []


@WRAPS
async def test_a_mirror_of_many_names_ends_equal(
    quick_path: Path, wrap: Callable[[Root], Root], monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = with_small_limits(monkeypatch, Faults())
    engine = scene(quick_path, wrap)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert observed.counters.deleted == len(EXTRA) + 1 + (2 if wrap is plain else 0)
    assert min(faults.counts[each] for each in ("open", "write", "read")) > 1
    assert faults.open == 0
    check(engine)


@pytest.mark.parametrize("step", [47, pytest.param(3, marks=pytest.mark.soak)])
@WRAPS
async def test_no_fault_of_the_disk_makes_a_mirror_delete_what_the_source_has(
    quick_path: Path, wrap: Callable[[Root], Root], step: int
) -> None:
    """Calls fail, or are damaged in silence, one in a task each; the task says so, waits, and goes on."""
    waited: dict[str, int] = {}
    for number in range(1, 200, step):
        for operation, fate in (
            ("open", errno.EMFILE),
            *(("write", fate) for fate in (errno.ENOSPC, *DAMAGES[number % 4 :][:1])),
            ("read", errno.EIO),
        ):
            nth = 1 + number // 40 if operation == "open" else number

            def plan(called: str, count: int, wanted: tuple[object, ...] = (operation, nth, fate)) -> int | str | None:
                return wanted[2] if (called, count) == wanted[:2] else None  # type: ignore[return-value]

            with pytest.MonkeyPatch.context() as patch:
                faults = with_small_limits(patch, Faults(plan))
                engine = scene(quick_path / f"{operation} {number} {fate}", wrap)
                observed = await engine.run()
            assert observed.state == "SUCCEEDED", observed
            assert faults.open == 0
            codes = {report.status_code for report in engine.reports if report.state == "WAITING"}
            for code in codes:
                waited[code] = waited.get(code, 0) + 1
            if faults.counts[operation] >= nth:
                assert len(codes) == 1, (operation, nth, fate)
            check(engine)
    print(f"waited for: {waited}")
    assert set(waited) == {"NO_SPACE", "STATE_UNAVAILABLE", "STATE_DAMAGED"}


async def test_nothing_is_deleted_while_names_cannot_be_put_aside(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = with_small_limits(
        monkeypatch, Faults(lambda operation, nth: errno.ENOSPC if operation == "write" else None)
    )
    engine = scene(quick_path, plain)
    seen: list[set[str]] = []

    def mend() -> None:
        seen.append(set(contents(engine.destination)))
        faults.plan = lambda _operation, _nth: None

    engine.on_report = when("NO_SPACE", mend)
    observed = await engine.run()
    assert observed.state == "SUCCEEDED", observed
    assert len(seen) == 1
    assert seen[0] >= {*EXTRA, *OTHERS, "few/c"}
    check(engine)


def die_aside(engine: Engine, number: int, call: Call) -> int | None:
    """Die in this call of those that put names aside or look at them."""
    aside = [each for each in engine.calls if each.operation.startswith("aside")]
    if call.operation.startswith("aside") and len(aside) == number:
        raise Crashed
    return None


def at_the_disk(engine: Engine, operation: str, _nth: int) -> int | None:
    return engine._planned(Call(0, f"aside {operation}", 0, b""))


@WRAPS
async def test_a_task_that_is_killed_while_names_are_aside_lists_again(
    quick_path: Path, wrap: Callable[[Root], Root]
) -> None:
    deaths = 0
    for number in range(3, 400, 40):
        engine = scene(quick_path / str(number), wrap)
        engine.plan = partial(die_aside, engine, number)
        with pytest.MonkeyPatch.context() as patch:
            faults = with_small_limits(patch, Faults())
            faults.plan = partial(at_the_disk, engine)
            try:
                await engine.run()
            except Crashed:
                deaths += 1
                before = engine.calls
                engine = engine.revived()
                engine.wrap = wrap
                faults.plan = lambda _operation, _nth: None
                observed = await engine.run()
                assert observed.state == "SUCCEEDED", observed
                engine.calls = [*before, *engine.calls]
        check(engine)
    print(f"deaths: {deaths}")
    assert deaths > 3


@WRAPS
async def test_a_task_that_is_paused_while_names_are_aside_lists_again(
    quick_path: Path, wrap: Callable[[Root], Root], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is in the middle of a call to the file meanwhile: nobody closes it before that is over."""
    paused = 0
    lines: list[Line] = []

    class KeptLine(Line):
        def __init__(self, engine: Engine, nursery: trio.Nursery) -> None:
            super().__init__(engine, nursery)
            lines.append(self)

    monkeypatch.setattr(engine_inside, "Line", KeptLine)
    for number in range(1, 180, 13):
        engine = scene(quick_path / str(number), wrap)
        with pytest.MonkeyPatch.context() as patch:
            faults = with_small_limits(patch, Faults())

            def pause(_operation: str, _nth: int, faults: Faults = faults, number: int = number) -> None:
                if sum(faults.counts.values()) == number:
                    trio.from_thread.run_sync(lines[-1].want, "pause")

            faults.plan = pause
            observed = await engine.run()
            assert faults.open == 0
            if observed.state == "PAUSED":
                paused += 1
                assert open_files(engine.state) == []
                before, engine = engine.calls, engine.revived()
                engine.wrap = wrap
                observed = await engine.run()
                engine.calls = [*before, *engine.calls]
        assert observed.state == "SUCCEEDED", observed
        check(engine)
    print(f"paused: {paused}")
    assert paused > 5


async def test_collisions_among_many_names_are_those_of_few(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        *(f"{letter}{number}" for letter in "aAb" for number in range(20)),
        "d/x",
        "d/X",
        "caf\u00e9",
        "cafe\u0301",
    ]
    found = []
    for limits in (False, True):
        engine = Engine(quick_path / str(limits), wrap=FoldingRoot.around)
        tree(engine.source, names)
        # The spelling that is there has the name.
        tree(engine.destination, ["a3", "a4", "caf\u00e9"])
        if limits:
            faults = with_small_limits(monkeypatch, Faults())
        observed = await engine.run()
        found.append((observed.counters.failed, skipped(engine), set(contents(engine.destination))))
        if limits:
            assert faults.counts["write"] > 10
            assert faults.open == 0
    assert found[0] == found[1]
    assert {name for name, code in found[0][1].items() if code == "NAME_COLLISION"} >= {"A3", "A4", "a5", "d/x"}
