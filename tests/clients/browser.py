"""A real headless Chromium, driven through ChromeDriver by the WebDriver protocol (W3C), with nothing between."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

PATIENCE = 30.0
# What a script of the page does on a click may leave the page where it is.
LEAVING = 3.0
_PAGE = "return document.body ? document.body.innerText.slice(0, 2000) : document.readyState"
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Chromium:
    """One browser window. Elements are found by CSS selector and waited for."""

    def __init__(self, http: httpx.Client, session: str) -> None:
        self._http = http
        self._session = session

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = self._http.request(method, f"/session/{self._session}{path}", json=body)
        document = answer.json()["value"]
        if answer.status_code != 200:
            raise LookupError(f"{document['error']}: {document['message'][:500]}")
        return document

    def open(self, url: str) -> None:
        self._ask("POST", "/url", {"url": url})

    @property
    def url(self) -> str:
        return str(self._ask("GET", "/url"))

    @property
    def text(self) -> str:
        return self.text_of("body")

    def find(self, selector: str) -> str:
        """The first element that matches, once there is one."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                found = self._ask("POST", "/element", {"using": "css selector", "value": selector})
                return str(found[_ELEMENT])
            except LookupError as error:
                if "no such element" not in str(error):
                    raise
                if time.monotonic() > deadline:
                    page = self._ask("POST", "/execute/sync", {"script": _PAGE, "args": []})
                    raise LookupError(f"no {selector} at {self.url}, which says: {page}") from error
                time.sleep(0.05)

    def type(self, selector: str, text: str) -> None:
        element = self.find(selector)
        self._ask("POST", f"/element/{element}/clear", {})
        self._ask("POST", f"/element/{element}/value", {"text": text})

    def click(self, selector: str) -> None:
        """Click, and wait a moment for the page to go: the driver may answer before the browser has left it."""
        element = self.find(selector)
        self._ask("POST", f"/element/{element}/click", {})
        deadline = time.monotonic() + LEAVING
        while time.monotonic() < deadline:
            try:
                self._ask("GET", f"/element/{element}/name")
            except LookupError:
                return
            time.sleep(0.02)

    def shows(self, text: str) -> bool:
        """Whether the page says this, now or soon."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.text:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def text_of(self, selector: str) -> str:
        for _ in range(20):
            try:
                return str(self._ask("GET", f"/element/{self.find(selector)}/text"))
            except LookupError as error:
                # The page was replaced between finding and reading.
                if "stale element" not in str(error):
                    raise
        raise LookupError(f"{selector} never stayed")

    def run(self, script: str) -> Any:
        return self._ask("POST", "/execute/sync", {"script": script, "args": []})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def _devtools(self, command: str, **parameters: Any) -> None:
        self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def resize(self, width: int, height: int) -> None:
        """Show pages as on a screen of this size, in CSS pixels, without the window's frame."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._devtools("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, scheme: str) -> None:
        """Be a browser whose user likes ``light`` or ``dark`` pages."""
        self._devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def forget_cookies(self) -> None:
        self._ask("DELETE", "/cookie")

    def add_authenticator(self) -> str:
        """A virtual authenticator that verifies its user by itself (WebAuthn, 11)."""
        return str(
            self._ask(
                "POST",
                "/webauthn/authenticator",
                {
                    "protocol": "ctap2",
                    "transport": "internal",
                    "hasResidentKey": True,
                    "hasUserVerification": True,
                    "isUserVerified": True,
                },
            )
        )


def missing_programs() -> str:
    """What of the browser is not installed; empty when nothing is missing."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return " and ".join(missing)


@contextmanager
def chromium(directory: Path, *, scripts: bool = True, width: int = 1000) -> Iterator[Chromium]:
    """A browser of its own profile; skips the test where Chromium is not installed (tests/install.sh)."""
    driver, binary = shutil.which("chromedriver"), shutil.which("chromium")
    if driver is None or binary is None:
        pytest.skip("chromium and chromedriver are not installed; tests/install.sh installs them")
    log = directory / "chromedriver.log"
    environment = {**os.environ, "HOME": str(directory)}
    with log.open("w") as file:
        process = subprocess.Popen([driver, "--port=0"], stdout=file, stderr=file, env=environment)
    try:
        port = _port(log, process)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
            yield from _window(http, binary, directory, scripts=scripts, width=width)
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _port(log: Path, process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        match = re.search(r"started successfully on port (\d+)", log.read_text())
        if match:
            return int(match[1])
        time.sleep(0.05)
    pytest.fail(f"ChromeDriver did not start: {log.read_text()}")


def _window(http: httpx.Client, binary: str, directory: Path, *, scripts: bool, width: int) -> Iterator[Chromium]:
    arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--window-size={width},900",
        f"--user-data-dir={directory / 'profile'}",
    ]
    options: dict[str, Any] = {"binary": binary, "args": arguments}
    if not scripts:
        options["prefs"] = {"profile.managed_default_content_settings.javascript": 2}
    # The relay's certificate is of its own making, as on a new relay.
    wanted = {"browserName": "chrome", "acceptInsecureCerts": True, "goog:chromeOptions": options}
    answer = http.post("/session", json={"capabilities": {"alwaysMatch": wanted}})
    assert answer.status_code == 200, answer.text
    session = answer.json()["value"]["sessionId"]
    try:
        yield Chromium(http, session)
    finally:
        http.delete(f"/session/{session}")
