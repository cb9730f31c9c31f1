"""Connections of a coordinator to the model replicas in the directory, and the messages to be sent to each."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import logging
import math
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.api.generation import ROLES, Role
from actors.config import Deadlines
from actors.directory import HEARTBEAT_S, Endpoint
from actors.wire.client import Connection
from actors.wire.columns import ExtendColumns, RowRequest, pack_extends, pack_lookups
from actors.wire.errors import WireError
from actors.wire.link import Limits
from actors.wire.messages import WIDEN_ITEM, Message, Welcome, Widen

log = logging.getLogger(__name__)

Locate = Callable[[], Awaitable[Sequence[Endpoint]]]


_NUMBERS = itertools.count()


class Replica:
    """One model replica, and the coordinator's connection to it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.number = next(_NUMBERS)  # of this coordinator's replicas, no two have the same
        self.outbox = Outbox()
        self.forward_time = ForwardTimeModel()
        self.connection: Connection | None = None
        self.progress_at = time.monotonic()  # when it last finished a forward, or connected

    @property
    def role(self) -> Role:
        """Role of the replica's model."""
        return self.endpoint.role

    @property
    def devices(self) -> frozenset[str]:
        """Names of the hardware that its model computes on, each unique in the world. Empty if it is not known."""
        return frozenset(self.welcome.devices.split())

    @property
    def welcome(self) -> Welcome:
        """Description of the model that the replica sent when it was connected."""
        assert self.connection is not None
        return self.connection.welcome

    def note_progress(self) -> None:
        """The replica has just finished a forward."""
        self.progress_at = time.monotonic()

    def flush(self) -> None:
        """Send the outbox, in one write."""
        if self.connection is not None:
            if messages := self.outbox.take(self.welcome.width):
                self.connection.send(*messages)


