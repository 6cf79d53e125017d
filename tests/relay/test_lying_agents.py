"""An agent that says impossible things of a task that it drives: whatever is taken, the task's owner can still read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import msgspec

from protocol.control import AgentEvent, Counters, Flow, LaneFlow, TaskObserved, encode
from protocol.errors import ProtocolError
from relay.transfer.event_stream import LineReader
from tests.relay.transfer_pair import Pair, pair
from tests.relay.transfer_world import until

__all__ = ["pair"]

# As they stand in JSON, which carries more than Python's own would write.
NUMBERS = ("-1", "18446744073709551616", "1" + "0" * 300, "1e308", "-1e308", "NaN")
TEXTS = (
    '"\\ud800"',
    '"\\u0000"',
    '"\\u202e\\u001b[31m"',
    '"0000-00-00"',
    '"9999-12-31T23:59:59-12:00"',
    '"' + "x" * 99_999 + '"',
)


def numbers_and_texts(document: Any, *above: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    steps = document.items() if isinstance(document, dict) else enumerate(document)
    for step, value in steps:
        if isinstance(value, dict | list):
            yield from numbers_and_texts(value, *above, step)
        elif isinstance(value, int | float | str):
            yield (*above, step), value


def with_value(document: dict[str, Any], place: tuple[Any, ...], value: str) -> bytes:
    changed: Any = json.loads(json.dumps(document))
    inner = changed
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = "@"
    return json.dumps(changed).replace('"@"', value).encode() + b"\n"


def lies(task_id: str) -> Iterator[bytes]:
    """Lines in which one value each cannot be."""
    all_of = msgspec.structs.asdict(Counters()), msgspec.structs.asdict(LaneFlow(lane=1, rtt=0.1))
    observed = {
        **msgspec.structs.asdict(TaskObserved(task_id=task_id, revision=1, state="ACTIVE")),
        "counters": all_of[0],
        "flow": {**msgspec.structs.asdict(Flow()), "rate_limit": 1, "lanes": [all_of[1]]},
        "completion_time": "2027-01-15T08:00:01+00:00",
    }
    line = {**msgspec.to_builtins(AgentEvent(n=1, kind="", time="2027-01-15T08:00:01+00:00")), "task_id": task_id}
    seq = 0
    for kind, more in (("event", {"code": "C", "description": "d"}), ("state", {"observed": observed})):
        for place, value in numbers_and_texts({**line, "kind": kind, "seq": 1, **more}):
            if place[-1] in ("kind", "task_id"):
                continue
            for lie in TEXTS if isinstance(value, str) else NUMBERS:
                seq += 1
                yield with_value({**line, "kind": kind, "n": seq, "seq": seq, **more}, place, lie)


async def test_what_an_agent_cannot_mean_spoils_no_answer(pair: Pair) -> None:
    task_id = await pair.running()
    taken = []
    for line in lies(task_id):
        # What cannot be read at all ends the stream, and is asked for again.
        with contextlib.suppress(ProtocolError):
            LineReader().feed_untrusted(line)
            taken.append(line)
    assert len(taken) > 100
    await until(lambda: pair.destination.heard)
    for line in taken:
        pair.destination.send(line)
    await until(lambda: pair.relay.steward.statistics().lines >= len(taken))
    pair.destination.send(
        encode(AgentEvent(n=10**6, kind="event", time="x", task_id=task_id, seq=10**6, code="LAST")) + b"\n"
    )
    await until(lambda: pair.destination.acknowledged[-1:] == [10**6])

    def no_constant(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    for route in (
        f"/task/{task_id}",
        "/task_list",
        f"/task/{task_id}/event_list?limit=1000",
        "/endpoint_manager/task_list",
    ):
        answer = await pair.alice.ask("GET", route)
        assert answer.status_code == 200, answer.text[:500]
        json.loads(answer.content, parse_constant=no_constant)
    shown = await pair.alice.get(f"/task/{task_id}")
    assert shown["files"] >= 0
    assert shown["bytes_transferred"] < 2**63
