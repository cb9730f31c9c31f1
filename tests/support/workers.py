"""Workers of the benchmarks in this process, in place of processes of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


class LocalWorker:
    """An object in this process (`benchmarks.processes.Worker`)."""

    def __init__(self, thing: Any) -> None:
        self._thing = thing

    async def call(self, method: str, *arguments: Any) -> Any:
        result = getattr(self._thing, method)(*arguments)
        return await result if inspect.isawaitable(result) else result


async def launch_here(factory: Callable[..., Any], *arguments: Any) -> LocalWorker:
    """Make an object in this process (`benchmarks.processes.Launch`)."""
    return LocalWorker(factory(*arguments))
