"""Every page of the relay in a real browser: it reads well on a telephone and in the dark, and without a mouse.

`make screenshots` keeps the pictures (TOWPATH_SCREENSHOTS names the directory). The few that the documents show are in
docs/screenshots.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

import httpx
import pytest
from PIL import Image

from relay.auth.public_clients import TOWPATH_CLI
from relay.auth.scopes import TIMERS_ID, TRANSFER_ALL
from tests.clients.browser import Chromium, chromium
from tests.clients.relay_process import PASSWORD, make_relay, serving

pytestmark = [pytest.mark.clients, pytest.mark.soak]

PROVIDERS = """
name: Example relay
sign_in:
  providers:
    - {id: campus, name: Example University, issuer: https://login.example.edu, client_id: t, domains: [example.edu]}
    - {id: orcid, name: ORCID, issuer: https://orcid.org, client_id: t, domains: [orcid.org]}
"""
WIDE, NARROW = 900, 320

# What is wrong with the page, in words: WCAG 2.1, 1.3.1, 1.4.3, 1.4.10, 2.4.2, 2.4.6, 3.1.1, 3.3.2, 4.1.1.
LOOK = r"""
const wrong = [];
const say = (what, element) => wrong.push(what + ": " + (element ? element.outerHTML.slice(0, 120) : ""));
if (!document.documentElement.lang) say("no language");
if (!document.title.trim()) say("no title");
if (document.querySelectorAll("h1").length !== 1) say("not one heading of the first level");
if (!document.querySelector("main")) say("no main part");
let level = 1;
for (const heading of document.querySelectorAll("h1, h2, h3, h4")) {
  const here = Number(heading.tagName[1]);
  if (here > level + 1) say("a level of headings is left out", heading);
  if (!heading.textContent.trim()) say("an empty heading", heading);
  level = here;
}
const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
for (const id of new Set(ids)) if (ids.filter((one) => one === id).length > 1) say("twice the id " + id);
for (const element of document.querySelectorAll("[aria-describedby], [aria-labelledby], label[for]")) {
  const names = [element.htmlFor, element.getAttribute("aria-describedby"), element.getAttribute("aria-labelledby")];
  for (const id of names.filter(Boolean)) if (!document.getElementById(id)) say("points nowhere", element);
}
for (const field of document.querySelectorAll("input:not([type=hidden]), select, textarea")) {
  if (!field.labels.length && !field.getAttribute("aria-label")) say("a field without a label", field);
}
for (const element of document.querySelectorAll("button, a[href]")) {
  if (!element.textContent.trim() && !element.getAttribute("aria-label")) say("nothing to read", element);
}
const luminance = (color) => {
  const part = color.match(/[\d.]+/g).slice(0, 3).map((text) => {
    const value = Number(text) / 255;
    return value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
};
const ground = (element) => {
  for (let here = element; here; here = here.parentElement) {
    const color = getComputedStyle(here).backgroundColor;
    if (!/^rgba\(.*, 0\)$/.test(color) && color !== "transparent") return color;
  }
  return "rgb(255, 255, 255)";
};
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || !element.checkVisibility()) continue;
  const [one, two] = [luminance(getComputedStyle(element).color), luminance(ground(element))].sort((a, b) => b - a);
  const contrast = (one + 0.05) / (two + 0.05);
  if (contrast < 4.5) say("too little contrast (" + contrast.toFixed(1) + ")", element);
}
const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
if (wide > 0) say("wider than the window by " + wide);
const hit = "button, a.button, input:not([type=hidden]), select, textarea, summary";
for (const element of document.querySelectorAll(hit)) {
  const box = element.getBoundingClientRect();
  if (element.checkVisibility() && (box.height < 24 && element.type !== "checkbox")) say("too small to hit", element);
}
return wrong;
"""


@dataclass
class Album:
    """The pages as they are looked at, one after the other."""

    browser: Chromium
    url: str
    place: Path
    wrong: dict[str, list[str]] = field(default_factory=dict)

    def open(self, path: str) -> None:
        self.browser.open(self.url + path)

    def sign_in(self, name: str = "ada") -> None:
        self.browser.type("#username", name)
        self.browser.type("#password", PASSWORD)
        self.browser.click("form[action='/sign-in'] button")

    def look(self, name: str) -> None:
        """Look at the page that is open, wide, narrow, and in the dark."""
        self.browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
        for kind, width, scheme in (("", WIDE, "light"), ("-narrow", NARROW, "light"), ("-dark", WIDE, "dark")):
            self.browser.prefer(scheme)
            self.browser.resize(width, 400)
            height = int(self.browser.run("return document.documentElement.scrollHeight"))
            self.browser.resize(width, height)
            found = self.browser.run(LOOK)
            if found:
                self.wrong[name + kind] = found
            path = self.place / f"{name}{kind}.png"
            self.browser.screenshot(path)
            # A few colours are enough, and keep the pictures small.
            picture = Image.open(io.BytesIO(path.read_bytes())).convert("RGB").quantize(48)
            picture.save(path, optimize=True)
        self.browser.prefer("light")
        self.browser.resize(WIDE, 900)


@pytest.fixture
def album(tmp_path: Path) -> Iterator[Album]:
    place = Path(os.environ.get("TOWPATH_SCREENSHOTS") or tmp_path / "pictures")
    place.mkdir(parents=True, exist_ok=True)
    relay = make_relay(tmp_path / "relay")
    configuration = relay.directory / "relay.yaml"
    configuration.write_text(configuration.read_text().rstrip() + PROVIDERS)
    relay.add_person("ada", "--full-name", "Ada Lovelace", "--email", "ada@example.edu")
    relay.add_person("ada.work")
    link = relay.run("user", "administrator").strip()
    with serving(relay), chromium(tmp_path) as browser:
        made = Album(browser, relay.url, place)
        made.open(link.removeprefix(relay.url))
        made.look("administrator")
        yield made


def _authorize(**more: str) -> str:
    values = {
        "client_id": "61338d24-54d5-408f-a10d-66c06b59f6d2",
        "response_type": "code",
        "redirect_uri": "http://localhost:1234/",
        "code_challenge": "x" * 43,
        "code_challenge_method": "S256",
        "scope": "openid profile email https://auth.globus.org/scopes/"
        f"{TIMERS_ID}/timer[{TRANSFER_ALL}] {TRANSFER_ALL}",
        "access_type": "offline",
        **more,
    }
    return "/v2/oauth2/authorize?" + urlencode(values)


def test_every_page_can_be_read_by_everybody(album: Album, tmp_path: Path) -> None:
    browser = album.browser
    album.open(_authorize())
    album.look("sign-in")
    browser.type("#username", "ada")
    browser.type("#password", "not my password")
    browser.click("form[action='/sign-in'] button")
    album.look("sign-in-wrong")
    album.sign_in()
    browser.find("button[value=allow]")
    album.look("consent")
    album.open(_authorize(redirect_uri=f"{album.url}/v2/web/auth-code"))
    browser.click("button[value=allow]")
    album.look("code")
    _on_another_device(album, tmp_path)
    _account(album)
    _developers(album)
    album.open("/developers/applications/00000000-0000-4000-8000-000000000000")
    album.look("problem")
    album.open("/account")
    browser.click("form[action='/sign-out'] button")
    album.open("/v2/web/logout")
    album.look("signed-out")
    assert album.wrong == {}


def _on_another_device(album: Album, tmp_path: Path) -> None:
    form = {"client_id": TOWPATH_CLI, "scope": f"openid {TRANSFER_ALL}", "access_type": "offline"}
    made = httpx.post(
        f"{album.url}/v2/oauth2/device_authorization", data=form, headers={"User-Agent": "towpath on beamline"},
        verify=False, trust_env=False,
    ).json()  # fmt: skip
    album.open("/device")
    album.look("device")
    album.browser.type("#code", made["user_code"])
    album.browser.click("main form button")
    album.look("device-consent")
    album.browser.click("button[value=allow]")
    album.look("device-done")


def _account(album: Album) -> None:
    browser = album.browser
    browser.add_authenticator()
    album.open("/account")
    browser.type("#passkey-name", "Laptop")
    browser.click("form[data-passkey=make] button")
    browser.find("form[action='/account/passkeys/remove']")
    album.open("/account")
    browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
    browser.type("#other", "ada.work")
    browser.type("#other-password", PASSWORD)
    browser.click("form[action='/account/link'] button")
    album.look("account")
    for name in ("sessions", "applications"):
        album.open(f"/account/{name}")
        album.look(name)
    album.open("/account/tokens")
    browser.type("#name", "beamline cron")
    browser.type("#days", "7")
    browser.click("form:has(#name) button")
    album.look("tokens")


def _developers(album: Album) -> None:
    browser = album.browser
    album.open("/developers")
    browser.type("#name", "Hub of the institute")
    browser.type("#uris", "http://hub.example.org/hub/oauth_callback")
    browser.click("form:has(#uris) button")
    album.look("register-refused")
    browser.type("#uris", "https://hub.example.org/hub/oauth_callback")
    browser.click("form:has(#uris) button")
    album.look("registered")
    album.open("/developers")
    album.look("developers")
    place = str(browser.run("return document.querySelector('main section li a').pathname"))
    album.open(place)
    browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
    for selector, text in (
        ("#scope-name", "Move"), ("#scope-description", "Move what you found"), ("#suffix", "move"),
        ("#needs", f"+{TRANSFER_ALL}"),
    ):  # fmt: skip
        browser.type(selector, text)
    browser.click("form:has(#suffix) button")
    album.look("application")
    scope = str(browser.run("return document.querySelector('main li a[href*=scopes]').pathname"))
    album.open(scope)
    album.look("scope")
    album.open("/developers")
    project = str(browser.run("return document.querySelector('main section h2 a').pathname"))
    album.open(project)
    browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
    browser.type("#policy-name", "Staff")
    browser.type("#policy-description", "Only staff, signed in within ten minutes")
    browser.type("#minutes", "10")
    browser.click("form:has(#minutes) button")
    album.look("project")
    policy = str(browser.run("return document.querySelector('main li a[href*=policies]').pathname"))
    album.open(policy)
    album.look("policy")


def test_the_pictures_of_the_documents_are_small() -> None:
    place = Path(__file__).parents[2] / "docs" / "screenshots"
    pictures = list(place.glob("*"))
    assert pictures
    for path in pictures:
        assert re.fullmatch(r"[a-z-]+\.png", path.name), path
        assert path.stat().st_size < 60 * 1024, path
