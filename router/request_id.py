"""Request ids: middleware that gives each request the client's X-Request-Id, or a new one, and returns it once.

A body's own `request_id` takes its place as soon as the body is read.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"x-request-id"
MAX_CHARACTERS = 256  # a longer id is cut: it is repeated in bodies and log lines


@dataclass(slots=True)
class ClientId:
    """A request's id. codec: of its bytes in the header, UTF-8, or Latin-1 where they are not UTF-8."""

    text: str
    codec: str = "utf-8"

    @property
    def header(self) -> bytes:
        """The value of the header."""
        return self.text.encode(self.codec)

    def rename(self, text: str) -> None:
        """Use the id that the request's body has."""
        self.text, self.codec = text, "utf-8"


def read_request_id(scope: Scope) -> ClientId:
    """The id in the first X-Request-Id of a request, cut to MAX_CHARACTERS; a new one if there is none."""
    given = next((value for name, value in scope["headers"] if name.lower() == HEADER), b"").strip()
    codec = "utf-8" if is_utf8(given) else "latin-1"
    text = given.decode(codec)[:MAX_CHARACTERS] or uuid.uuid4().hex
    return ClientId(text, codec)


def return_once(send: Send, request_id: ClientId) -> Send:
    """`send` with exactly one X-Request-Id in the response, in place of any that other layers have set.

    The first one of the response stays if it is another id: the router has read it in the body.
    """

    async def send_with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = message.get("headers", ())
            own = next((value for name, value in headers if name.lower() == HEADER), None)
            kept = request_id.header if own in (None, request_id.text.encode()) else own
            message = {**message, "headers": [*(pair for pair in headers if pair[0].lower() != HEADER), (HEADER, kept)]}
        await send(message)

    return send_with_id


def is_utf8(value: bytes) -> bool:
    """True if the bytes are text in UTF-8."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


class RequestId:
    """Middleware that keeps the client's X-Request-Id, or creates one, and returns it with every response."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its `ClientId` in `scope["request_id"]`."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = read_request_id(scope)
        scope["request_id"] = request_id
        await self.app(scope, receive, return_once(send, request_id))
