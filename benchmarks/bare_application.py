"""A bare application of Ray Serve that streams recorded answers: the service's events without the service.

It is deployed as the router is: behind the same proxy, with the same options and number of replicas. It sends an answer
in the chunks that the router sent, one message each. It has two addresses:

- /paced: at the service's own pace. The first and the last chunk are sent at once, and each other one `coalesce_s`
  seconds after the one before it, for the number of open streams.
- /unpaced: without pauses.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from ray import serve
from starlette.responses import StreamingResponse

from actors.config import ServiceConfig
from actors.coordinator.output import coalesce_s
from actors.replica.process import collect_rarely
from router.app import router_options

NAME = "bare"
PACED, UNPACED = f"/{NAME}/paced", f"/{NAME}/unpaced"  # prefixes of the addresses

Answers = Mapping[int, Sequence[bytes]]  # the chunks of an answer, by the seed of its request


class BareApplication:
    """Starts the bare application beside the service of a configuration."""

    def __init__(self, config: ServiceConfig) -> None:
        deployment = serve.deployment(serve.ingress()(BareShell), name="Bare", **router_options(config))
        self._handle = serve.run(deployment.bind(), name=NAME, route_prefix=f"/{NAME}")

    def load(self, answers: Answers) -> None:
        """Replace the answers that it sends."""
        self._handle.load.remote(answers).result()


class BareShell:
    """The application's deployment."""

    def __init__(self) -> None:
        self._answers: dict[int, Sequence[bytes]] = {}
        collect_rarely()

    async def load(self, answers: Answers) -> None:
        """Replace the answers."""
        self._answers.clear()
        self._answers.update(answers)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_bare_app(self._answers)


def create_bare_app(answers: Answers) -> FastAPI:
    """The HTTP application. It answers a chat request with the chunks that were recorded for the request's seed."""
    app, player = FastAPI(), Player()

    @app.post("/paced/v1/chat/completions")
    async def paced(request: Request) -> StreamingResponse:
        return await respond(request, paced=True)

    @app.post("/unpaced/v1/chat/completions")
    async def unpaced(request: Request) -> StreamingResponse:
        return await respond(request, paced=False)

    async def respond(request: Request, paced: bool) -> StreamingResponse:
        body: dict[str, Any] = await request.json()
        return StreamingResponse(player.play(answers[body["seed"]], paced), media_type="text/event-stream")

    return app


class Player:
    """Plays answers, and counts the open streams."""

    def __init__(self) -> None:
        self._open = 0

    async def play(self, chunks: Sequence[bytes], paced: bool) -> AsyncIterator[bytes]:
        """Yield the chunks of one answer, at the service's pace or without pauses."""
        clock = asyncio.get_running_loop().time
        sent_at = clock()
        self._open += 1
        try:
            for number, chunk in enumerate(chunks, 1):
                if 1 < number < len(chunks):
                    pause_s = coalesce_s(self._open) if paced else 0.0
                    await asyncio.sleep(sent_at + pause_s - clock())  # other streams have their turn in any case
                sent_at = clock()
                yield chunk
        finally:
            self._open -= 1
