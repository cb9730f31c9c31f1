"""Keep-alive: both ends of an idle connection send Pings, and close it if the other end is silent."""

from __future__ import annotations

import asyncio

from actors.wire.client import Connection
from actors.wire.errors import PeerSilent
from actors.wire.link import Limits
from actors.wire.messages import Ping
from tests.support.deadlines import HANG_S
from tests.support.wire_peers import SECRET, Bare, Inbox, echo
from tests.wire.test_server import lookup

QUICK = Limits(peer_timeout_s=0.25)


async def connected(port: int, limits: Limits) -> tuple[Connection, Inbox]:
    inbox = Inbox()
    connection = await Connection.open(
        "127.0.0.1",
        port,
        SECRET,
        on_message=inbox.messages.put_nowait,
        on_closed=inbox.ended.set_result,
        limits=limits,
    )
    return connection, inbox


async def test_an_idle_connection_outlives_the_peer_timeout() -> None:
    async with echo(QUICK) as running:
        connection, inbox = await connected(running.port, QUICK)
        await asyncio.sleep(4 * QUICK.peer_timeout_s)
        assert inbox.messages.empty()  # pings are not passed on
        connection.send(lookup())
        assert type(await inbox.next()) is type(lookup())
        assert running.disconnected.empty()
        await connection.close()


async def test_a_model_closes_the_connection_of_a_silent_coordinator() -> None:
    async with echo(QUICK) as running:
        bare = await Bare.connect(running.port)
        await bare.shake_hands()
        async with asyncio.timeout(HANG_S):
            await running.disconnected.get()
        received = [await bare.next() for _ in range(2)]
        assert all(isinstance(message, Ping) for message in received)
        await bare.close()


async def test_a_coordinator_closes_the_connection_of_a_silent_model() -> None:
    async with echo(Limits(peer_timeout_s=3600)) as running:  # it sends no ping for an hour
        _, inbox = await connected(running.port, QUICK)
        assert isinstance(await inbox.end(), PeerSilent)
