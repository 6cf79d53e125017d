"""Thousands of agents' ends of links in one process, as cheap as they can be, so that the relay is what is measured.

One epoll loop and hand-made HTTP/2 frames: each agent does a TLS 1.3 handshake, signs the hello, keeps the event stream
open, answers calls with 204, pings after the silence an agent pings after, and dials again by the agent's own back-off
(`agent.back_off`). It does not check the relay's certificate and proof, which is work of the agents' own machines.
"""

from __future__ import annotations

import gc
import heapq
import json
import random
import selectors
import signal
import socket
import ssl
import time
from multiprocessing.sharedctypes import Synchronized
from typing import Any

from hpack import Decoder

from agent.back_off import BackOff
from agent.connect.link_connection import DIAL_TIMEOUT
from agent.link import LINK_LIMITS
from protocol.control import RelayHello, decode_untrusted, encode
from protocol.identity import NodeKey
from protocol.link import ALPN, HelloFields, make_agent_hello

DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1
# Whole entries of HPACK's static table (RFC 7541, appendix A).
STATUS_200, STATUS_204 = b"\x88", b"\x89"
NO_TASKS = b'{"tasks":[]}'
_PREFACE = 24


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """RFC 9113, section 4.1."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


class LightAgent:
    """One agent: its connection, if it has one, and when it wants to be looked at again (``due``, monotonic)."""

    def __init__(self, row: tuple[str, str, bytes], key: NodeKey, channel: str, chance: random.Random) -> None:
        self.node_id, self.endpoint_id, _ = row
        self._key = key
        self._channel = channel
        self._back_off = BackOff(chance)
        self.socket: socket.socket | None = None
        self.state = "away"
        self.linked = False
        self.due = 0.0
        self.heard = self.started = 0.0
        self._pinged = False
        self._buffer = bytearray()
        self._skip = 0
        self._body = bytearray()
        self._decoder = Decoder()

    def dial(self, address: tuple[str, int], now: float) -> socket.socket:
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.connect_ex(address)
        self.state, self.started, self.due = "dialling", now, now + DIAL_TIMEOUT
        self._buffer.clear()
        self._body.clear()
        self._skip, self._pinged = _PREFACE, False
        self._decoder = Decoder()
        return self.socket

    def lost(self, now: float) -> None:
        """The connection is over: the socket is closed, the next dial is due by the back-off."""
        if self.socket is not None:
            self.socket.close()
        lasted = now - self.started if self.linked else 0.0
        self.socket, self.state, self.linked = None, "away", False
        self.due = now + self._back_off.pause_after(lasted, None)

    def ready(self, context: ssl.SSLContext, now: float) -> int:
        """Go on with what the socket allows; the selector's events to wait for. Raises OSError when it is over."""
        assert self.socket is not None
        if self.state == "dialling":
            if error := self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(error, "connect")
            self.socket = context.wrap_socket(self.socket, server_hostname="localhost", do_handshake_on_connect=False)
            self.state = "handshake"
        if self.state == "handshake":
            assert isinstance(self.socket, ssl.SSLSocket)
            try:
                self.socket.do_handshake()
            except ssl.SSLWantReadError:
                return selectors.EVENT_READ
            except ssl.SSLWantWriteError:
                return selectors.EVENT_WRITE
            self.state = "open"
            self.due, self.heard = now + 60, now
            self.socket.send(frame(SETTINGS, 0, 0))
        try:
            while True:
                data = self.socket.recv(65536)
                if not data:
                    raise OSError("closed")
                self.heard, self._pinged = now, False
                self._buffer += data
        except ssl.SSLWantReadError:
            pass
        if answer := self._take(now):
            self.socket.send(answer)
        return selectors.EVENT_READ

    def tick(self, now: float) -> None:
        """The time ``due`` has come on a connection. Raises OSError when it is to be given up."""
        assert self.socket is not None
        silent = now - self.heard
        if not self.linked or silent >= 2 * LINK_LIMITS.ping_interval:
            raise OSError("silence")
        if silent >= LINK_LIMITS.ping_interval and not self._pinged:
            self.socket.send(frame(PING, 0, 0, bytes(8)))
            self._pinged = True
        self.due = self.heard + (2 if self._pinged else 1) * LINK_LIMITS.ping_interval

    def _take(self, now: float) -> bytes:
        """Answers to all whole frames that have come."""
        answer = b""
        if self._skip:
            if len(self._buffer) < self._skip:
                return b""
            del self._buffer[: self._skip]
            self._skip = 0
        while len(self._buffer) >= 9:
            size = int.from_bytes(self._buffer[:3], "big")
            if len(self._buffer) < 9 + size:
                break
            kind, flags, stream = self._buffer[3], self._buffer[4], int.from_bytes(self._buffer[5:9], "big")
            payload = bytes(self._buffer[9 : 9 + size])
            del self._buffer[: 9 + size]
            answer += self._frame(kind, flags, stream, payload, now)
        return answer

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes, now: float) -> bytes:
        if kind == SETTINGS and not flags & ACK:
            return frame(SETTINGS, ACK, 0)
        if kind == PING and not flags & ACK:
            return frame(PING, ACK, 0, payload)
        if kind == GOAWAY:
            raise OSError("goodbye")
        if kind == HEADERS:
            # All blocks must pass the decoder: they share its table.
            path = dict(self._decoder.decode(payload, raw=True)).get(b":path", b"")
            if not flags & END_STREAM:
                return b""
            answer = frame(HEADERS, END_HEADERS, stream, STATUS_200)
            if path.startswith(b"/link/events"):
                return answer
            return answer + frame(DATA, END_STREAM, stream, NO_TASKS)
        if kind == DATA:
            self._body += payload
            if flags & END_STREAM:
                body = bytes(self._body)
                self._body.clear()
                return self._call(stream, body, now)
        return b""

    def _call(self, stream: int, body: bytes, now: float) -> bytes:
        if stream != 1:
            return frame(HEADERS, END_HEADERS | END_STREAM, stream, STATUS_204)
        hello = make_agent_hello(
            decode_untrusted(body, RelayHello),
            self._key,
            node_id=self.node_id,
            endpoint_id=self.endpoint_id,
            channel=self._channel,
            fields=HelloFields(version="load", boot_id="load", tasks=0),
        )
        self.linked, self.due = True, now + LINK_LIMITS.ping_interval
        return frame(HEADERS, END_HEADERS, stream, STATUS_200) + frame(DATA, END_STREAM, stream, encode(hello))


