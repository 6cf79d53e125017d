"""What holds for every test, wherever it runs: nothing depends on how fast the machine is or how pytest was started."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

settings.register_profile("towpath", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("towpath")

# A shell starts what runs in its background with SIGINT ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
