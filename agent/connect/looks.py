"""A probe's looks at the ways that need the relay: whether QUIC and the tunnel are open between two agents."""

from __future__ import annotations

import msgspec
import trio

from agent.connect.network import Network
from agent.connect.transport import Transport, Wish
from protocol.candidates import PathGo
from protocol.errors import TowpathError

# How long they may take, the relay's go included (seconds).
LOOK_TIME = 8.0


class Looks:
    """One probe's. ``found`` says what became of each by its transport: an empty text where the way is open, else why
    it is not."""

    def __init__(self, network: Network, wish: Wish) -> None:
        self.found: dict[str, str] = {}
        self._wish = wish
        self._transports: dict[str, Transport] = {}
        self._go: PathGo | None = None
        self._went, self._over = trio.Event(), trio.Event()
        for name in ("quic", "tunnel"):
            transport: Transport | None = getattr(network.transports, name)
            if transport is None:
                self.found[name] = network.transports.absent.get(name, "this agent has none")
            elif name == "tunnel" and network.relay_policy == "never":
                self.found[name] = "this agent's owner lets no data pass the relay"
            else:
                self._transports[name] = transport

    def __contains__(self, name: str) -> bool:
        return name in self._transports

    def __len__(self) -> int:
        return len(self._transports)

    def take_go(self, go: PathGo) -> None:
        """The relay's go, with the source's answer."""
        self._go = go
        self._went.set()

    async def over(self) -> None:
        """Wait until all is looked at."""
        await self._over.wait()

    async def run(self) -> None:
        """Look at all of them, once there is a go."""
        with trio.move_on_after(LOOK_TIME):
            await self._went.wait()
            async with trio.open_nursery() as nursery:
                for name, transport in self._transports.items():
                    nursery.start_soon(self._look_at, name, transport)
        for name in self._transports:
            self.found.setdefault(name, "nothing came of it in time" if self._go else "the source did not answer")
        self._over.set()

    async def _look_at(self, name: str, transport: Transport) -> None:
        go = self._go
        assert go is not None
        if go.answer is None or name not in go.answer.transports:
            self.found[name] = "the source's agent has none"
            return
        if name == "tunnel":
            if not go.tunnels:
                self.found[name] = go.tunnel_refused.rstrip(". ") or "the relay offers none"
                return
            go = msgspec.structs.replace(go, tunnel=go.tunnels[0])
        try:
            if name == "quic":
                await trio.sleep(max(0.0, go.start_in))
            await transport.look(self._wish, go)
        except (TowpathError, OSError) as error:
            self.found[name] = error.sentence.rstrip(". ") if isinstance(error, TowpathError) else str(error)
        else:
            self.found[name] = ""