def hold(
    rows: list[tuple[str, str, bytes]], port: int, channel: str, up: Synchronized[int], told: Synchronized[float]
) -> None:
    """Be these agents until the process is killed. ``up`` counts those that are linked; ``told`` is CPU seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([ALPN])
    chance = random.Random(json.dumps(rows[0][0]))
    agents = [LightAgent(row, NodeKey.from_pem(row[2]), channel, chance) for row in rows]
    gc.collect()
    gc.freeze()
    gc.disable()
    _Loop(agents, ("127.0.0.1", port), context, up, told).run()


class _Loop:
    def __init__(self, agents: list[LightAgent], address: tuple[str, int], context: ssl.SSLContext, up: Any, told: Any):
        self._address = address
        self._context = context
        self._up = up
        self._told = told
        self._selector = selectors.DefaultSelector()
        now = time.monotonic()
        # The first coming is spread as after a loss of the relay.
        self._queue = [(now + agent._back_off.pause_after(60, None), number) for number, agent in enumerate(agents)]
        for (due, _), agent in zip(self._queue, agents, strict=True):
            agent.due = due
        heapq.heapify(self._queue)
        self._agents = agents

    def run(self) -> None:
        shown = 0.0
        while True:
            now = time.monotonic()
            wait = max(0.0, min(0.1, self._queue[0][0] - now)) if self._queue else 0.1
            for key, _ in self._selector.select(wait):
                self._step(key.data, key.events)
            now = time.monotonic()
            for _ in range(100):
                if not self._queue or self._queue[0][0] > now:
                    break
                self._look(heapq.heappop(self._queue)[1], now)
            if now - shown > 0.1:
                shown = now
                self._up.value = sum(agent.linked for agent in self._agents)
                self._told.value = time.process_time()

    def _step(self, number: int, events: int) -> None:
        agent, now = self._agents[number], time.monotonic()
        assert agent.socket is not None
        descriptor = agent.socket.fileno()
        before = agent.due
        try:
            wanted = agent.ready(self._context, now)
            if wanted != events:
                self._selector.modify(descriptor, wanted, number)
        except OSError:
            self._selector.unregister(descriptor)
            agent.lost(now)
        if agent.due < before:
            heapq.heappush(self._queue, (agent.due, number))

    def _look(self, number: int, now: float) -> None:
        agent = self._agents[number]
        if agent.due > now + 0.001:
            # Something else happened meanwhile.
            heapq.heappush(self._queue, (agent.due, number))
            return
        if agent.socket is None:
            self._selector.register(agent.dial(self._address, now), selectors.EVENT_WRITE, number)
        else:
            descriptor = agent.socket.fileno()
            try:
                agent.tick(now)
            except OSError:
                self._selector.unregister(descriptor)
                agent.lost(now)
        heapq.heappush(self._queue, (agent.due, number))
