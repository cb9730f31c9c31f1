"""Access control: middleware that every request passes before it reaches its handler."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from actors.config import RouterConfig
from actors.metrics import Recorder
from router.backend import ApiError
from router.keys import Keys
from router.limits import Limits
from router.request_log import RequestLog, request_path


def add_access_checks(app: FastAPI, config: RouterConfig, recorder: Recorder) -> None:
    """Add the middleware for the request log, CORS and API keys; a request passes them in this order.

    CORS comes before the keys because a browser's preflight request carries no key. Raises ConfigError if the keys
    cannot be read.
    """
    if config.keys.required:
        app.add_middleware(Gate, config=config, keys=Keys(config.keys))
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(RequestLog, keys=config.keys, recorder=recorder)  # outermost: logs the gate's errors too


class Gate:
    """Middleware that checks API keys and enforces their limits; `keys.open_paths` need no key."""

    def __init__(self, app: ASGIApp, config: RouterConfig, keys: Keys) -> None:
        self.app, self._keys = app, keys
        self._limits, self._opens = Limits(config.limits), config.keys.opens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer with 401 or 429."""
        if scope["type"] != "http" or self._opens(request_path(scope)):
            await self.app(scope, receive, send)
            return
        try:
            name = self._keys.owner(Headers(scope=scope).get("authorization"))
            scope["record"].key = name
            self._limits.enter(name)
        except ApiError as error:
            await error_response(scope, error)(scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
        finally:
            self._limits.leave(name)


def error_response(scope: Scope, error: ApiError) -> JSONResponse:
    """The HTTP response for an error; also notes the error in the request's record."""
    scope["record"].error = error.code or error.type
    return JSONResponse(error.body(scope["request_id"].text), error.status, headers=error.headers)
