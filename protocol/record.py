"""The base of all records that travel as documents."""

from __future__ import annotations

import msgspec


class Record(msgspec.Struct, kw_only=True, frozen=True):
    """Base of all wire records: immutable, keyword only, unknown keys ignored."""
