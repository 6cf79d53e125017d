"""The program behind a request, as far as people can tell programs apart."""

from __future__ import annotations

# Browsers name others for old times' sake, so that the order counts.
_PROGRAMS = (
    ("Edg", "Edge"),
    ("OPR/", "Opera"),
    ("Firefox/", "Firefox"),
    ("FxiOS/", "Firefox"),
    ("CriOS/", "Chrome"),
    ("Chrome/", "Chrome"),
    ("Safari/", "Safari"),
)
_SYSTEMS = (
    ("iPhone", "iPhone"),
    ("iPad", "iPad"),
    ("Android", "Android"),
    ("CrOS", "ChromeOS"),
    ("Windows", "Windows"),
    ("Macintosh", "macOS"),
    ("Linux", "Linux"),
)


def in_words(user_agent: str) -> str:
    """``Firefox on Linux`` for what a browser says of itself; what is not known as it is."""
    if not user_agent.startswith("Mozilla/"):
        return user_agent or "an unknown program"
    program = next((name for mark, name in _PROGRAMS if mark in user_agent), None)
    system = next((name for mark, name in _SYSTEMS if mark in user_agent), None)
    if program is None:
        return user_agent
    return program if system is None else f"{program} on {system}"
