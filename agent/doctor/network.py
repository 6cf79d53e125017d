"""The network half of the doctor: the way to the relay, what stands in between, and how other agents are reached."""

from __future__ import annotations

import email.utils
import os
import socket
import ssl
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import trio

from agent.connect.addresses import look
from agent.connect.proxy import Dialer
from agent.connect.stun_client import UdpBehaviour, udp_behaviour
from agent.doctor.registry import Examination
from protocol.control import FINAL_STATES
from protocol.errors import TowpathError
from protocol.findings import AUTHORITY_WARNING, Finding
from protocol.interception import EARLY, LATE, NAMES, PORTAL, PROXY, certificate_error

TIMEOUT = 5.0
# A clock that is further off than this makes tickets of two hours look wrong sooner or later (seconds).
CLOCK_SLACK, CLOCK_LIMIT = 5.0, 110.0
# Tasks that are over, of which the path is told.
PATHS_OF_OVER = 3


def _relay(examination: Examination) -> tuple[str, int, str] | None:
    """Host, port and URL of the relay, as far as known."""
    url = examination.config.relay.url if examination.config is not None else None
    if url is None and examination.status is not None:
        url = examination.status["link"]["relay_url"]
    parts = urlsplit(url or "")
    return None if url is None or parts.hostname is None else (parts.hostname, parts.port or 443, url)


def check_relay(examination: Examination) -> Iterator[Finding]:
    """Name, connection, TLS, round trip and clock, each by itself."""
    place = _relay(examination)
    if place is None:
        yield Finding(level="failure", sentence="No relay is configured.", advice="Run `towpath setup`.")
        return
    host, port, url = place
    assert examination.config is not None or examination.status is not None
    proxy = _proxy(examination, host, port)
    if isinstance(proxy, Finding):
        yield proxy
        if proxy.level != "note":
            return
    else:
        ways = list(_direct(host, port))
        yield from ways
        if any(way.level == "failure" for way in ways):
            # Nothing that is asked over it can be said any better.
            return
    yield from _https(examination, url)
    if examination.status is not None and examination.status["link"].get("wrapping") == "websocket":
        yield Finding(
            level="note",
            sentence="The link to the relay is inside WebSocket.",
            advice="A firewall or a proxy lets only real HTTPS pass, or `relay.transport` demands it. Data through the "
            "relay then costs more; a firewall that passes TLS to the relay untouched would make it cheaper.",
            details={"wrapping": "websocket"},
        )


def _proxy(examination: Examination, host: str, port: int) -> Finding | None:
    configured = examination.config.relay.proxy if examination.config is not None else None
    try:
        proxy = Dialer(configured, os.environ).proxy_for(host, port)
    except TowpathError as error:
        return Finding(level="failure", sentence=error.sentence, advice="Mend `relay.proxy` or HTTPS_PROXY.")
    if proxy is None:
        return None
    return Finding(
        level="note",
        sentence=f"The relay is reached through the HTTP proxy {proxy.host} port {proxy.port}.",
        advice="Data then goes through the relay unless another agent can reach this one, or is on the same network.",
        details={"proxy": f"{proxy.host}:{proxy.port}"},
    )


def _direct(host: str, port: int) -> Iterator[Finding]:
    try:
        rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        yield Finding(
            level="failure",
            sentence=f"The relay's name {host} cannot be looked up: {error.strerror or error}.",
            advice="Check the address of the relay and this machine's DNS.",
        )
        return
    best: float | None = None
    failure: OSError | None = None
    for family, _, _, _, address in rows[:6]:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.settimeout(TIMEOUT)
            started = time.monotonic()
            try:
                sock.connect(address)
            except OSError as error:
                failure = error
                continue
            best = min(best or TIMEOUT, time.monotonic() - started)
    if best is None:
        refused = isinstance(failure, ConnectionRefusedError)
        yield Finding(
            level="failure",
            sentence=f"No connection to {host} port {port}: {(failure and failure.strerror) or failure}.",
            advice="Nothing listens there, or a firewall refuses: ask the relay's operator whether it is running, and "
            "compare the address and the port."
            if refused
            else f"Ask for outgoing TCP to port {port}, or set `relay.proxy` where a proxy is required.",
        )
        return
    yield Finding(
        level="ok",
        sentence=f"The relay answers on port {port} after {best * 1000:.0f} ms.",
        details={"round_trip_ms": round(best * 1000, 1), "addresses": sorted({str(row[4][0]) for row in rows})},
    )


