"""Who runs a slow build of Python is told, and nobody else."""

import pytest

from protocol import python_build


@pytest.mark.parametrize(
    ("configured", "prefix", "slow"),
    [
        ("'--prefix=/opt/python' '--enable-shared'", "/opt/python", True),
        ("'--prefix=/opt/python' '--enable-optimizations' '--with-lto'", "/opt/python", False),
        # Debian's, which is built with profiles all the same.
        ("'--enable-shared' '--prefix=/usr'", "/usr", False),
        # Windows' has no configure.
        (None, "C:\\Python", False),
    ],
)
def test_only_what_is_known_to_be_slow_is_said_to_be(configured: str | None, prefix: str, slow: bool) -> None:
    assert python_build.is_unoptimised(configured, prefix) is slow


@pytest.mark.parametrize("slow", [True, False])
def test_a_doctor_says_so_with_what_to_do(monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    monkeypatch.setattr(python_build, "is_unoptimised", lambda: slow)
    found = [(finding.level, "--enable-optimizations" in finding.advice) for finding in python_build.findings()]
    assert found == [("note", True)] * slow
