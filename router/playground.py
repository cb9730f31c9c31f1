"""Serves the playground: the static page at `/` that shows the answers of three modes side by side."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from actors.config import ServiceConfig
from router.backend import NotFound

FOLDER = Path(__file__).with_suffix("")
PAGE, DEFAULTS = "index.html", "defaults.json"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
HEADERS = {
    # Only these files and this service: no inline script or style, and no string becomes markup.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # revalidated by ETag each time, so an upgrade takes effect at once
}


def playground(service: ServiceConfig) -> APIRouter:
    """Routes GET / and GET /playground/<file>; none if the configuration disables the page."""
    router = APIRouter(include_in_schema=False)
    if not service.router.playground:
        return router
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in MEDIA_TYPES}
    files[DEFAULTS] = json.dumps(defaults(service), ensure_ascii=False).encode()

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return file_response(request, PAGE, files[PAGE])

    @router.api_route("/playground/{name}", methods=["GET", "HEAD"])
    async def file(request: Request, name: str) -> Response:
        if name not in files:
            raise NotFound(f"the playground has no file {name!r}")
        return file_response(request, name, files[name])

    return router


def defaults(service: ServiceConfig) -> dict[str, Any]:
    """Initial values of the page's settings, and its example questions."""
    return {
        "alpha": service.guidance.alpha,
        "warmup_tokens": service.guidance.warmup_tokens,
        "temperature": service.default_sampling.temperature,
        "max_tokens": service.default_sampling.max_tokens,
        "examples": service.router.examples,
    }


def file_response(request: Request, name: str, content: bytes) -> Response:
    """The response with a file, or 304 if the client has its current version."""
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": etag}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=MEDIA_TYPES[Path(name).suffix], headers=headers)
