"""Puts the relay together and runs it: one port, one database, one process.

Order of the end: no new connections, requests under way get a moment, agents are told to come back, then everything is
cancelled and the database closed. A relay that is killed instead loses nothing it has acknowledged.
"""

from __future__ import annotations

import datetime
import logging
import signal
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from typing import Any, Protocol

import sqlalchemy.exc
import trio
from fastapi import FastAPI

from protocol.errors import TowpathError
from protocol.findings import AUTHORITY_WARNING
from protocol.places import Places
from protocol.ticket import TicketVerifier
from protocol.websocket.carrier import Carrier
from relay import sdnotify
from relay.api import enrol, transfer_routers
from relay.api.auth_identities import PROVISIONS, PROVISIONS_PERIOD
from relay.app import create_app
from relay.audit.recorder import Recorder
from relay.auth.clients import SecretChecker
from relay.auth.guess_memory import INTERVAL, GuessMemory
from relay.auth.guesses import GuessLimit
from relay.auth.housekeeping import forget_old
from relay.auth.passkeys import AnsweredChallenges
from relay.auth.passwords import PasswordChecker
from relay.auth.tokens import remove_expired
from relay.auth.upstream import Upstream
from relay.dispatch import MAX_PENDING, Dispatcher
from relay.keys import RelayKeys
from relay.listen import accept_all, open_port
from relay.lock import exclusive
from relay.pages.upstream import DEPARTURES, DEPARTURES_PERIOD
from relay.process import collect_seldom, raise_file_limit
from relay.quota.allowance import Allowance
from relay.rendezvous.acceptor import REFUSED_RETRY, accept_link
from relay.rendezvous.observe import Observer
from relay.rendezvous.registry import Registry
from relay.rendezvous.signalling import Signalling
from relay.rendezvous.tunnel.limits import TunnelLimits
from relay.rendezvous.tunnel.service import TunnelService
from relay.rendezvous.tunnel.websocket import WebSocketTunnels
from relay.services import Services
from relay.settings import Settings
from relay.store.batch import Batch
from relay.store.database import Store
from relay.store.migrate import require, upgrade
from relay.tls import CERTIFICATE_WARNING, CertificateStatistics, ServerCertificate
from relay.transfer import revocation
from relay.transfer.collections import decide_all
from relay.transfer.nodes import DatabaseNodeDirectory
from relay.transfer.steward import Steward
from relay.transfer.task_rows import forget_items
from relay.upgrade import Upgrade
from relay.web import WebServer

logger = logging.getLogger("relay.server")

GRACE = 5.0
_GOODBYE = 2.0
_UPKEEP_INTERVAL = 60.0
_CLEANING_INTERVAL = 3600.0
_DAY = 86400.0
# How often to look whether the wall clock has jumped, and by how much (seconds) it counts as such.
_CLOCK_LOOK, _CLOCK_JUMP = 5.0, 60.0
_BACKLOG = 4096
# How many more tries an address has than one client at that address.
_CROWD = 10
# Agents that lose their relay on purpose come back after this many seconds, spread by their own jitter.
_RETRY_AFTER = 2.0


class _Observed(Protocol):
    def statistics(self) -> Any: ...


@dataclass(frozen=True)
class Relay:
    """The parts of one relay, put together and not yet running."""

    services: Services
    app: FastAPI
    certificate: ServerCertificate
    web: WebServer
    dispatcher: Dispatcher
    registry: Registry
    steward: Steward
    signalling: Signalling
    observer: Observer
    tunnel: TunnelService
    carrier: Carrier
    guess_memory: GuessMemory

    def statistics(self) -> dict[str, Any]:
        """What every part says of itself."""
        parts: dict[str, _Observed] = {
            "web": self.web,
            "dispatch": self.dispatcher,
            "links": self.registry,
            "stun": self.observer,
            "signalling": self.signalling,
            "tasks": self.steward,
            "tunnel": self.tunnel,
            "websocket": self.carrier,
            "store": self.services.store,
            "guesses": self.services.guesses,
            "audit": self.services.audit,
            "requests": self.services.requests,
            "keys": self.services.keys,
            "certificate": self.certificate,
        }
        return {name: asdict(part.statistics()) for name, part in parts.items()}


