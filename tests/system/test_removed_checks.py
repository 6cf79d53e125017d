"""Each check that stands between a stranger and somebody's data is removed in turn, and the tests must notice.

The checks of the relay's routes are found in its code, so that a new route is included without anybody's doing; those
of sessions and the link are named here. Takes minutes, so it belongs to ``make soak``; prints what was noticed.
``PART=2/6`` takes a sixth of the checks.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slices import part

TREE = Path(__file__).parents[2]
STRANGERS = ("tests/agent/test_session_strangers.py",)
LINK = ("tests/agent/test_link_app.py", "tests/agent/test_hostile_relay.py", "tests/agent/test_agent_policy.py")
ROUTES = ("tests/relay/test_transfer_authorization.py",)
OPERATIONS = (*ROUTES, "tests/relay/test_transfer_operations.py", "tests/relay/test_transfer_access.py")
WATCHED = (*ROUTES, "tests/relay/test_transfer_tasks.py", "tests/relay/test_task_managers.py")
AGAIN = (*OPERATIONS, "tests/relay/test_registry.py")
TAKEN = ("tests/relay/test_taken_back.py", "tests/relay/test_transfer_access.py")
REACH = ("tests/agent/test_engine_policy.py",)
SUBMISSIONS = (*ROUTES, "tests/relay/test_transfer_endpoints.py", "tests/relay/test_transfer_submission.py")

# What a removed demand for a token becomes: everybody is the same nobody.
ANYBODY = """


def _anybody() -> Caller:
    return Caller("00000000-0000-4000-8000-000000000000", "nobody", None, "", frozenset())


AnybodyHere = Annotated[Caller, Depends(_anybody)]
"""
_NO_TOKEN = 'caller: __import__("relay.api.transfer_frame", fromlist=["frame"]).AnybodyHere'
# What a removed decision becomes: the row itself, whoever asks.
UNCHECKED = """

def unchecked(connection, collection_id, **_others):
    return load(connection, collection_id.lower())
