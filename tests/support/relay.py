"""A TCP relay between a coordinator and a model, through which a test disturbs what flows; a service behind relays."""

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
    """What happens to the frames of one direction; a test changes it at any time. Seconds, and bytes a second."""

    delay_s: float = 0.0
    rate: float | None = None
    open: asyncio.Event = field(default_factory=asyncio.Event)  # cleared: nothing is forwarded, and nothing refused
    repeat: bool = False  # the next frame of a session goes twice, once
    frames: int = 0  # forwarded so far

    def __post_init__(self) -> None:
        self.open.set()

    async def forward(self, frame: bytes, number: int, writer: asyncio.StreamWriter) -> None:
        """Pass on one frame, the `number`th of its connection."""
        await asyncio.sleep(self.delay_s + (len(frame) / self.rate if self.rate else 0.0))
        await self.open.wait()
        twice = self.repeat and number > HANDSHAKE_FRAMES
        self.repeat = self.repeat and not twice
        writer.write(frame * (1 + twice))
        await writer.drain()
        self.frames += 1


class Relay:
    """Listens for connections, each of which it joins to one of its own to the model."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self.flows: dict[Direction, Flow] = {direction: Flow() for direction in DIRECTIONS}
        self.connections = 0  # so far
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def frames(self) -> int:
        """Forwarded so far, in both directions."""
        return sum(flow.frames for flow in self.flows.values())

    def cut(self) -> None:
        """Reset every connection, as a machine that has gone does."""
        for writer in self._writers:
            writer.transport.abort()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[tuple[str, int]]:
        """Where a coordinator connects to instead."""
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
    """Read and forward frame by frame until an end closes."""
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
    """A service whose first coordinator reaches the models straight, and the second each through a relay."""
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
