"""What a run by seed meets: its process dies at some call, and calls fail now and then."""

from __future__ import annotations

import errno
import random
from collections.abc import MutableMapping

from agent.storage.faulty import Call, Plan
from tests.agent.engine_inside import Crashed

PASSING = [errno.EIO, errno.ESTALE, errno.EBUSY]
# Content that reads back wrongly is tried again less often than faults would come; the root answers for itself.
SPARED = frozenset({"preadv", "close_file", "check_original"})


def misfortune(
    chance: random.Random,
    deaths: list[int],
    faults: float,
    met: MutableMapping[str, int],
    spared: frozenset[str] = SPARED,
) -> Plan:
    """For one process: it dies at the call of the last of these numbers, if there is one, which is taken away; each
    call that is not ``spared`` fails with this probability. ``met`` counts ``deaths`` and ``faults``."""
    death = deaths.pop() if deaths else 0
    count = 0

    def plan(call: Call) -> int | None:
        nonlocal count
        count += 1
        if count == death:
            met["deaths"] += 1
            raise Crashed
        if call.operation in spared or chance.random() >= faults:
            return None
        met["faults"] += 1
        return chance.choice(PASSING)

    return plan
