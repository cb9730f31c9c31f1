"""Settings of Ray Serve's HTTP proxy, for clients that it would otherwise fail.

The proxy calls `middleware` when it starts if its environment has
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=router.proxy:middleware. It repairs three things:

- A request that offers an upgrade to HTTP/2, as Java's HttpClient does, keeps its body.
- A response has one X-Request-Id, which is the client's; Serve adds a second one.
- A header that is not UTF-8 is served; Serve answers it with 500.
"""

from __future__ import annotations

import httptools
import uvicorn.config
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from router.request_id import HEADER, is_utf8, read_request_id, return_once

# Headers by which an offer of an upgrade is made; the restarted parser does not see them.
_OFFER = (b"upgrade", b"http2-settings", b"connection")


class DecliningProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, which declines every upgrade but WebSocket and serves the request as HTTP/1.1.

    httptools ends a message at the head of a request that offers an upgrade: uvicorn would serve it without its body,
    and nothing after it. Here a new parser reads the request again, without the offer.
    """

    def data_received(self, data: bytes) -> None:
        """Parse received bytes."""
        self._unset_keepalive_if_required()
        try:
            while data:
                data = self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def on_headers_complete(self) -> None:
        """Start the request unless it is about to be read again."""
        if not self._declines():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """End the request's body unless the request is about to be read again."""
        if not self._declines():
            super().on_message_complete()

    def _parse(self, data: bytes) -> bytes:
        """Feed the parser. Returns the bytes to parse next: the head of a declined offer, and what follows it."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
            elif self._declines():
                head = self._head_without_offer()
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn sets it
                return head + data[upgrade.args[0] :]
        return b""

    def _declines(self) -> bool:
        offered = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        return offered and not self._should_upgrade()

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in self.headers if name not in _OFFER]
        if not self.parser.should_keep_alive():
            lines.append(b"connection: close")
        return b"\r\n".join([*lines, b"", b""])


class ClientHeaders:
    """Middleware around Serve's proxy: one X-Request-Id for each response, and headers in UTF-8 for Serve."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its id in exactly one header."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = read_request_id(scope)
        headers = [(name, _as_utf8(value)) for name, value in scope["headers"] if name != HEADER]
        scope["headers"] = [*headers, (HEADER, request_id.text.encode())]
        await self.app(scope, receive, return_once(send, request_id))


def middleware() -> list[Middleware]:
    """Serve's callback: sets the protocol of the proxy's HTTP server and returns its middleware."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{DecliningProtocol.__name__}"
    return [Middleware(ClientHeaders)]


def _as_utf8(value: bytes) -> bytes:
    return value if is_utf8(value) else value.decode("latin-1").encode()
