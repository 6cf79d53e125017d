"""Rates as people write them: `20 MB/s`, `200 Mbit/s`. Units are decimal; the bit has to be named."""

from __future__ import annotations

import re

# Bytes a second. Below the least a single message would take too long.
LEAST, MOST = 1000, 10**12
_FORM = re.compile(r"([0-9]{1,13}(?:\.[0-9]{1,6})?) ?([kMGT]?)(B|bit)/s")
_POWERS = {"": 0, "k": 3, "M": 6, "G": 9, "T": 12}


def parse_rate(text: str) -> int:
    """Bytes a second. Raises ValueError with a sentence for the user."""
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text[:64]!r} is no rate such as '20 MB/s' or '200 Mbit/s'")
    number = float(match[1]) * float(10 ** _POWERS[match[2]])
    rate = round(number / 8 if match[3] == "bit" else number)
    if not LEAST <= rate <= MOST:
        raise ValueError(f"{text[:64]!r} is outside of 1 kB/s to 1 TB/s")
    return rate


def rate_text(rate: float) -> str:
    """A rate for people, in bytes a second."""
    for power, unit in ((12, "TB/s"), (9, "GB/s"), (6, "MB/s"), (3, "kB/s")):
        if rate >= 10**power:
            return f"{rate / 10**power:.4g} {unit}"
    return f"{rate:.0f} B/s"
