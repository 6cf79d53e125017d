"""Loaded by every Python process of a test run: its random secrets bear a mark, and none may be on a command line.

Python imports a module of this name at its start where ``PYTHONPATH`` leads to it; `tests/conftest.py` sets that. The
mark is looked for in all that tests and the processes they start print, log and put on command lines.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
from typing import Any

MARK = "cAnArY"
# Where processes tell of a secret on a command line.
FOLDER = "TOWPATH_CANARY"
# What has the form of a secret though it bears no mark: the tests' own password, setup keys, private keys and so on.
FORMS = (
    r"quiet boats go by|twp-[A-Za-z0-9_-]{60,}|Bearer [A-Za-z0-9_-]{40,}|\$argon2id\$|key=[A-Za-z0-9_-]{40,}"
    r"|(?:code|refresh_token|access_token|client_secret|password)=[A-Za-z0-9_%-]{8,}|-----BEGIN [A-Z ]*PRIVATE KEY"
)
CANARIES = re.compile(f"{FORMS}|{MARK}[A-Za-z0-9_-]{{20,}}")
_STARTING = frozenset({"subprocess.Popen", "os.exec", "os.posix_spawn"})
_random = secrets.token_urlsafe


def _marked(nbytes: int | None = None) -> str:
    return MARK + _random(nbytes)


def _watch(event: str, details: tuple[Any, ...]) -> None:
    if event not in _STARTING:
        return
    arguments = details[1]
    for argument in arguments if isinstance(arguments, list | tuple) else [arguments]:
        text = os.fsdecode(argument) if isinstance(argument, str | bytes | os.PathLike) else ""
        found = CANARIES.search(text)
        # Python code given as an argument holds words of the tests themselves, such as their password.
        if found is not None and "\n" not in text:
            _tell(f"{os.fsdecode(details[0] or '')}: {found[0][:12]}…")


def _tell(sentence: str) -> None:
    folder = os.environ.get(FOLDER)
    if folder:
        with open(os.path.join(folder, f"arguments-{os.getpid()}"), "a") as file:
            file.write(sentence + "\n")


def _install() -> None:
    if getattr(secrets.token_urlsafe, "__name__", "") != "_marked":
        secrets.token_urlsafe = _marked
        sys.addaudithook(_watch)


_install()
