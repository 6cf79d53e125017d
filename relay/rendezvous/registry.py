"""Which agents are linked to this relay, and the only way to reach them.

Everything on the relay that wants something of an agent goes through `Registry.call` or `Registry.stream`, so that a
second relay machine can stand behind them later.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

import msgspec
import trio

from protocol.control import AgentHello, encode
from protocol.errors import RetryLater, TowpathError, error_from_document_untrusted
from protocol.places import Places
from protocol.reverse_http import CallReset, CallTimeout, Client, LinkLost, Response, StreamingResponse
from relay.quota.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CallTimeout", "LinkDown", "LinkUp", "NodeBusy", "NodeOffline", "Registry", "RegistryStatistics"]

_logger = logging.getLogger("towpath.rendezvous")

MAX_ERROR_BODY = 64 * 1024
# What was decided about a call holds for so many seconds.
DECISION_HOLDS = 1.0
# An agent told that another took its place waits this long (seconds): two copies of one key must not fight.
REPLACED_RETRY = 30.0
# Signs of life that agents behind proxies may ask for: the more of them, the more seldom each new one asks. A PING
# costs the relay 0.1 to 0.2 ms. So 3,250 such agents are missed within 15 s, and 18,000 take a fifth of a core.
SIGNS_A_SECOND = 500.0


class NodeOffline(RetryLater):
    """The agent is not linked to the relay, or its link ended during the call."""

    default_code = "GC_NOT_CONNECTED"


class NodeBusy(RetryLater):
    """Too many calls wait for this agent already."""

    default_code = "ENDPOINT_TOO_BUSY"


@dataclass(frozen=True, slots=True)
class LinkUp:
    """An agent is linked and proven to be who it says."""

    node_id: str
    hello: AgentHello


@dataclass(frozen=True, slots=True)
class LinkDown:
    """An agent's link ended."""

    node_id: str


LinkChange = LinkUp | LinkDown


@dataclass(frozen=True, slots=True)
class RegistryStatistics:
    """The whole registry so far; ``watched`` links, ``waiting`` calls and those ``under_way`` are of this moment."""

    connected: int
    watched: int
    links: int
    replaced: int
    calls: int
    failed: int
    timeouts: int
    refused: int
    waiting: int
    under_way: int