def _https(examination: Examination, url: str) -> Iterator[Finding]:
    context = ssl.create_default_context()
    file = examination.config.relay.ca_file if examination.config is not None else None
    configured = examination.config.relay.proxy if examination.config is not None else None
    try:
        if file is not None:
            context = ssl.create_default_context(cafile=str(file))
        proxy = None if configured in (None, "none") else _proxy_url(configured)
        with httpx.Client(verify=context, timeout=TIMEOUT, proxy=proxy, trust_env=configured != "none") as client:
            answer = client.get(f"{url.rstrip('/')}/towpath/v1/relay")
            answer.raise_for_status()
            document = answer.json()
    except (httpx.HTTPError, OSError, ssl.SSLError, ValueError) as error:
        sentence, advice = f"The relay cannot be talked to over HTTPS: {error}.", _what_to_do(error)
        yield Finding(level="failure", sentence=sentence, advice=advice)
        return
    yield from _same_relay(examination, url, document)
    if file is not None:
        yield from _authority(file, document, examination.now)
    yield Finding(level="ok", sentence=f"HTTPS to the relay works (version {document.get('version', 'unknown')}).")
    said = email.utils.parsedate_tz(answer.headers.get("date", ""))
    if said is None:
        return
    off = time.time() - email.utils.mktime_tz(said)
    details = {"clock_off_s": round(off, 1)}
    if abs(off) > CLOCK_LIMIT:
        yield Finding(
            level="failure",
            sentence=f"This machine's clock is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the relay's.",
            advice="Set the clock (NTP): permissions between agents carry times.",
            details=details,
        )
    elif abs(off) > CLOCK_SLACK:
        yield Finding(
            level="warning", sentence=f"The clock is {abs(off):.0f} s off.", advice="Use NTP.", details=details
        )
    else:
        yield Finding(level="ok", sentence="The clock agrees with the relay's.", details=details)


def _what_to_do(error: BaseException) -> str:
    """Advice for trouble with HTTPS, by what is wrong with the certificate if that is it."""
    refused = certificate_error(error)
    code = refused.verify_code if refused is not None else 0
    if code == LATE:
        return "Compare this machine's clock; if it is right, the relay's operator has to renew the certificate."
    if code == EARLY:
        return "Compare this machine's clock, which seems to be behind."
    if code in NAMES:
        return "Compare `relay.url` with the address that the relay's operator gave you."
    return f"{PORTAL} {PROXY}"


def _same_relay(examination: Examination, url: str, document: dict[str, object]) -> Iterator[Finding]:
    """Whether the relay that answers is the one this agent enrolled with."""
    from agent.identity_file import load_identity

    try:
        identity = None if examination.config is None else load_identity(examination.config.state_dir)
    except TowpathError:
        # Another check tells it.
        return
    if identity is not None and document.get("relay_id") != identity.relay_id:
        yield Finding(
            level="failure",
            sentence=f"Another relay answers at {url} than the one this agent is enrolled with.",
            advice="Mend `relay.url`. To go to that relay, set this machine up anew with a state directory of its own.",
        )


def _authority(file: Path, document: dict[str, object], now: float) -> Iterator[Finding]:
    """Whether the relay's own authority, as it was given to this agent, ends soon; ``document`` was read with it."""
    from cryptography import x509

    try:
        ends = max(one.not_valid_after_utc for one in x509.load_pem_x509_certificates(file.read_bytes()))
        offered = x509.load_pem_x509_certificate(str(document.get("ca_certificate")).encode())
    except (OSError, ValueError):
        # A file of several forms, or a relay that shows another authority's certificate: nothing to compare.
        return
    if ends.timestamp() - now > AUTHORITY_WARNING * 86400:
        return
    renewed = offered.not_valid_after_utc > ends
    yield Finding(
        level="warning",
        sentence=f"The relay's authority in {file} ends on {ends:%Y-%m-%d}; no connection works afterwards.",
        advice="The relay has a newer one: put the `ca_certificate` of its /towpath/v1/relay, or the file that its "
        "operator has, in that place, and start the agent again."
        if renewed
        else "Ask the relay's operator to renew it (`towpath-relay authority renew`) and for the new file.",
    )


