"""What holds for every test, wherever it runs: nothing depends on how fast the machine is or how pytest was started.

No test and no process that one starts may print, log or pass on a command line what is secret: every random secret of
the run bears a mark (`canary/sitecustomize.py`), which is looked for in all that comes out.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.canary import sitecustomize as canary

settings.register_profile("towpath", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("towpath")

# A shell starts what runs in its background with SIGINT ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_CANARY = Path(__file__).with_name("canary")
_MAX_LOG = 32 * 1024 * 1024
# The browser's own, which holds the addresses it was sent to.
_FOREIGN = frozenset({"chromedriver.log"})


def pytest_configure(config: pytest.Config) -> None:
    """Let the processes that tests start know of the mark as well."""
    before = os.environ.get("PYTHONPATH")
    if str(_CANARY) not in (before or ""):
        os.environ["PYTHONPATH"] = str(_CANARY) + (os.pathsep + before if before else "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Several workers begin with what runs whole systems: few tests a file, each of many seconds, which at the end
    would keep one worker busy while the others have nothing to do."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.parent.name not in ("system", "network"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail every test after which a secret stands in the log or in what was printed."""
    report = yield
    found = canary.CANARIES.search("".join(text for _, text in report.sections))
    if report.passed and found is not None:
        report.outcome = "failed"
        report.longrepr = f"A secret was logged or printed: {found[0][:12]}…"
    return report


@pytest.fixture(scope="session", autouse=True)
def secrets_stay_secret(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After the last test: no process got a secret as an argument, and none stands in the log of one."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[canary.FOLDER] = folder
        yield
        told = [file.read_text() for file in Path(folder).glob("arguments-*")]
        logs = [path for path in logs_of(tmp_path_factory.getbasetemp()) if holds_secret(path)]
        os.environ.pop(canary.FOLDER, None)
    assert told == [], "secrets were arguments of processes"
    assert logs == [], "secrets stand in these logs"


def logs_of(place: Path) -> Iterator[Path]:
    """The files below a folder that processes wrote their logs to."""
    for folder, _, names in os.walk(place):
        for name in names:
            if (name == "log" or name.endswith((".log", ".err", ".out"))) and name not in _FOREIGN:
                yield Path(folder, name)


def holds_secret(path: Path) -> bool:
    """Whether a log holds what has the form of a secret."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return canary.CANARIES.search(file.read(_MAX_LOG).decode("utf-8", "replace")) is not None