class _Link:
    """One linked agent and the calls it is given."""

    def __init__(
        self,
        node_id: str,
        hello: AgentHello,
        client: Client,
        max_calls: int,
        max_waiting: int,
        address: str,
        measure: Callable[[], float | None],
    ) -> None:
        self.node_id = node_id
        self.address = address
        self.measure = measure
        self.hello = hello
        self.client = client
        self.streams = 0
        # First come, first served, among the relay's own calls and those of people who have their turn.
        self.calls = trio.Semaphore(max_calls, max_value=max_calls)
        # However many people ask for a thing, the relay itself comes through: it has permissions to take away. And
        # however much one of them asks for, so do the others.
        self.people = trio.Semaphore(max(1, max_calls * 3 // 4))
        self.turns = Turns(max(1, max_calls // 2))
        self.asked = Places(max_calls + max_waiting)
        self.waiting = 0
        self.under_way = 0


class Registry:
    """Links by node id. At most ``max_calls`` calls to one agent are under way, ``max_waiting`` more may wait;
    beyond that callers get `NodeBusy`. Three quarters of the calls under way may be people's, half one person's; their
    calls that wait are as many besides, of which one person never has all. Safe to use from many tasks of one trio
    run."""

    def __init__(self, *, max_calls: int = 32, max_waiting: int = 512, max_streams: int = 16) -> None:
        self._links: dict[str, _Link] = {}
        self._subscribers: set[trio.MemorySendChannel[LinkChange]] = set()
        self._max_calls = max_calls
        self._max_waiting = max_waiting
        self._max_streams = max_streams
        self._watched = 0
        self._total = self._replaced = self._calls = self._failed = self._timeouts = self._refused = 0

    # --- who is there ----------------------------------------------------------------------------------------

    def is_connected(self, node_id: str) -> bool:
        """Whether the agent has a proven link right now."""
        return node_id in self._links

    def connected(self) -> dict[str, AgentHello]:
        """All linked agents with what they said when they came."""
        return {node_id: link.hello for node_id, link in self._links.items()}

    def hello(self, node_id: str) -> AgentHello | None:
        """What a linked agent said when it came."""
        link = self._links.get(node_id)
        return None if link is None else link.hello

    def statistics(self) -> RegistryStatistics:
        """Counts since the start, and the state of this moment."""
        links = self._links.values()
        return RegistryStatistics(
            connected=len(self._links),
            watched=self._watched,
            links=self._total,
            replaced=self._replaced,
            calls=self._calls,
            failed=self._failed,
            timeouts=self._timeouts,
            refused=self._refused,
            waiting=sum(link.waiting for link in links),
            under_way=sum(link.under_way for link in links),
        )

    @asynccontextmanager
    async def changes(self, buffer: int = 65_536) -> AsyncIterator[trio.MemoryReceiveChannel[LinkChange]]:
        """Links coming and going, beginning with a `LinkUp` for each that is there, so none is missed.

        A subscriber that lags more than ``buffer`` changes behind sees its channel end, and subscribes anew.
        """
        size = buffer + len(self._links)
        send, receive = trio.open_memory_channel[LinkChange](size)
        for link in self._links.values():
            send.send_nowait(LinkUp(link.node_id, link.hello))
        self._subscribers.add(send)
        try:
            with receive:
                yield receive
        finally:
            self._subscribers.discard(send)
            send.close()

    def _announce(self, change: LinkChange) -> None:
        for subscriber in list(self._subscribers):
            try:
                subscriber.send_nowait(change)
            except trio.WouldBlock:
                _logger.warning("A part of the relay does not keep up with links coming and going.")
                self._subscribers.discard(subscriber)
                subscriber.close()
            except trio.BrokenResourceError:
                self._subscribers.discard(subscriber)

    def address(self, node_id: str) -> str:
        """The address the node's link comes from, as this relay sees it; empty when it is not linked or not known."""
        link = self._links.get(node_id)
        return "" if link is None else link.address

    def round_trip(self, node_id: str) -> float | None:
        """Seconds that a packet takes to the node and back, where that is known."""
        link = self._links.get(node_id)
        return None if link is None else link.measure()

    @contextmanager
    def registered(
        self,
        node_id: str,
        hello: AgentHello,
        client: Client,
        *,
        address: str = "",
        measure: Callable[[], float | None] = lambda: None,
    ) -> Iterator[None]:
        """Hold a proven link in the registry. A link of the same node that is there already is closed.

        ``address`` is where the link comes from, ``measure`` gives its round-trip time in seconds."""
        previous = self._links.pop(node_id, None)
        if previous is not None:
            self._replaced += 1
            self._announce(LinkDown(node_id))
            previous.client.close(
                "Another link of the same agent took the place of this one. If two machines use one agent's key, "
                "set one of them up anew.",
                retry_after=REPLACED_RETRY,
            )
        link = self._links[node_id] = _Link(
            node_id, hello, client, self._max_calls, self._max_waiting, address, measure
        )
        self._total += 1
        self._watched += hello.watch > 0
        self._announce(LinkUp(node_id, hello))
        try:
            yield
        finally:
            self._watched -= hello.watch > 0
            if self._links.get(node_id) is link:
                del self._links[node_id]
                self._announce(LinkDown(node_id))

    def watch_least(self) -> float:
        """The shortest silence (seconds) after which one more agent behind a proxy may ask for a sign of life."""
        return self._watched / SIGNS_A_SECOND

    def disconnect(self, node_id: str, sentence: str, *, retry_after: float | None = None) -> None:
        """End an agent's link and tell it why; nothing happens when it has none."""
        if (link := self._links.get(node_id)) is not None:
            link.client.close(sentence, retry_after=retry_after)

    def disconnect_all(self, sentence: str, *, retry_after: float | None = None) -> None:
        """End every link and tell the agents why, as the relay shuts down."""
        for node_id in list(self._links):
            self.disconnect(node_id, sentence, retry_after=retry_after)

    # --- calls -----------------------------------------------------------------------------------------------

    def _link(self, node_id: str) -> _Link:
        link = self._links.get(node_id)
        if link is None or link.client.ending is not None:
            raise NodeOffline("The endpoint's agent is not connected to the relay right now.")
        return link

    async def call(
        self,
        node_id: str,
        method: str,
        path: str,
        *,
        query: Sequence[tuple[str, str]] = (),
        document: object | None = None,
        timeout: float = 30.0,  # noqa: ASYNC109 - part of the call, waiting for a turn included
        decide_again: Callable[[], Awaitable[object]] | None = None,
        caller: str = "",
    ) -> bytes:
        """Ask an agent; returns the body of a 2xx answer. ``caller`` is who asks, empty for the relay itself.

        ``path`` is plain text, encoded here; ``document`` travels as JSON. Raises the agent's own error, as
        `TowpathError` with ``status`` set, for any other answer; `NodeOffline`, `NodeBusy`, `CallTimeout`, and
        `CallReset` when there is none. Cancelling gives up this call alone. ``decide_again`` raises when the call may
        not be made any more; it is asked where the turn came later than `DECISION_HOLDS`, and every so often while the
        agent has not answered: the call is given up then, and an agent to which it waits for a disk does not do it.
        """
        came = trio.current_time()
        link = self._link(node_id)
        headers, body = ([], b"") if document is None else ([(b"content-type", b"application/json")], encode(document))
        self._calls += 1
        try:
            with trio.fail_after(timeout):
                async with self._turn(link, caller):
                    if decide_again is not None and trio.current_time() - came > DECISION_HOLDS:
                        await decide_again()
                    self._link(node_id)
                    ask = partial(
                        link.client.request, method, _target(path, query), headers=headers, body=body, timeout=timeout
                    )
                    answer = await (ask() if decide_again is None else _while_allowed(ask, decide_again))
        except (trio.TooSlowError, CallTimeout) as error:
            self._timeouts += 1
            raise CallTimeout(f"The endpoint's agent did not answer within {timeout:g} seconds.") from error
        except LinkLost as error:
            self._failed += 1
            raise NodeOffline(error.sentence) from error
        except CallReset:
            self._failed += 1
            raise
        if not 200 <= answer.status <= 299:
            self._failed += 1
            raise _error_untrusted(answer.status, answer.body)
        return answer.body

    @asynccontextmanager
    async def _turn(self, link: _Link, caller: str) -> AsyncIterator[None]:
        """Wait for a turn, and have it inside. Raises `NodeBusy`."""
        own = link.waiting + link.under_way - link.asked.taken
        if not link.asked.take(caller) if caller else own >= self._max_calls + self._max_waiting:
            self._refused += 1
            raise NodeBusy("Too many requests wait for this endpoint already; try again in a moment.")
        try:
            async with AsyncExitStack() as held:
                link.waiting += 1
                try:
                    if caller:
                        await held.enter_async_context(link.turns.of(caller))
                        await held.enter_async_context(link.people)
                    await held.enter_async_context(link.calls)
                finally:
                    link.waiting -= 1
                link.under_way += 1
                try:
                    yield
                finally:
                    link.under_way -= 1
        finally:
            if caller:
                link.asked.leave(caller)

    @asynccontextmanager
    async def stream(
        self,
        node_id: str,
        path: str,
        *,
        query: Sequence[tuple[str, str]] = (),
        timeout: float = 30.0,  # noqa: ASYNC109 - for the answer to begin
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """GET an answer without end, such as the events: an iterator of its chunks.

        Raises as `call` does; the iterator raises `NodeOffline` when the link ends. Leaving the context, or cancelling,
        gives the stream up at both ends.
        """
        link = self._link(node_id)
        if link.streams >= self._max_streams:
            self._refused += 1
            raise NodeBusy("Too many streams are open to this endpoint already.")
        link.streams += 1
        self._calls += 1
        try:
            async with link.client.stream("GET", _target(path, query), timeout=timeout) as answer:
                if not 200 <= answer.status <= 299:
                    self._failed += 1
                    raise _error_untrusted(answer.status, await answer.read(MAX_ERROR_BODY))
                yield _Chunks(answer)
        except LinkLost as error:
            raise NodeOffline(error.sentence) from error
        finally:
            link.streams -= 1


async def _while_allowed(
    ask: Callable[[], Awaitable[Response]], decide_again: Callable[[], Awaitable[object]]
) -> Response:
    """What is asked, unless it is allowed no more before there is an answer. Raises what either of them does."""
    answer: Response | None = None
    trouble: Exception | None = None

    async def watch() -> None:
        nonlocal trouble
        try:
            while True:
                await trio.sleep(DECISION_HOLDS)
                await decide_again()
        except Exception as error:
            # Carried past the nursery, which would wrap it in a group.
            trouble = error
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        try:
            answer = await ask()
        except Exception as error:
            trouble = error
        nursery.cancel_scope.cancel()
    if answer is not None:
        return answer
    assert trouble is not None
    raise trouble


class _Chunks:
    """The chunks of an answer, with the registry's errors. No generator: it may be left half way through."""

    def __init__(self, answer: StreamingResponse) -> None:
        self._answer = answer

    def __aiter__(self) -> _Chunks:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(self._answer)
        except LinkLost as error:
            raise NodeOffline(error.sentence) from error


def _target(path: str, query: Sequence[tuple[str, str]]) -> str:
    target = quote(path, safe="/~:@!$&'()*+,;=-._")
    return f"{target}?{urlencode(query, quote_via=quote)}" if query else target


def _error_untrusted(status: int, body: bytes) -> TowpathError:
    """The error in an agent's answer, with the answer's status. Never raises."""
    error: TowpathError
    try:
        error = error_from_document_untrusted(msgspec.json.decode(body[:MAX_ERROR_BODY]))
    except (ValueError, RecursionError, TowpathError):
        error = RetryLater(f"The endpoint's agent answered with status {status} and no reason.", code="UNKNOWN")
    error.status = status
    return error
