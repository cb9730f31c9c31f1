"""Measures tokens/s of streams through the HTTP server of Serve's proxy, with and without the proxy's callback.

    python -m benchmarks.proxy_streams [--streams 16] [--tokens 1000] [--rounds 9]

Two processes serve the same made-up streams with the server that Serve's proxy starts: one as Serve sets it, one with
`router.proxy`. Rounds alternate between the two; the medians count. Serve's own work for each message is left out: with
it, the share of the callback would be smaller.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

import httpx
from ray.serve._private import http_util
from ray.serve.config import HTTPOptions
from rich.console import Console
from rich.table import Table
from starlette.types import Receive, Scope, Send

from benchmarks.processes import launcher
from benchmarks.results_file import arguments, console, progress, publish
from cluster.launch import LOOPBACK, PROXY_HOOK, free_port

KINDS = ("plain", "callback")
EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":" a"}}]}\n\n'
)


class ProxyServer:
    """The HTTP server of Serve's proxy before an application that streams. callback: with the callback."""

    def __init__(self, callback: bool, tokens: int) -> None:
        self._callback, self._tokens = callback, tokens

    async def start(self) -> str:
        """Answer HTTP on the loopback interface; the URL."""
        (path,) = PROXY_HOOK.values()
        http_util.RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH = path if self._callback else None
        asked = http_util.configure_http_options_with_defaults(HTTPOptions(host=LOOPBACK, port=free_port()))
        options = http_util.configure_http_middlewares(asked)
        loop = asyncio.get_running_loop()
        self._serving, self._server = await http_util.start_asgi_http_server(self._stream, options, event_loop=loop)
        while not self._server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        return f"http://{LOOPBACK}:{options.port}/"

    async def stop(self) -> None:
        """Stop answering."""
        self._server.should_exit = self._server.force_exit = True
        await self._serving

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(self._tokens):
            await send({"type": "http.response.body", "body": EVENT, "more_body": True})
            await asyncio.sleep(0)  # the other streams' turn
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def measure(options: argparse.Namespace, screen: Console) -> dict[str, list[float]]:
    """Tokens/s of each round, by kind of server; the first round of each warms up and does not count."""
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    limits = httpx.Limits(max_connections=None)
    async with launcher("processes", 1) as launch, httpx.AsyncClient(limits=limits, timeout=600) as client:
        servers = {kind: await launch(ProxyServer, kind == "callback", options.tokens) for kind in KINDS}
        urls = {kind: await server.call("start") for kind, server in servers.items()}
        with progress(screen) as bar:
            task = bar.add_task("rounds", total=options.rounds + 1)
            for number in range(options.rounds + 1):
                for kind in KINDS if number % 2 else KINDS[::-1]:
                    began = time.perf_counter()
                    await asyncio.gather(*(read(client, urls[kind], options.tokens) for _ in range(options.streams)))
                    if number:
                        rates[kind].append(options.streams * options.tokens / (time.perf_counter() - began))
                bar.advance(task)
        for server in servers.values():
            await server.call("stop")
    return rates


async def read(client: httpx.AsyncClient, url: str, tokens: int) -> None:
    """Read one stream to its end."""
    async with client.stream("POST", url, json={"prompt": "Hi"}) as response:
        received = sum([len(part) async for part in response.aiter_raw()])
    assert received == tokens * len(EVENT), f"{received} bytes arrived"


def main() -> None:
    """Measure, print a table and the result."""
    parser = arguments(__doc__)
    parser.add_argument("--streams", type=int, default=16, help="at the same time")
    parser.add_argument("--tokens", type=int, default=1_000, help="of each stream, one event for each")
    parser.add_argument("--rounds", type=int, default=9, help="of each server")
    options = parser.parse_args()
    screen = console()
    rates = asyncio.run(measure(options, screen))
    medians = {kind: round(statistics.median(each)) for kind, each in rates.items()}
    share = round(medians["callback"] / medians["plain"], 3)
    table = Table("server", "tokens/s, median", "lowest", "highest")
    for kind, each in rates.items():
        table.add_row(kind, f"{medians[kind]:,}", f"{min(each):,.0f}", f"{max(each):,.0f}")
    screen.print(table, f"with the callback: {share} of the tokens/s without")
    publish("proxy_streams", {**medians, "share": share}, options.save, details=[rates])


if __name__ == "__main__":
    main()
