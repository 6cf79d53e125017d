"""What is measured of transfers: where time goes, which side is in the way, and how Prometheus gets to see it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from agent.config.keys import MetricsConfig
from agent.demo.free_port import free_port
from agent.meter import publish
from agent.meter.exposition import MOST_TASKS, AgentNumbers, exposition
from agent.meter.flow import Reading, flow_between
from agent.meter.publish import Publisher
from agent.meter.time_shares import Doing, TimeShares
from agent.meter.verdict import Side, limiting_side, share_out
from protocol.control import Counters, Flow, LaneFlow, TaskObserved
from protocol.errors import ProtocolError
from protocol.session import LANE_TIMES, LaneReading, LaneReadings
from protocol.session_checks import check_readings_untrusted


def shares(**parts: float) -> list[float]:
    return [parts.get(doing.name.lower(), 0.0) for doing in Doing]


def test_times_add_up_to_the_time_that_passed() -> None:
    now = [0.0]
    times = TimeShares(lambda: now[0])
    for doing, seconds in ((Doing.STORAGE, 1.0), (Doing.NETWORK, 2.5), (Doing.STORAGE, 0.5), (Doing.DIGEST, 0.25)):
        times.now(doing)
        now[0] += seconds
    assert times.totals() == [0.0, 0.0, 1.5, 0.25, 2.5]
    assert share_out([0.0] * 5, [0.0, 0.0, 1.0, 1.0, 2.0]) == [0.0, 0.0, 0.25, 0.25, 0.5]
    assert share_out([1.0] * 5, [1.0] * 5) == [0.0] * 5


IDLE = Side(shares=shares(idle=0.6, network=0.4), busy=0.4)
NETWORK = Side(shares=shares(network=1.0), busy=1.0, processor=0.1)
IN_BUFFERS = replace(IDLE, busy=1.0)


@pytest.mark.parametrize(
    ("source", "destination", "verdict"),
    [
        (NETWORK, Side(shares=shares(network=1.0)), "network"),
        (NETWORK, Side(shares=shares(limited=0.9, network=0.1)), "a limit"),
        (Side(shares=shares(limited=0.9, network=0.1)), Side(shares=shares(network=1.0)), "a limit"),
        (Side(shares=shares(storage=0.8, network=0.2)), Side(shares=shares(network=1.0)), "source disk"),
        (Side(shares=shares(storage=0.8), processor=0.99), Side(shares=shares(network=1.0)), "source CPU"),
        (NETWORK, Side(shares=shares(storage=0.8, network=0.2)), "destination disk"),
        # What is on its way over a long path is asked for and unsettled, too.
        (NETWORK, Side(shares=shares(network=1.0), unsettled=0.7), "network"),
        (IDLE, Side(shares=shares(network=1.0), unsettled=0.7), "destination disk"),
        # Whole ranges wait in the kernel's send buffers, and the source's threads for the next ones.
        (IN_BUFFERS, Side(shares=shares(network=1.0), unsettled=0.9), "network"),
        (IN_BUFFERS, Side(shares=shares(network=1.0)), "network"),
        (replace(IN_BUFFERS, window=0.8), Side(shares=shares(network=1.0), unsettled=0.9), "destination disk"),
        (IDLE, Side(shares=shares(network=1.0), unsettled=0.7, processor=0.98), "destination CPU"),
        (NETWORK, Side(shares=shares(network=0.5, digest=0.5), processor=0.98), "destination CPU"),
        (Side(shares=shares(network=1.0), processor=0.97), Side(processor=0.91), "source CPU"),
        (Side(shares=shares(network=1.0), busy=1.0, window=0.8), Side(shares=shares(network=1.0)), "destination CPU"),
        (Side(shares=shares(network=1.0), busy=0.1), Side(shares=shares(network=1.0)), "source CPU"),
        (Side(shares=shares(idle=0.9)), Side(shares=shares(network=1.0)), "planning"),
    ],
)
def test_the_side_that_is_in_the_way(source: Side, destination: Side, verdict: str) -> None:
    assert limiting_side(source, destination) == verdict


def _reading(now: float, content: int, files: int, *, source: bool = True) -> Reading:
    times = [0.0, 0.0, 0.0, 0.0, now]
    at_source = LaneReadings(1, 1000 + now, now * 0.1, [LaneReading(1, content, times, 0.1, 3, now, 0.0)])
    lanes = {1: (content, times, 0.102)}
    return Reading(now, now * 0.05, 0.0, files, lanes, at_source if source else None, {1: content // 2})


def test_readings_of_both_ends_become_rates_and_a_verdict() -> None:
    flow = flow_between(_reading(1.0, 1_000_000, 10), _reading(3.0, 5_000_000, 50))
    assert flow.goodput == 2_000_000
    assert flow.files_per_second == 20
    assert flow.lanes == [LaneFlow(lane=1, goodput=2_000_000, saved=1_000_000, rtt=0.1, retransmissions=3)]
    assert flow.limited_by == "network"


def test_a_source_that_tells_nothing_and_a_lane_that_was_opened_anew() -> None:
    flow = flow_between(_reading(1.0, 9_000_000, 10, source=False), _reading(2.0, 500_000, 10, source=False))
    assert flow.goodput == 500_000
    assert flow.lanes[0].rtt == 0.102
    assert flow_between(Reading(0.0, 0.0, 0.0, 0), Reading(1.0, 0.0, 0.0, 0)) == Flow()


@pytest.mark.parametrize(
    "lane",
    [
        LaneReading(1, -1, [0.0] * LANE_TIMES),
        LaneReading(1, 1, [0.0]),
        LaneReading(1, 1, [float("nan")] * LANE_TIMES),
        LaneReading(1, 1, [-1.0] * LANE_TIMES),
        LaneReading(1, 1, [0.0] * LANE_TIMES, float("inf")),
        LaneReading(1, 1, [0.0] * LANE_TIMES, retransmissions=-1),
    ],
)
def test_impossible_readings_of_a_source_are_refused(lane: LaneReading) -> None:
    with pytest.raises(ProtocolError):
        check_readings_untrusted(LaneReadings(1, 1.0, 1.0, [lane]))
    with pytest.raises(ProtocolError):
        check_readings_untrusted(LaneReadings(1, 1.0, 1.0, [LaneReading(1, 1, [0.0] * LANE_TIMES)] * 1000))


# --- Prometheus ----------------------------------------------------------------------------------------------

NUMBERS = AgentNumbers("1.2", True, False, 1, 2, 3, 400, 500, 20_000_000, None)
FLOW = Flow(limited_by="network", goodput=5e6, files_per_second=2.5, lanes=[LaneFlow(lane=1, goodput=5e6, rtt=0.1)])
TASK = TaskObserved(
    task_id="t", revision=1, state="ACTIVE", counters=Counters(faults=2, files_transferred=7), flow=FLOW
)


def _parse(text: str) -> dict[str, float]:
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    }


def test_the_exposition() -> None:
    ended = TaskObserved(task_id="ended", revision=1, state="SUCCEEDED")
    text = exposition(NUMBERS, [TASK, ended])
    numbers = _parse(text)
    assert numbers['towpath_agent_content_bytes_total{direction="send"}'] == 500
    assert numbers['towpath_agent_bandwidth_limit_bytes_per_second{direction="receive"}'] == 20e6
    assert numbers['towpath_task_faults_total{task="t"}'] == 2
    assert numbers['towpath_task_limited_by{task="t",side="network"}'] == 1
    assert numbers['towpath_lane_round_trip_seconds{task="t",lane="1"}'] == 0.1
    assert "ended" not in text
    kinds = {line.split()[2]: line.split()[3] for line in text.splitlines() if line.startswith("# TYPE")}
    assert all(kind == ("counter" if name.endswith("_total") else "gauge") for name, kind in kinds.items())
    # A name of the agent's own world cannot break the format.
    odd = AgentNumbers('a"b\\c\nd', True, False, 0, 0, 0, 0, 0, None, None)
    assert 'version="a\\"b\\\\c\\nd"' in exposition(odd, [])


def test_prometheus_reads_it_and_it_does_not_grow_with_what_waits() -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is in the extra `test`")

    def series(tasks: list[TaskObserved]) -> dict[tuple[str, tuple[str, ...]], float]:
        text = exposition(NUMBERS, tasks)
        families = list(parser.text_string_to_metric_families(text))
        assert len(families) == text.count("# TYPE ") == text.count("# HELP ")
        assert all(family.type in ("gauge", "counter") and family.documentation for family in families)
        return {
            (sample.name, tuple(sample.labels.values())): sample.value for each in families for sample in each.samples
        }

    def tasks(state: Any, count: int) -> list[TaskObserved]:
        return [
            TaskObserved(task_id=f"{state}-{n}", revision=1, state=state, counters=Counters()) for n in range(count)
        ]

    alone = series([TASK])
    crowd = series([*tasks("QUEUED", 5000), *tasks("WAITING", 7), TASK])
    assert set(crowd) == set(alone)
    assert crowd["towpath_agent_tasks", ("QUEUED",)] == 5000
    assert crowd["towpath_agent_tasks", ("WAITING",)] == 7
    assert crowd["towpath_agent_tasks", ("ACTIVE",)] == alone["towpath_agent_tasks", ("ACTIVE",)] == 1
    assert (
        len({labels[0] for name, labels in series(tasks("ACTIVE", 500)) if name == "towpath_task_state"}) == MOST_TASKS
    )


class _Configured:
    def __init__(self) -> None:
        self.config = MetricsConfig()
        self.looks = 0

    def __call__(self) -> MetricsConfig:
        self.looks += 1
        return self.config


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(publish, "WRITE_EVERY", 0.02)


async def _until(condition: Any) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.01)


@pytest.mark.usefixtures("_quick")
async def test_the_port_opens_and_closes_with_the_configuration() -> None:
    configured = _Configured()
    publisher = Publisher(configured, lambda: exposition(NUMBERS, [TASK]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(publisher.run)
        await _until(lambda: configured.looks > 4)
        assert publisher.port is None
        configured.config = MetricsConfig(port=free_port())
        await _until(lambda: publisher.port is not None)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{publisher.port}", trust_env=False) as client:
            answer = await client.get("/metrics")
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            assert _parse(answer.text)["towpath_agent_linked"] == 1
            assert (await client.get("/")).status_code == 404
            assert (await client.post("/metrics", content=b"x")).status_code == 404
        # Whatever else comes in does no harm.
        for nonsense in (b"", b"\x16\x03\x01" * 100, b"GET /metrics HTTP/1.1\r\n" + b"x" * 40_000):
            stream = await trio.open_tcp_stream("127.0.0.1", publisher.port or 0)
            async with stream:
                await stream.send_all(nonsense)
        configured.config = MetricsConfig()
        await _until(lambda: publisher.port is None)
        nursery.cancel_scope.cancel()


@pytest.mark.usefixtures("_quick")
async def test_neither_web_pages_nor_other_users_get_at_more_than_the_port_offers() -> None:
    publisher = Publisher(lambda: MetricsConfig(port=port), lambda: exposition(NUMBERS, [TASK]))
    port = free_port()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(publisher.run)
        await _until(lambda: publisher.port is not None)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            # A page whose name was re-bound to this machine.
            assert (await client.get("/metrics", headers={"Host": f"evil.example:{port}"})).status_code == 404
            assert (await client.get("/metrics", headers={"Host": f"LOCALHOST:{port}"})).status_code == 200
        # Connections that say nothing: as many as there are places stay, for a while, the others are closed at once.
        idle = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(publish.MAX_CLIENTS + 20)]
        closed = 0
        with trio.fail_after(5):
            for stream in idle[publish.MAX_CLIENTS :]:
                closed += await stream.receive_some(1) == b""
        assert closed == 20
        for stream in idle:
            await stream.aclose()
        nursery.cancel_scope.cancel()


def test_a_link_that_somebody_planted_beside_the_file_is_not_followed(tmp_path: Path) -> None:
    precious, file = tmp_path / "precious", tmp_path / "towpath.prom"
    precious.write_text("precious")
    (tmp_path / f".towpath.prom.{os.getpid()}").symlink_to(precious)
    publish._replace(file, "numbers")
    assert (precious.read_text(), file.read_text()) == ("precious", "numbers")


@pytest.mark.usefixtures("_quick")
async def test_the_file_is_written_whole_and_trouble_with_it_passes(tmp_path: Path) -> None:
    configured = _Configured()
    folder = tmp_path / "exporter"
    configured.config = MetricsConfig(textfile=folder / "towpath.prom")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Publisher(configured, lambda: exposition(NUMBERS, [TASK])).run)
        await _until(lambda: configured.looks > 4)
        # The folder was missing; now it is there.
        folder.mkdir()
        await _until((folder / "towpath.prom").exists)
        assert _parse((folder / "towpath.prom").read_text())["towpath_agent_linked"] == 1
        nursery.cancel_scope.cancel()
    assert [path.name for path in folder.iterdir()] == ["towpath.prom"]
