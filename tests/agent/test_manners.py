"""Transfers wait on battery, in a metered network, and while others need the machine; nothing flaps."""

from __future__ import annotations

import pytest
import trio

from agent import manners
from agent.config.keys import MannersConfig
from agent.manners import Conditions, Manners, Observer, Verdict, decide, parse_metered
from agent.policy import Policy
from protocol.errors import RetryLater

POLITE = MannersConfig(on_battery="pause", on_metered="pause", busy_above=50)


@pytest.mark.parametrize(
    ("now", "word"),
    [
        (Conditions(), ""),
        (Conditions(on_battery=False, metered=False, others=10), ""),
        (Conditions(on_battery=True), "battery"),
        (Conditions(metered=True), "metered"),
    ],
)
def test_reasons(now: Conditions, word: str) -> None:
    reason = decide(POLITE, now, Verdict()).reason
    assert (word in reason) if word else reason == ""
    assert decide(MannersConfig(), now, Verdict()).reason == ""


def test_a_busy_machine_is_busy_after_several_looks_and_quiet_after_several() -> None:
    verdict, said = Verdict(), []
    for others in (90, 10, 90, 90, 90, 45, 45, 45, 45, 30, 30, 60, 30, 30, 30):
        verdict = decide(POLITE, Conditions(others=others), verdict)
        said.append(bool(verdict.reason))
    # 45 is below the limit, but not far enough below to go on.
    assert said == [False] * 4 + [True] * 10 + [False]


def test_what_network_manager_says() -> None:
    text = "GENERAL.STATE:100 (connected)\nGENERAL.METERED:yes (guessed)\nGENERAL.STATE:30 (off)\nGENERAL.METERED:no\n"
    assert parse_metered(text) is True
    assert parse_metered("GENERAL.STATE:100 (connected)\nGENERAL.METERED:no\n") is False
    assert parse_metered("GENERAL.STATE:30\nGENERAL.METERED:yes\n") is None
    assert parse_metered("") is None


def test_the_observer_looks_at_this_machine() -> None:
    observer = Observer()
    observer.look(POLITE)
    others = observer.look(POLITE).others
    assert others is None or 0 <= others <= 100
    assert Observer().look(MannersConfig()) == Conditions()


async def test_transfers_are_told_when_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    conditions = iter([Conditions(on_battery=battery) for battery in (False, True, True, False, False)])
    monkeypatch.setattr(Observer, "look", lambda self, config: next(conditions, Conditions()))
    monkeypatch.setattr(manners, "LOOK_EVERY", 0.001)
    heard: list[str] = []
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:

            async def apply(reason: str) -> None:
                heard.append(reason)
                if len(heard) == 2:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(Manners(lambda: POLITE, apply).run)
    assert "battery" in heard[0]
    assert heard[1] == ""


def test_a_machine_that_holds_back_serves_no_sessions() -> None:
    policy = Policy([])
    policy.check_operation("sessions")
    policy.held_back = "On battery."
    with pytest.raises(RetryLater, match="On battery"):
        policy.check_operation("sessions")
    policy.check_operation("tasks")