def build(settings: Settings, store: Store, clock: Callable[[], float] = time.time) -> Relay:
    """Put the parts together. Raises `KeysUnusable` and `CertificateUnusable`."""
    keys = RelayKeys(settings.directory_path / "keys")
    keys.renew(clock(), key_life=settings.tickets.key_life, ticket_life=settings.tickets.life)
    certificate = ServerCertificate(settings)
    registry = Registry()
    tunnel = _tunnel(keys, settings, clock)
    signalling = Signalling(registry, tunnel)
    verifier = TicketVerifier(keys.relay_id, keys.root_public_pem)
    steward = Steward(store, registry, keys.signer, settings, clock, signalling, verifier, tunnel.cut_session)
    services = _services(settings, store, keys, registry, steward, clock)
    app = create_app(services, [*transfer_routers.ROUTERS, enrol.router])
    proxies, most = settings.listen.front, settings.limits.connections
    web = WebServer(app, max_connections=most, proxies=proxies)
    observer = Observer(signalling.seen)
    carrier = tunnel.carrier
    tunnels = WebSocketTunnels(tunnel.acceptor, carrier, proxies)
    accept = _link_handler(services, certificate, observer)
    upgrade = Upgrade(
        web.serve, accept, tunnels.carry if tunnel.enabled else None, places=Places(most), proxies=proxies
    )
    dispatcher = Dispatcher(
        web=upgrade.serve,
        link=accept,
        tunnel=tunnel.acceptor.accept if tunnel.enabled else None,
        stun=observer.serve_stream,
        websocket=lambda: tunnels.take if tunnel.enabled and carrier.is_up else None,
        tls_context=certificate.context,
        link_context=certificate.link_context,
        # Half of what may be open at all: the other half is for those who have come through.
        places=Places(max(MAX_PENDING, raise_file_limit() // 2)),
        proxies=proxies,
    )
    limits = {"one": services.guesses, "crowd": services.crowd_guesses}
    relay = Relay(
        services=services,
        app=app,
        certificate=certificate,
        web=web,
        dispatcher=dispatcher,
        registry=registry,
        steward=steward,
        signalling=signalling,
        observer=observer,
        tunnel=tunnel,
        carrier=carrier,
        guess_memory=GuessMemory(store, limits, settings.sign_in.failures_window),
    )
    app.state.statistics = relay.statistics
    return relay


def _services(
    settings: Settings,
    store: Store,
    keys: RelayKeys,
    registry: Registry,
    steward: Steward,
    clock: Callable[[], float],
) -> Services:
    """What requests of the web need."""
    sign_in = settings.sign_in
    return Services(
        settings=settings,
        store=store,
        keys=keys,
        signer=keys.signer,
        registry=registry,
        steward=steward,
        secrets=SecretChecker(store),
        passwords=PasswordChecker(store),
        passkey_answers=AnsweredChallenges(clock()),
        upstreams={provider.id: Upstream(provider, settings.directory_path, clock) for provider in sign_in.providers},
        guesses=GuessLimit(sign_in.failures, sign_in.failures_window),
        crowd_guesses=GuessLimit(sign_in.failures * _CROWD, sign_in.failures_window),
        audit=Recorder(store, clock),
        requests=Allowance(settings.limits.user_requests, settings.limits.user_requests_period),
        provisions=Allowance(PROVISIONS, PROVISIONS_PERIOD),
        departures=Allowance(DEPARTURES, DEPARTURES_PERIOD),
        decisions=Batch(store.read, lambda connection, asked: decide_all(connection, asked, clock())),
        clock=clock,
    )


def _tunnel(keys: RelayKeys, settings: Settings, clock: Callable[[], float]) -> TunnelService:
    wanted = settings.tunnel
    limits = TunnelLimits(
        session_bytes=wanted.session_bytes,
        user_bytes=wanted.user_bytes,
        session_rate=wanted.session_rate,
        user_rate=wanted.user_rate,
        total_rate=wanted.total_rate,
    )
    return TunnelService(
        keys.signer,
        keys.root_public_pem,
        limits,
        url=settings.public_url,
        processes=wanted.processes,
        max_pairs=wanted.connections,
        clock=clock,
    )


def _link_handler(
    services: Services, certificate: ServerCertificate, observer: Observer
) -> Callable[[trio.abc.Stream], Awaitable[None]]:
    nodes = DatabaseNodeDirectory(services.store)
    # Once: finding it out reads files.
    version = metadata.version("towpath")
    proxies = services.settings.listen.front

    async def accept(stream: trio.abc.Stream) -> None:
        await accept_link(
            stream,
            registry=services.registry,
            nodes=nodes,
            signer=services.signer,
            # Read now: the certificate may have been renewed since the relay started.
            channel=certificate.channel,
            relay_id=services.keys.relay_id,
            version=version,
            stun_ports=observer.ports,
            proxies=proxies,
        )

    return accept


async def serve(settings: Settings) -> None:
    """Run the relay until SIGTERM or SIGINT.

    Raises `AlreadyRunning`, `NoDatabase`, the store's errors, what `build` raises, and `PortUnusable`.
    """
    database = settings.directory_path / settings.database.file
    # Where there is no folder for it there is no database either, which is said below.
    with exclusive(settings.directory_path, database if database.parent.is_dir() else None):
        store = Store(settings.database_url, readers=settings.database.readers)
        try:
            await trio.to_thread.run_sync(require, store.writing_engine, store.path)
            await trio.to_thread.run_sync(upgrade, store.writing_engine)
            relay = await trio.to_thread.run_sync(build, settings, store)
            await _run(relay, settings)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(store.close)


async def _run(relay: Relay, settings: Settings) -> None:
    listeners = await open_port(settings.listen.host, settings.listen.port, _BACKLOG)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            await nursery.start(relay.tunnel.run)
            if relay.tunnel.enabled:
                await relay.carrier.serve(*relay.certificate.files)
                nursery.start_soon(relay.carrier.run)
            await nursery.start(relay.steward.run)
            relay.observer.open(settings.listen.host, settings.stun_ports)
            nursery.start_soon(relay.observer.run)
            await relay.guess_memory.load(relay.services.clock())
            nursery.start_soon(_remember_guesses, relay)
            nursery.start_soon(_upkeep, relay, settings)
            nursery.start_soon(_watch_clock, relay, settings)
            nursery.start_soon(_watchdog)
            accepting = await nursery.start(_accept, relay, listeners)
            port = listeners[0].socket.getsockname()[1]
            collect_seldom()
            logger.info("Ready: %s (port %d), relay %s", settings.public_url, port, relay.services.keys.relay_id)
            sdnotify.notify("READY=1")
            async for number in signals:
                # In a terminal it means that nobody is there any more, for a service that it is to look again.
                if number == signal.SIGHUP and not sys.stderr.isatty():
                    await _look_again(relay)
                    continue
                logger.info("Ending on %s.", signal.Signals(number).name)
                break
            sdnotify.notify("STOPPING=1")
            accepting.cancel()
            await relay.web.stop(GRACE)
            await _say_goodbye(relay.registry)
            await _attempt("remember wrong guesses", partial(relay.guess_memory.flush, relay.services.clock()))
            nursery.cancel_scope.cancel()
    logger.info("Ended.")


async def _look_again(relay: Relay) -> None:
    """Take up now what else is looked at once a minute: certificate and revoked agents."""
    logger.info("Looking at the certificate again; a changed configuration counts from the next start on.")
    now = datetime.datetime.fromtimestamp(relay.services.clock(), datetime.UTC)
    await _attempt("renew the certificate", partial(_renew_certificate, relay, now))
    await _attempt("end the links of revoked agents", partial(_disconnect_revoked, relay))


async def _say_goodbye(registry: Registry) -> None:
    """Tell the agents that the relay ends and when to come back; most of them have heard it when this returns."""
    if not registry.connected():
        return
    async with registry.changes() as changes:
        registry.disconnect_all("The relay is shutting down.", retry_after=_RETRY_AFTER)
        with trio.move_on_after(_GOODBYE):
            async for _ in changes:
                if not registry.connected():
                    return


async def _accept(
    relay: Relay,
    listeners: list[trio.SocketListener],
    *,
    task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Take connections until the scope handed back is cancelled; those already taken go on."""
    async with trio.open_nursery() as connections:
        with trio.CancelScope() as accepting:
            task_status.started(accepting)
            await accept_all(listeners, relay.dispatcher.handle, connections)


async def _upkeep(relay: Relay, settings: Settings) -> None:
    """Renew keys and certificates in time and forget expired tokens. What fails is logged and tried again."""
    services = relay.services
    renew_keys = partial(services.keys.renew, key_life=settings.tickets.key_life, ticket_life=settings.tickets.life)
    # By a clock that nobody sets: one that was years ahead for a moment would put it off for years.
    next_cleaning = next_day = trio.current_time()
    while True:
        await _attempt("renew the ticket key", partial(_in_thread, renew_keys, services.clock()))
        renew_signing = partial(services.keys.renew_id_token_key, life=settings.sign_in.id_token_key_life)
        await _attempt("renew the key of id_tokens", partial(_in_thread, renew_signing, services.clock()))
        now = datetime.datetime.fromtimestamp(services.clock(), datetime.UTC)
        await _attempt("renew the certificate", partial(_renew_certificate, relay, now))
        await _attempt("end the links of revoked agents", partial(_disconnect_revoked, relay))
        if trio.current_time() >= next_cleaning:
            next_cleaning = trio.current_time() + _CLEANING_INTERVAL
            forget = partial(remove_expired, now=services.clock())
            await _attempt("forget expired tokens", partial(services.store.write, forget))
            forget = partial(forget_old, now=services.clock())
            await _attempt("forget old sessions and clients", partial(services.store.write, forget))
            _warn_of_end(relay.certificate.statistics(), services.clock())
            await _attempt("forget what closed tasks moved", partial(services.store.write, forget_items))
        if trio.current_time() >= next_day:
            next_day = trio.current_time() + _DAY
            _warn_of_authoritys_end(relay.certificate.statistics(), services.clock())
        logger.debug("%s", relay.statistics())
        await trio.sleep(_UPKEEP_INTERVAL)


def _warn_of_end(certificate: CertificateStatistics, now: float) -> None:
    """Say in the log, once an hour, that the certificate ends soon."""
    left = (certificate.expires - now) / _DAY
    if left < CERTIFICATE_WARNING:
        logger.warning("The certificate of the port ends in %.1f days; nobody can connect afterwards.", max(left, 0.0))


def _warn_of_authoritys_end(certificate: CertificateStatistics, now: float) -> None:
    """Say in the log, once a day, that the relay's own authority ends: it is renewed by hand, and so are its copies."""
    if certificate.authority_expires is None:
        return
    left = (certificate.authority_expires - now) / _DAY
    if left < AUTHORITY_WARNING:
        logger.warning(
            "The relay's own authority ends in %.0f days; agents that trust it cannot connect afterwards. Run "
            "`towpath-relay authority renew`, and give its new certificate to agents and clients (docs/operating.md).",
            max(left, 0.0),
        )


async def _watch_clock(relay: Relay, settings: Settings) -> None:
    """Notice that the wall clock was set, or that the machine has slept: then keys and tickets may have run out, or not
    have begun, hours before anybody would have looked at them."""
    services = relay.services
    renew_keys = partial(services.keys.renew, key_life=settings.tickets.key_life, ticket_life=settings.tickets.life)
    off = services.clock() - trio.current_time()
    while True:
        await trio.sleep(_CLOCK_LOOK)
        before, off = off, services.clock() - trio.current_time()
        if abs(off - before) > _CLOCK_JUMP:
            logger.warning("The clock has jumped by %+.0f s; running tasks get new tickets.", off - before)
            await _attempt("renew the ticket key", partial(_in_thread, renew_keys, services.clock()))
            relay.steward.clock_was_set()


async def _remember_guesses(relay: Relay) -> None:
    while True:
        await trio.sleep(INTERVAL)
        await _attempt("remember wrong guesses", partial(relay.guess_memory.flush, relay.services.clock()))


async def _renew_certificate(relay: Relay, now: datetime.datetime) -> None:
    renewed = await _in_thread(relay.certificate.renew, now)
    if renewed:
        relay.dispatcher.use(relay.certificate.context, relay.certificate.link_context)
    # Its process may have been too busy to hear of it the last time.
    if relay.tunnel.enabled and (renewed or relay.carrier.behind):
        await relay.carrier.serve(*relay.certificate.files)


async def _disconnect_revoked(relay: Relay) -> None:
    """Agents that are revoked while they are linked; later links are refused."""
    registry = relay.registry
    for node_id in await relay.services.store.read(revocation.revoked) & registry.connected().keys():
        logger.warning("Agent %s is revoked; its link ends.", node_id)
        registry.disconnect(node_id, "The relay's operator has revoked this agent.", retry_after=REFUSED_RETRY)


async def _in_thread(work: Callable[..., bool], *arguments: Any) -> bool:
    return await trio.to_thread.run_sync(work, *arguments)


async def _attempt(what: str, work: Callable[[], Awaitable[object]]) -> None:
    try:
        await work()
    except TowpathError as error:
        logger.error("Could not %s: %s", what, error.sentence)
    except (OSError, ValueError, sqlite3.Error, sqlalchemy.exc.SQLAlchemyError):
        logger.exception("Could not %s.", what)


async def _watchdog() -> None:
    interval = sdnotify.watchdog_interval()
    if interval is None:
        return
    while True:
        sdnotify.notify("WATCHDOG=1")
        await trio.sleep(interval)
