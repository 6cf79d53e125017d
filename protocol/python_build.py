"""How the Python was built that runs this. Without profiles (``--enable-optimizations``), as pyenv and Spack build it
unless told otherwise, small files take a fifth more processor time (docs/performance.md)."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator

from protocol.findings import Finding

ADVICE = (
    "Use the system's Python, or build one with --enable-optimizations and --with-lto "
    "(pyenv: PYTHON_CONFIGURE_OPTS='--enable-optimizations --with-lto')."
)


def is_unoptimised(
    configured: str | None = sysconfig.get_config_var("CONFIG_ARGS"), prefix: str = sys.base_prefix
) -> bool:
    """Whether this Python is known to have been built without profiles.

    ``configured``: what its ``configure`` was called with; None where nobody called one (Windows). Distributions, whose
    Python has ``prefix`` /usr, ask for profiles elsewhere (Debian by ``make profile-opt``).
    """
    return configured is not None and "--enable-optimizations" not in configured and prefix != "/usr"


def findings() -> Iterator[Finding]:
    """What a doctor has to say of it."""
    if is_unoptimised():
        sentence = (
            f"This Python ({sys.base_prefix}) was built without optimisations: much takes a fifth more processor time."
        )
        yield Finding(level="note", sentence=sentence, advice=ADVICE)
