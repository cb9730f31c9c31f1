"""The Serve shell of a model replica, without Ray: what its shutdown hook does."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

from actors.serve.model import ModelShell


@dataclass
class Load:
    sessions: int
    cache_free: int = 1


@dataclass
class Replica:
    """A replica whose last session has ended at the third look."""

    sessions: list[int] = field(default_factory=lambda: [2, 1, 0])
    stopped: bool = False

    def load(self) -> Load:
        return Load(self.sessions.pop(0) if len(self.sessions) > 1 else self.sessions[0])

    async def stop(self) -> None:
        assert self.sessions == [0], "the replica stopped before its sessions had ended"
        self.stopped = True


class Method:
    """A method of an actor handle that records its argument."""

    def __init__(self, calls: list[tuple[str, Any]], name: str) -> None:
        self._calls, self._name = calls, name

    async def remote(self, argument: Any) -> None:
        self._calls.append((self._name, argument))


class Directory:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.heartbeat, self.leave = Method(self.calls, "heartbeat"), Method(self.calls, "leave")


def shell(replica: Replica, directory: Directory) -> Any:
    """The attributes of a model shell after its start, but for its tasks. No ModelShell: Python would call its hook."""
    made = SimpleNamespace(_role="target", _incarnation="t-1", _host="127.0.0.1", _port=1, _stopping=False)
    made._replica, made._directory, made._heartbeats = replica, directory, None
    method: Any = ModelShell._send_heartbeat
    made._send_heartbeat = partial(method, made)
    return made


async def test_a_stopped_model_replica_drains_and_leaves_the_directory() -> None:
    replica, directory = Replica(), Directory()
    stopped = shell(replica, directory)
    stopped._heartbeats, stopped._exporting = (asyncio.create_task(asyncio.sleep(100)) for _ in range(2))
    await ModelShell.__del__(stopped)
    (first, endpoint), last = directory.calls
    assert first == "heartbeat"
    assert endpoint.stopping
    assert replica.stopped
    assert last == ("leave", "t-1")
    assert stopped._heartbeats.cancelling()


async def test_a_model_replica_that_did_not_start_has_nothing_to_drain() -> None:
    replica, directory = Replica(), Directory()
    await ModelShell.__del__(shell(replica, directory))
    assert not replica.stopped
    assert directory.calls == []
