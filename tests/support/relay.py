"""A TCP relay between a coordinator and a replica through which a test disturbs frames; a service behind relays."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

from actors.api.generation import ROLES, Role
from actors.config import ServiceConfig
from actors.replica.engine_thread import Engine
from actors.wire.framing import HEADER
from tests.support.local_service import LocalService, local_service
from tests.support.watched import until

Direction = Literal["to_model", "to_coordinator"]
DIRECTIONS: tuple[Direction, ...] = ("to_model", "to_coordinator")
HANDSHAKE_FRAMES = 3  # in either direction at most; later ones are a session's


@dataclass(slots=True)
class Flow:
    """Treatment of the frames in one direction, in seconds and bytes per second; a test may change it at any time."""

    delay_s: float = 0.0
    rate: float | None = None
    open: asyncio.Event = field(default_factory=asyncio.Event)  # cleared: nothing is forwarded, and nothing refused
    repeat: bool = False  # the next frame of a session goes twice, once
    frames: int = 0  # forwarded so far

    def __post_init__(self) -> None:
        self.open.set()

    async def forward(self, frame: bytes, number: int, writer: asyncio.StreamWriter) -> None:
        """Forward one frame, the `number`-th of its connection."""
        await asyncio.sleep(self.delay_s + (len(frame) / self.rate if self.rate else 0.0))
        await self.open.wait()
        twice = self.repeat and number > HANDSHAKE_FRAMES
        self.repeat = self.repeat and not twice
        writer.write(frame * (1 + twice))
        await writer.drain()
        self.frames += 1


class Relay:
    """Listens for connections, and forwards each over a connection of its own to the replica."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self.flows: dict[Direction, Flow] = {direction: Flow() for direction in DIRECTIONS}
        self.connections = 0  # so far
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def frames(self) -> int:
        """Number of frames forwarded so far, in both directions."""
        return sum(flow.frames for flow in self.flows.values())

    def cut(self) -> None:
        """Reset every connection, as when a machine is lost."""
        for writer in self._writers:
            writer.transport.abort()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[tuple[str, int]]:
        """Endpoint of the relay, to which a coordinator connects instead."""
        server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[:2]
        finally:
            server.close()
            self.cut()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        there, onward = await asyncio.open_connection(self._host, self._port)
        ends = {writer, onward}
        self._writers |= ends
        pumps = [
            asyncio.create_task(_pump(reader, onward, self.flows["to_model"])),
            asyncio.create_task(_pump(there, writer, self.flows["to_coordinator"])),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            self._writers -= ends
            for end in ends:
                end.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flow: Flow) -> None:
    """Forward frame by frame until either end closes."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        number = 0
        while True:
            header = await reader.readexactly(HEADER.size)
            (length,) = HEADER.unpack(header)
            number += 1
            await flow.forward(header + await reader.readexactly(length), number, writer)


@asynccontextmanager
async def relayed(
    config: ServiceConfig, engines: Mapping[Role, Engine]
) -> AsyncIterator[tuple[LocalService, dict[Role, Relay]]]:
    """A service whose first coordinator is connected directly, and whose second one through relays."""
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(local_service(config, engines))
        relays: dict[Role, Relay] = {}
        for role in ROLES:
            endpoint = service._endpoints[role]
            relays[role] = relay = Relay(endpoint.host, endpoint.port)
            host, port = await stack.enter_async_context(relay.listening())
            service._endpoints[role] = replace(endpoint, host=host, port=port)
        await service.start_coordinator()
        await until(lambda: not service.coordinators[1].missing_roles())
        yield service, relays
