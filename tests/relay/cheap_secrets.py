"""What takes a relay processor time on purpose, made to take little: nearly every test makes or checks a secret.

What it takes on a real relay is held by `tests/relay/test_secrets_cost.py`; relays in processes of their own pay it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from argon2 import PasswordHasher
from cryptography.hazmat.primitives.asymmetric import rsa

from relay import keys
from relay.auth import clients, passwords

# As the relay has them; a test that is about what they cost sets them again.
DEAR = (
    (clients, "_LOG_N", clients._LOG_N),
    (clients, "_NOBODY", clients._NOBODY),
    (passwords, "_HASHER", passwords._HASHER),
    (passwords, "_NOBODY", passwords._NOBODY),
)


def set_cheap(patch: pytest.MonkeyPatch) -> None:
    """Digests of few rounds, and each RSA key judged once: whether one is sound takes a tenth of a second."""
    hasher = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
    patch.setattr(passwords, "_HASHER", hasher)
    patch.setattr(passwords, "_NOBODY", hasher.hash("nobody's"))
    patch.setattr(clients, "_LOG_N", 4)
    patch.setattr(clients, "_NOBODY", clients._NOBODY.replace(f"scrypt${DEAR[0][2]}$", "scrypt$4$"))
    judge, sound = keys._load_rsa, {}

    def load(path: Path) -> rsa.RSAPrivateKey:
        content = path.read_bytes() if path.exists() else b""
        if content not in sound:
            sound[content] = judge(path)
        return sound[content]

    patch.setattr(keys, "_load_rsa", load)
