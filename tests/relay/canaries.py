"""What a secret looks like, for finding one where none may be."""

from __future__ import annotations

import re

# What no test may leave in logs or on standard error: the tests' own password, and all that has the form of a secret.
CANARIES = re.compile(
    r"quiet boats go by|twp-[A-Za-z0-9_-]{60,}|Bearer [A-Za-z0-9_-]{40,}|\$argon2id\$|key=[A-Za-z0-9_-]{40,}"
    r"|(?:code|refresh_token|access_token|client_secret|password)=[A-Za-z0-9_%-]{8,}|-----BEGIN [A-Z ]*PRIVATE KEY"
)
