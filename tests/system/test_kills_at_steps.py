"""SIGKILL to each real process at each named step of a transfer: the task goes on by itself and nothing is lost.

Each time: the process that comes to the step stops there; the victims are killed; whoever was not killed goes on; what
was killed is started again. Nothing wrong has a final name at the moment of the kill, at most 64 MiB are sent again,
both trees are equal at the end, and the relay tells the task's beginning and end once.

The destination receives with one lane process, which is a victim, too; with ``LANE_PROCESSES=2`` in the environment
with two, and with 0 by itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import operator
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import trio

from agent.transfer.processes.spawn import FORK_SERVER
from tests.system.stopped_world import LANE_PROCESSES, MIB, Outcome, Step, fill, stopped_world


def _steps() -> ModuleType:
    place = Path(__file__).with_name("stops") / "sitecustomize.py"
    spec = importlib.util.spec_from_file_location("towpath_stops", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SOURCE_STEPS = frozenset(
    {"session accepted", "lane joined", "folder listed", "file read", "block read", "pack sent", "range sent"}
)
SOURCE_DAEMON_STEPS = frozenset({"session stored", "connection handed over"})
# Steps that come often are also looked at in the middle.
OFTEN = {"written": 5, "block read back": 4, "renamed": 12, "journal written": 3, "folder synced": 2, "block read": 4}
VICTIMS = ("relay", "alpha", "beta", "alpha's workers", "beta's workers", "all")
if FORK_SERVER:
    VICTIMS += ("alpha's fork server", "beta's fork server")
if LANE_PROCESSES:
    VICTIMS += ("beta's lane processes",)
# All steps for one victim take several minutes; a slice of them (`-k "all-2of4"`) a few.
SLICES = 4


def all_steps() -> list[Step]:
    """Every named step of every process, as the table in `stops` has them."""
    found = []
    for kind, rows in _steps().STEPS.items():
        for name in dict.fromkeys(name for name, _module, _function in rows):
            if kind == "relay":
                actor = "relay"
            elif kind == "daemon":
                actor = "alpha" if name in SOURCE_DAEMON_STEPS else "beta"
            else:
                actor = "alpha's worker" if name in SOURCE_STEPS else "beta's worker"
            found.append(Step(actor, name))
            if name in OFTEN:
                found.append(Step(actor, name, OFTEN[name]))
    return found


def told(outcomes: list[Outcome]) -> None:
    """The counts, for whoever reads the test's output."""
    resumed = [outcome.resumed for outcome in outcomes if outcome.resumed is not None]
    slowest = max(outcomes, key=lambda outcome: outcome.resumed or 0.0)
    print(f"steps: {len({outcome.step for outcome in outcomes})}, kills survived: {len(outcomes)}, ", end="")
    print(f"processes killed: {sum(outcome.killed for outcome in outcomes)}, ", end="")
    print(f"most bytes sent again at once: {max(outcome.again for outcome in outcomes)}")
    print(f"resumed within 3 s: {sum(seconds <= 3 for seconds in resumed)} of {len(resumed)}; slowest: {slowest}")
    print(f"events: {dict(Counter(code for outcome in outcomes for code in outcome.codes))}")


# What costs most when it goes wrong: names half given while everybody dies, blocks half written, an order half noted.
SELECTION = [
    (Step("beta's worker", "renamed", 12), "all"),
    (Step("beta's worker", "written", 5), "beta's workers"),
    (Step("relay", "order sent"), "relay"),
]
# With more content than may be on its way, so that the bound on what is sent again says something: at the start, where
# blocks wait to be checked, where they are read back, and where they begin to count.
LARGE = 512 * MIB + 17
LARGE_STEPS = [
    Step("beta's worker", "written", 40),
    Step("beta's worker", "block received", 300),
    Step("beta's worker", "block read back", 150),
    Step("beta's worker", "journal written", 8),
]
LARGE_VICTIMS = ("alpha", "beta", "beta's workers", "all")


def test_every_step_is_one_of_the_product() -> None:
    """A process whose steps cannot be wrapped comes to none of them, and says so where nobody reads it."""
    for rows in _steps().STEPS.values():
        for name, module, function in rows:
            assert callable(operator.attrgetter(function)(importlib.import_module(module))), name


@pytest.mark.timeout(300)
async def test_kills_at_some_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with stopped_world(tmp_path, monkeypatch) as world:
        expected = fill(world.source / "tree", 8 * MIB + 17)
        outcomes = []
        for step, victims in SELECTION:
            outcome = await world.cell(step, victims, "tree", expected)
            assert outcome.reached, f"{step} was never reached"
            outcomes.append(outcome)
            print(outcome)
        told(outcomes)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", range(SLICES), ids=lambda part: f"{part + 1}of{SLICES}")
@pytest.mark.parametrize("victims", VICTIMS)
async def test_kills_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victims: str, part: int) -> None:
    async with stopped_world(tmp_path, monkeypatch) as world:
        expected = fill(world.source / "tree", 8 * MIB + 17)
        outcomes, problems = [], []
        for step in all_steps()[part::SLICES]:
            try:
                outcome = await world.cell(step, victims, "tree", expected)
                assert outcome.reached, f"{step} was never reached"
            except* (AssertionError, trio.TooSlowError) as group:
                # The others are looked at all the same: together they say more.
                problems.append(f"{step}: {group.exceptions}")
                print("PROBLEM", problems[-1])
            else:
                outcomes.append(outcome)
                print(outcome)
        told(outcomes)
        assert not problems, "\n".join(problems)
        # Some steps come before a session has its processes, or after it.
        assert any(outcome.killed for outcome in outcomes)


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_kills_in_the_middle_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with stopped_world(tmp_path, monkeypatch) as world:
        expected = fill(world.source / "tree", LARGE)
        outcomes = []
        for step in LARGE_STEPS:
            for victims in LARGE_VICTIMS:
                outcome = await world.cell(step, victims, "tree", expected)
                assert outcome.reached, f"{step} was never reached"
                outcomes.append(outcome)
                print(outcome)
                world.clear()
        told(outcomes)
        # Else the kills came too early to cost anything.
        assert max(outcome.again for outcome in outcomes) > 8 * MIB
