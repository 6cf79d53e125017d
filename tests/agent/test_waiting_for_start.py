"""Which settings a running agent cannot take up: it says so instead of pretending."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from agent.config.keys import AgentConfig, DataConfig, LimitsConfig
from agent.config.layers import waiting_for_start


def test_settings_that_are_read_once_are_named() -> None:
    before = AgentConfig(state_dir=Path("/state"))
    data = DataConfig(port=7, allow_loopback=True, advertise=("data.example.org",))
    limits = LimitsConfig(lanes=2, spare_worker=False)
    after = replace(before, profile="login-node", data=data, limits=limits)
    wanted = {"profile", "data.port", "data.allow_loopback", "data.advertise", "limits.spare_worker"}
    assert set(waiting_for_start(before, after)) == wanted
    assert waiting_for_start(before, replace(before, limits=LimitsConfig(lanes=2))) == []