def _proxy_url(configured: str) -> str:
    return configured if "://" in configured else f"http://{configured}"


def check_nat(examination: Examination) -> Iterator[Finding]:
    """UDP or not, what the NAT does with it, IPv6, and port mapping."""
    place, status = _relay(examination), examination.status
    if place is None or status is None:
        yield Finding(level="note", sentence="This is looked at only while the agent runs.")
        return
    network = status["network"]
    interfaces = look()
    if network["stun_ports"] and network["direct_relay"]:
        own = frozenset(interfaces.addresses)
        yield _udp(trio.run(partial(udp_behaviour, place[0], network["stun_ports"], own)))
    else:
        yield Finding(level="note", sentence="The relay offers no STUN over UDP here, so what UDP can do is not known.")
    outside_v6 = [host for host in interfaces.addresses if ":" in host and not host.startswith(("fc", "fd"))]
    if outside_v6 and "IPv6" in network["families"]:
        yield Finding(
            level="ok",
            sentence=f"IPv6 is there ({outside_v6[0]}) and used.",
            details={"addresses": outside_v6},
        )
    else:
        yield Finding(
            level="note",
            sentence="There is no IPv6 between this machine and the internet."
            if not outside_v6
            else "IPv6 is there, but the data port listens on IPv4 alone.",
            advice="" if not outside_v6 else "Set `data.listen` to `::`.",
        )
    mapped = bool(network["mappings"])
    yield Finding(
        level="ok" if mapped else "note",
        sentence=network["port_mapping"],
        advice=""
        if mapped or network["observed"] in interfaces.addresses
        else "Where you may, switch on PCP, NAT-PMP or UPnP in the router, or forward the data port "
        f"({status['data_port']}) and name the outside address in `data.advertise`.",
        details={"mappings": network["mappings"], "observed": network["observed"]},
    )


def _udp(found: UdpBehaviour) -> Finding:
    details = {
        "udp": found.reachable,
        "mapped": None if found.mapped is None else f"{found.mapped[0]}:{found.mapped[1]}",
        "mapping": found.mapping,
        "filtering": found.filtering,
    }
    if not found.reachable:
        return Finding(
            level="note",
            sentence="UDP to the relay does not pass.",
            advice="Nothing requires it; direct paths are then made over TCP alone.",
            details=details,
        )
    if found.mapping == "none":
        return Finding(level="ok", sentence="UDP passes, and there is no NAT.", details=details)
    if found.mapping == "address-and-port-dependent":
        return Finding(
            level="warning",
            sentence="UDP passes, but the NAT gives each destination another port (symmetric).",
            advice="Direct paths are possible only to agents that can be reached; a port mapping or IPv6 would help.",
            details=details,
        )
    return Finding(
        level="ok",
        sentence="UDP passes, and the NAT keeps one port for all destinations, so direct paths can be made.",
        details=details,
    )


def check_paths(examination: Examination) -> Iterator[Finding]:
    """How the data of the tasks on this machine goes."""
    status = examination.status
    if status is None:
        return
    network = status["network"]
    if network["relay"] != "allow":
        yield Finding(
            level="note",
            sentence=f"Data of this machine may go through the relay: {network['relay']} (`data.relay`).",
        )
    going = [task for task in status["tasks"] if task["state"] not in FINAL_STATES]
    over = [task for task in status["tasks"] if task["state"] in FINAL_STATES and task.get("path")]
    # Those that are over stay for days, and there may be thousands.
    for task in [*going, *over[-PATHS_OF_OVER:]]:
        path = task.get("path", "")
        if not path:
            continue
        relayed = path.startswith(("tunnel", "none"))
        yield Finding(
            level="warning" if relayed else "ok",
            sentence=f"Task {task['task_id']}: {path}",
            advice="A direct path is faster; the reason in brackets says what stood in the way." if relayed else "",
            details={"task": task["task_id"], "path": path},
        )
