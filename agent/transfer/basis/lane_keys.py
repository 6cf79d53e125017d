"""When a lane has to be followed by another one, because its TLS keys have protected enough. Pure.

RFC 8446 section 5.5 allows 2^24.5 full-size records under one key of AES-GCM. TLS could update its keys, but no binding
of OpenSSL lets a program ask for that (`ssl`, and pyOpenSSL with the `cryptography` package's library, have no
SSL_key_update), and OpenSSL never does it by itself. A new lane has new keys: it is opened first, then the old one gets
no more work, delivers what was asked of it, and ends. Records are counted whatever their size, which errs on the safe
side: what wears a key out is its blocks of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

# What one record holds at most (RFC 8446 section 5.1).
RECORD = 16 * 1024
# What one key may protect, and where a source ends a lane that its destination, of an older release, has not ended.
LAST_RECORD = int(2**24.5)
# Records after which a lane is followed by another: 256 GiB of full ones, some 70 % of what is allowed. The rest is for
# a network on which no other lane comes up for a while.
KEY_RECORDS = 2**24
# So many times as many records, and a lane gets no more work even if no other one is up. What was asked of it by then,
# a lane's window, has room below the last record.
AT_MOST = 1.4


def records_of(size: int) -> int:
    """Records in which so many bytes go out."""
    return -(-size // RECORD)


class Succession:
    """Which lanes, by their numbers, follow which. A lane is due for another one after ``records``."""

    def __init__(self, records: int) -> None:
        self._records = records
        self._limit = int(records * AT_MOST)
        # From a lane to the one that follows it.
        self._follower: dict[int, int] = {}

    def due(self, records: Mapping[int, int]) -> list[int]:
        """Of lanes and the records each has carried, those that another one should be opened for."""
        return [lane for lane, carried in records.items() if carried >= self._records and lane not in self._follower]

    def spent(self, records: Mapping[int, int]) -> list[int]:
        """Those that must not go on, whether another one is up or not."""
        return [lane for lane, carried in records.items() if carried >= self._limit]

    def opening(self, old: int, new: int) -> None:
        """Another lane is being opened to follow this one."""
        self._follower[old] = new

    def is_followed(self, lane: int) -> bool:
        """Whether another lane takes, or has taken, its place."""
        return lane in self._follower

    def up(self, lane: int) -> list[int]:
        """A lane can be given work: those that may leave for it."""
        return [old for old, new in self._follower.items() if new == lane]

    def gone(self, lane: int) -> None:
        """A lane will not come back. One that waited for it to take its place is due again."""
        for number in [lane, *self.up(lane)]:
            self._follower.pop(number, None)