"""


@dataclass(frozen=True)
class Removal:
    """One check to be removed: in ``path``, the text from ``start`` to ``end`` becomes ``instead``."""

    path: str
    start: int
    end: int
    instead: str
    tests: tuple[str, ...]
    name: str


# File, the check, what stands there without it, tests that must notice.
_POLICY, _SERVE, _TICKET = (
    "agent/transfer/source/source_policy.py",
    "agent/transfer/source/serve.py",
    "protocol/ticket.py",
)
_REGISTRY, _TURNS = "relay/rendezvous/registry.py", "relay/transfer/task_turns.py"
_LINK_APP, _FILES = "agent/link_app.py", "agent/link_files.py"
_UNSIGNED = "options={'verify_signature': False})"
NAMED: list[tuple[str, str, str, tuple[str, ...]]] = [
    ("agent/connect/tls.py", "presented != fingerprint", "False", STRANGERS),
    (_POLICY, "ticket.session_id != self._session_id", "False", STRANGERS),
    (_POLICY, "ticket.task_id != self._task_id", "False", STRANGERS),
    (_POLICY, "source.node_id != self._node_id", "False", STRANGERS),
    (_POLICY, "source.fingerprint != self._fingerprint", "False", STRANGERS),
    (_POLICY, "source.collection_id != self._collection_id", "False", STRANGERS),
    (_POLICY, "ticket.destination.fingerprint != peer_fingerprint", "False", STRANGERS),
    (_POLICY, "any(is_within(path, prefix) for prefix in self._prefixes)", "True", STRANGERS),
    (_SERVE, "hmac.compare_digest(control.instance, instance)", "True", STRANGERS),
    (_SERVE, "self._side.policy.check(path, now)", "pass", STRANGERS),
    (
        _SERVE,
        "self._side.policy.check(folder if covered else paths[-1], now)",
        "pass",
        ("tests/agent/test_faults_seen.py",),
    ),
    (_SERVE, "self._side.policy.check(path, time.time())", "pass", STRANGERS),
    (_SERVE, "len(bodies) > 1 and not self._ahead", "False", STRANGERS),
    (_TICKET, 'claims.get("iss") != self.relay_id', "False", ("tests/protocol/test_ticket.py",)),
    (_TICKET, "now > expires + LEEWAY or now < issued - LEEWAY", "False", STRANGERS),
    (
        _TICKET,
        "claims = msgspec.convert(_decode(key_certificate, self._root), _KeyClaims)",
        f"claims = msgspec.convert(jwt.decode(key_certificate, {_UNSIGNED}, _KeyClaims)",
        STRANGERS,
    ),
    (
        _TICKET,
        "claims = _decode(token, self._certified_key(certificate, kid, now))",
        f"self._certified_key(certificate, kid, now); claims = jwt.decode(token, {_UNSIGNED}",
        STRANGERS,
    ),
    (_LINK_APP, "self._policy.check_operation(operation)", "pass", LINK),
    (_LINK_APP, "_check_ids(request)\n                return", "return", LINK),
    (_FILES, "config = self._policy.check(config.id, path, access)", "pass", LINK),
    (_FILES, "now = self._policy.check(asked.config.id, path, asked.access)", "now = asked.config", LINK),
    (_LINK_APP, 'self._policy.check(order.destination.collection_id, (), "rw")', "pass", LINK),
    (_LINK_APP, 'order.task_id != request.path_params["task"]', "False", LINK),
    (_LINK_APP, 'order.session_id != request.path_params["session"]', "False", LINK),
    (_FILES, "self._check_again(asked)", "pass", LINK),
    (_FILES, "if left:", "if False:", LINK),
    (_FILES, "(now.root, now.hidden) != (asked.config.root, asked.config.hidden)", "False", LINK),
    (_FILES, "ask_again()\n            return listing", "return listing", LINK),
    (_FILES, "ask_again()\n            return entry", "return entry", LINK),
    (_FILES, "ask_again()\n                parent.mkdir(name)", "parent.mkdir(name)", LINK),
    (_FILES, "ask_again()\n                        source.rename", "source.rename", LINK),
    (_FILES, "ask_again()\n                parent.symlink", "parent.symlink", LINK),
    ("agent/policy.py", 'access == "rw" and collection.read_only', "False", LINK),
    ("agent/policy.py", 'component in (b"", b".", b"..") or b"/" in component or b"\\0" in component', "False", LINK),
    (
        "relay/access/decisions.py",
        "if all(wanted in self.at(spot) for spot in list(spots) or [ROOT]):",
        "if True:",
        ROUTES,
    ),
    (
        "relay/transfer/filesystem.py",
        "for folder in reach or [query[0][1]]:",
        "for folder in reach:",
        ("tests/relay/test_narrow_questions.py",),
    ),
    ("relay/transfer/duties.py", "if closed - self._closed:", "if False:", ("tests/relay/test_taken_back.py",)),
    (
        "relay/transfer/bookmarks.py",
        "_bookmark.owner_id == owner_id, _bookmark.id == bookmark_id.lower()",
        "_bookmark.id == bookmark_id.lower()",
        ROUTES,
    ),
    ("relay/transfer/task_rows.py", "task is None or task.owner_id != identity_id", "task is None", ROUTES),
    ("relay/transfer/task_lists.py", "held = [column.owner_id == identity_id, ", "held = [", ROUTES),
    ("relay/transfer/search.py", "_visible(subject), ", "", ROUTES),
    # What was decided before a call waited is decided again.
    ("relay/api/transfer_operations.py", "            raise answer\n", "            return\n", AGAIN),
    ("relay/api/transfer_operations.py", "if answer[1] != reach:", "if False:", AGAIN),
    (
        "relay/transfer/filesystem.py",
        "self._decide_again is not None and trio.current_time() - began > DECISION_HOLDS",
        "False",
        AGAIN,
    ),
    (_REGISTRY, "decide_again is not None and trio.current_time() - came > DECISION_HOLDS", "False", AGAIN),
    (_REGISTRY, "ask() if decide_again is None else _while_allowed(ask, decide_again)", "ask()", AGAIN),
    # Running tasks when a permission is taken away.
    (_TURNS, "if not may.runs:", "if False:", TAKEN),
    (
        _TURNS,
        "_has_tickets(task) and (may.source_reach, may.destination_reach) != (None, None)",
        "False",
        TAKEN,
    ),
    ("agent/transfer/tasks/running_task.py", "self._reach(order) != self._reach(self.order)", "False", REACH),
]


def named() -> Iterator[Removal]:
    for path, check, instead, tests in NAMED:
        text = (TREE / path).read_text()
        at = text.find(check)
        assert at >= 0, f"{path} has no such check any more: {check}"
        yield Removal(path, at, at + len(check), instead, tests, f"{path}: {check.splitlines()[0]}")


def derived() -> Iterator[Removal]:
    """The demand for a token of every route of the Transfer API, and every decision taken in them."""
    for file in sorted((TREE / "relay").rglob("*.py")):
        path, text = str(file.relative_to(TREE)), file.read_text()
        for match in re.finditer(r"caller: CallerHere", text):
            if path.startswith("relay/api/transfer_") and _of_a_route(text, match.start()):
                name = f"{path}:{_line(text, match.start())} token"
                yield Removal(path, *match.span(), _NO_TOKEN, ROUTES, name)
        for call in [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]:
            instead = _without_decision(text, call)
            if instead is not None:
                start, end = _span(text, call)
                yield Removal(path, start, end, instead, _tests_of(path), f"{path}:{call.lineno} decision")


def _tests_of(path: str) -> tuple[str, ...]:
    """The tests that must notice a decision taken out of this file."""
    if path.startswith("relay/transfer/"):
        return SUBMISSIONS
    if path.endswith("_operations.py"):
        return OPERATIONS
    return WATCHED if path.endswith("_managers.py") else ROUTES


def _of_a_route(text: str, at: int) -> bool:
    return "@router." in text[:at].rsplit("\n\n\n", 1)[-1]


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _without_decision(text: str, call: ast.Call) -> str | None:
    callee = ast.unparse(call.func)
    if not callee.endswith(("require", "require_own", "_collection")):
        return None
    arguments = [ast.get_source_segment(text, argument) or "" for argument in call.args]
    if callee == "collections.require":
        return f"collections.unchecked({arguments[0]}, {arguments[1]})"
    if callee == "sight.require":
        return "sight.collection"
    if callee.endswith("require_own"):
        return f"task_rows.load({arguments[0]}, {arguments[1]})"
    if callee in ("_require", "_collection") and len(arguments) == 4:
        return f"services.store.read(partial(collections.unchecked, collection_id={arguments[2]}))"
    return None


def _span(text: str, node: ast.expr) -> tuple[int, int]:
    lines = text.splitlines(keepends=True)
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    start = sum(map(len, lines[: node.lineno - 1])) + len(lines[node.lineno - 1].encode()[: node.col_offset].decode())
    last = lines[node.end_lineno - 1].encode()[: node.end_col_offset].decode()
    return start, sum(map(len, lines[: node.end_lineno - 1])) + len(last)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project once more, to be damaged."""
    place = tmp_path_factory.mktemp("copy")
    for name in ("agent", "relay", "protocol", "conf", "docs", "tests"):
        shutil.copytree(TREE / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TREE / "pyproject.toml", place)
    for file, more in (("relay/transfer/collections.py", UNCHECKED), ("relay/api/transfer_frame.py", ANYBODY)):
        (place / file).write_text((place / file).read_text() + more)
    return place


def still_green(copy: Path, tests: tuple[str, ...]) -> bool:
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *tests]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    return done.returncode == 0


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_removed_check_is_noticed(copy: Path) -> None:
    removals = list(part([*named(), *derived()]))
    for tests in {removal.tests for removal in removals}:
        assert still_green(copy, tests), f"{tests} fail before anything is removed"
    unnoticed = []
    for removal in removals:
        file = copy / removal.path
        whole = file.read_text()
        file.write_text(whole[: removal.start] + removal.instead + whole[removal.end :])
        try:
            if still_green(copy, removal.tests):
                unnoticed.append(removal.name)
        finally:
            file.write_text(whole)
        print("noticed" if removal.name not in unnoticed else "NOT NOTICED", removal.name, flush=True)
    print(f"{len(removals)} checks removed, {len(removals) - len(unnoticed)} noticed")
    assert unnoticed == []


def test_what_would_be_removed_is_there() -> None:
    assert len(list(named())) == len(NAMED) >= 30
    found = list(derived())
    assert len([removal for removal in found if removal.name.endswith("token")]) > 40
    assert len([removal for removal in found if removal.name.endswith("decision")]) > 15
