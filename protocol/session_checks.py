"""Messages of a session that can be decoded, and that no honest peer sends: refused before anything is done with them.

Every function returns nothing, or raises `ProtocolError`, which ends the session.
"""

from __future__ import annotations

from protocol.errors import ProtocolError
from protocol.session import (
    LANE_TIMES,
    MAX_BLOCK,
    MAX_DIGESTS,
    MAX_RANGE,
    MAX_READINGS,
    MIN_BLOCK,
    DigestBlocks,
    LaneReadings,
    ReadRange,
)


def check_readings_untrusted(readings: LaneReadings) -> None:
    """Refuse what no honest source measures."""
    numbers = [readings.now, readings.processor]
    for lane in readings.lanes:
        numbers += [*lane.times, lane.rtt or 0.0, lane.busy or 0.0, lane.window]
        counts = (lane.lane, lane.content, lane.retransmissions)
        if len(lane.times) != LANE_TIMES or not all(0 <= count < 2**63 for count in counts):
            raise ProtocolError("The source reports impossible readings of a lane.")
    if len(readings.lanes) > MAX_READINGS or not all(0 <= number < 1e12 for number in numbers):
        raise ProtocolError("The source reports impossible readings.")


def check_blocks_untrusted(request: DigestBlocks) -> None:
    """Refuse blocks no honest destination asks about."""
    if not MIN_BLOCK <= request.block <= MAX_BLOCK or not 0 < request.count <= MAX_DIGESTS or request.first < 0:
        raise ProtocolError("Digests of impossible blocks were asked for.")
    if (request.first + request.count - 1) * request.block >= request.version[2]:
        raise ProtocolError("Digests beyond the end of the file were asked for.")


def check_range_untrusted(request: ReadRange) -> None:
    """Refuse sizes no honest destination asks for."""
    if not MIN_BLOCK <= request.block <= MAX_BLOCK:
        raise ProtocolError(f"A block of {request.block} bytes is outside what is allowed.")
    size = request.version[2]
    if request.offset < 0 or not 0 < request.length <= MAX_RANGE or request.offset + request.length > size:
        raise ProtocolError("A range outside of the file was asked for.")
