"""How much of a large file is asked for at once, and how much may be under way on one lane."""

from __future__ import annotations

# Bytes asked for on one lane and not yet arrived: enough that a lane always has work, at any round-trip time.
LANE_WINDOW = 24 * 1024 * 1024
RANGE_BYTES = 4 * 1024 * 1024
# Each range costs both ends the same work beside their lanes, half a millisecond together. But what has arrived is
# settled with the end of its range, and should not wait longer than so many seconds for that.
LONG_RANGE, LONG_TIME = 2 * RANGE_BYTES, 0.25
# Where storage is memory alone, what has come is settled, and gives its room back, at once: the longest ranges, and the
# window of a lane, that leave it one while another is settled.
MEMORY_RANGE, MEMORY_WINDOW = 4 * RANGE_BYTES, 8 * RANGE_BYTES


class Ranges:
    """The ranges of one run. ``in_memory``: the destination's storage is memory alone."""

    def __init__(self, *, in_memory: bool) -> None:
        # The longest ranges that are asked for, and the windows they want.
        self._long = [(MEMORY_RANGE, MEMORY_WINDOW)] if in_memory else []
        self._long.append((LONG_RANGE, LANE_WINDOW))
        self.window = self._long[0][1]

    def length(self, lanes: int, slowest: float, budget: int) -> int:
        """How much to ask for with so many lanes, of which the slowest brings so many bytes a second, where so much may
        be on its way: less where that does not fill the windows of all lanes, so that each gets some, and where a lane
        is slow or not known to be fast, since what a range has brought is only seen at its end."""
        for length, window in self._long:
            if lanes * window <= budget and length <= slowest * LONG_TIME:
                return length
        return RANGE_BYTES