class ReplicaPool:
    """Keeps a connection to every replica of every role, and picks replicas for sessions.

    locate: returns the endpoints in the directory. While it fails, the known replicas stay in use.
    on_message, on_lost, on_found, on_stopping: called on the event loop, with the replica concerned.
    """

    def __init__(
        self,
        secret: bytes,
        locate: Locate,
        *,
        on_message: Callable[[Replica, Message], None],
        on_lost: Callable[[Replica], None],
        on_found: Callable[[Replica], None],
        on_stopping: Callable[[Replica], None],
        deadlines: Deadlines,
        width: Callable[[Role], int],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """width: logits in a row of a role's model; a replica whose rows have another width is not used."""
        self._width = width
        self._secret, self._locate, self._tls, self._deadlines = secret, locate, tls, deadlines
        self._on_message, self._on_lost = on_message, on_lost
        self._on_found, self._on_stopping = on_found, on_stopping
        self._replicas: dict[str, Replica] = {}  # by incarnation
        self._connecting: dict[
            str, asyncio.Task[None]
        ] = {}  # one task each: an endpoint that does not answer delays no other
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to poll the directory."""
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def stop(self) -> None:
        """Close every connection."""
        tasks = [task for task in (self._task, *self._connecting.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for replica in list(self._replicas.values()):
            if replica.connection is not None:
                await replica.connection.close()
        self._replicas.clear()

    def pick(self, role: Role) -> Replica | None:
        """A replica for a session: of two drawn at random, the one with more free cache. None if none is connected."""
        choice = self.usable_replicas(role)
        if not choice:
            return None
        return max(random.sample(choice, min(2, len(choice))), key=lambda r: r.endpoint.cache_free or 0)

    def usable_replicas(self, role: Role) -> list[Replica]:
        """Connected replicas of the role; stopping ones only if there are no others."""
        connected = [r for r in self._replicas.values() if r.role == role and r.connection is not None]
        return [r for r in connected if not r.endpoint.stopping] or connected

    def has_staying_replica(self, role: Role) -> bool:
        """True if a connected replica of the role is not stopping."""
        return any(not replica.endpoint.stopping for replica in self.usable_replicas(role))

    def missing_roles(self) -> tuple[Role, ...]:
        """Roles without a connected replica."""
        present = {r.role for r in self._replicas.values() if r.connection is not None}
        return tuple(role for role in ROLES if role not in present)

    def flush(self) -> None:
        """Send every replica's outbox."""
        for replica in list(self._replicas.values()):
            try:
                replica.flush()
            except WireError as error:
                self.drop(replica, error)

    def drop(self, replica: Replica, reason: Exception) -> None:
        """Close the connection to a replica that hangs or does not read."""
        log.warning("giving up the connection to %s at %s: %s", replica.role, replica.endpoint.host, reason)
        if replica.connection is not None:
            replica.connection.hang_up(reason)

    async def _follow(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._deadlines.connect_s):
                    endpoints = await self._locate()
            except Exception as error:  # the directory may fail for any reason; sessions go on meanwhile
                log.warning("the directory does not answer, keeping what is known: %s", error)
            else:
                self._adopt(endpoints)
            await asyncio.sleep(HEARTBEAT_S if not self.missing_roles() else HEARTBEAT_S / 5)

    def _adopt(self, endpoints: Sequence[Endpoint]) -> None:
        for endpoint in endpoints:
            replica = self._replicas.get(endpoint.incarnation)
            if replica is not None:
                replica.endpoint, before = endpoint, replica.endpoint
                if endpoint.stopping and not before.stopping:
                    self._on_stopping(replica)
            elif endpoint.incarnation not in self._connecting:
                task = asyncio.get_running_loop().create_task(self._connect(endpoint))
                self._connecting[endpoint.incarnation] = task

    async def _connect(self, endpoint: Endpoint) -> None:
        replica = Replica(endpoint)
        try:
            replica.connection = await Connection.open(
                endpoint.host,
                endpoint.port,
                self._secret,
                incarnation=endpoint.incarnation,
                peer="coordinator",
                deadline_s=self._deadlines.connect_s,
                tls=self._tls,
                limits=Limits(peer_timeout_s=self._deadlines.peer_timeout_s),
                on_message=lambda message: self._on_message(replica, message),
                on_closed=lambda error: self._closed(replica, error),
            )
        except WireError as error:
            log.warning("%s at %s:%d is not reachable: %s", endpoint.role, endpoint.host, endpoint.port, error)
            return
        finally:
            del self._connecting[endpoint.incarnation]
        if replica.welcome.width != self._width(endpoint.role):
            log.error(
                "%s at %s:%d has rows of %d logits, its tokenizer's configuration says %d: it is not used",
                *(endpoint.role, endpoint.host, endpoint.port, replica.welcome.width, self._width(endpoint.role)),
            )
            replica.connection.hang_up()
            return
        self._replicas[endpoint.incarnation] = replica
        self._on_found(replica)

    def _closed(self, replica: Replica, error: Exception | None) -> None:
        replica.connection = None
        self._replicas.pop(replica.endpoint.incarnation, None)
        if error is not None:
            log.warning("lost %s at %s: %s", replica.role, replica.endpoint.host, error)
        self._on_lost(replica)


@dataclass(slots=True)
class Outbox:
    """Items for one replica that a turn of the decode loop collects."""

    extends: list[ExtendColumns] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    lookups: list[NDArray[Any]] = field(default_factory=list)  # LOOKUP_ITEM
    ids: list[NDArray[Any]] = field(default_factory=list)  # of the lookups, one after another
    widens: list[RowRequest] = field(default_factory=list)

    def take(self, width: int) -> list[Message]:
        """Empty the outbox into messages, in the order in which they are sent. width: logits in a row of the model."""
        messages: list[Message] = []
        if self.extends or self.released:
            # A replica reads what is released before the items. A session that ended after it was extended comes later.
            extended = {key for part in self.extends for key in part.items["session"].tolist()} if self.released else ()
            messages.append(pack_extends(self.extends, [key for key in self.released if key not in extended]))
            if ended := [key for key in self.released if key in extended]:
                messages.append(pack_extends([], ended))
        if self.lookups:
            one = len(self.lookups) == 1
            items = self.lookups[0] if one else np.concatenate(self.lookups)
            messages.append(pack_lookups(items, self.ids[0] if one else np.concatenate(self.ids), width))
        if self.widens:
            messages.append(Widen(np.array(self.widens, WIDEN_ITEM)))
        if messages:
            self.extends, self.released, self.lookups, self.ids, self.widens = [], [], [], [], []
        return messages


_SMOOTHING = 0.2  # weight of the newest forward in the moving average


class ForwardTimeModel:
    """Estimates the seconds of a forward by its number of tokens: moving averages per bucket, interpolated between."""

    def __init__(self) -> None:
        self._tokens: list[int] = []  # upper bounds of the buckets with observations, ascending
        self._seconds: list[float] = []

    def observe(self, tokens: int, seconds: float) -> None:
        """Record a forward of so many tokens."""
        if tokens < 1:
            return
        bound = _bucket(tokens)
        at = bisect.bisect_left(self._tokens, bound)
        if at == len(self._tokens) or self._tokens[at] != bound:
            self._tokens.insert(at, bound)
            self._seconds.insert(at, seconds)
        else:
            self._seconds[at] += _SMOOTHING * (seconds - self._seconds[at])

    def seconds(self, tokens: int) -> float:
        """Expected seconds of a forward of so many tokens. Outside the observed range: those of the nearest bucket."""
        if not self._tokens:
            return 0.0
        bound = _bucket(max(tokens, 1))
        at = bisect.bisect_left(self._tokens, bound)
        if at == len(self._tokens):
            return self._seconds[-1]
        if self._tokens[at] == bound or at == 0:
            return self._seconds[at]
        low, high = self._tokens[at - 1], self._tokens[at]
        share = (bound - low) / (high - low)
        return self._seconds[at - 1] + share * (self._seconds[at] - self._seconds[at - 1])


def _bucket(tokens: int) -> int:
    """Upper bound of a count's bucket: each count up to 8 has its own, above that there are four to an octave."""
    if tokens <= 8:
        return tokens
    step = 1 << (int(math.log2(tokens - 1)) - 2)
    return -(-tokens // step) * step
