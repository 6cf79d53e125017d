"""The relay passes the project's releases on, and nothing else of its disk."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from relay.api import errors, updates
from relay.pages import render
from relay.settings import Settings


class FakeServices:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings


def client(directory: Path, offered: str | None = "releases") -> httpx.AsyncClient:
    app = FastAPI()
    app.state.services = FakeServices(Settings(directory=str(directory), updates=offered))
    app.include_router(updates.router)
    errors.install(app, frozenset({"towpath"}), render.not_found)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://relay.example")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "releases" / "metadata").mkdir(parents=True)
    (tmp_path / "releases" / "install").mkdir()
    (tmp_path / "releases" / "metadata" / "timestamp.json").write_bytes(b"{}")
    (tmp_path / "releases" / "install" / "install.sh").write_bytes(b"#!/bin/sh\n")
    (tmp_path / "relay.key").write_text("secret")
    (tmp_path / "releases" / "link").symlink_to(tmp_path / "relay.key")
    (tmp_path / "releases" / "circle").symlink_to("circle")
    return tmp_path


async def test_releases_are_served(directory: Path) -> None:
    async with client(directory) as web:
        assert (await web.get("/updates/metadata/timestamp.json")).content == b"{}"
        assert (await web.get("/install.sh")).content == b"#!/bin/sh\n"


@pytest.mark.parametrize(
    "path",
    [
        "../relay.key",
        "%2e%2e/relay.key",
        "link",
        "metadata",
        "",
        "metadata/..%2f..%2frelay.key",
        "/etc/passwd",
        "%00",
        "metadata/timestamp.json%00",
        "x" * 300,
        "circle",
    ],
)
async def test_nothing_else_is_served(directory: Path, path: str) -> None:
    async with client(directory) as web:
        answer = await web.get(f"/updates/{path}")
    assert answer.status_code == 404
    assert "secret" not in answer.text


async def test_a_relay_without_releases_says_so(directory: Path) -> None:
    async with client(directory, None) as web:
        assert "offers no releases" in (await web.get("/install.sh")).text
