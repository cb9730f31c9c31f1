"""Reads a request's body: JSON in UTF-8, plain or compressed, up to a size."""

from __future__ import annotations

import json
import zlib
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request

from router.backend import BadRequest, TooLarge, UnsupportedMedia

_GZIP_BITS, _ZLIB_BITS, _RAW_BITS = 31, 15, -15  # zlib's names of its formats


async def read_json(request: Request, most: int) -> Any:
    """The decoded body. most: maximum bytes, as sent and decompressed.

    Raises UnsupportedMedia unless the headers announce JSON, TooLarge, and BadRequest if the body is not JSON.
    """
    _require_json(request.headers)
    encoding = _content_encoding(request.headers)
    body = await _read(request, most)
    if encoding is not None:
        body = _decompress(body, encoding, most)
    return _decode(body)


def _require_json(headers: Headers) -> None:
    """Raise unless JSON is announced: a browser sends other types, or none, to any site without asking it."""
    stated = headers.get("content-type", "")
    kind = stated.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        found = f"not {stated}" if stated else "and this one has no Content-Type"
        raise UnsupportedMedia(
            f"the body must be JSON, {found}: send the header Content-Type: application/json "
            "(curl -H 'Content-Type: application/json')"
        )


def _content_encoding(headers: Headers) -> str | None:
    """gzip, deflate, or None for a plain body."""
    stated = ",".join(headers.getlist("content-encoding"))
    names = [name for part in stated.split(",") if (name := part.strip().lower()) not in ("", "identity")]
    if not names:
        return None
    if names in (["gzip"], ["x-gzip"], ["deflate"]):
        return names[0].removeprefix("x-")
    raise UnsupportedMedia(f"Content-Encoding: {stated} is not supported: send the body plain, or as gzip or deflate")


async def _read(request: Request, most: int) -> bytes:
    too_large = TooLarge(f"the body is larger than the {most} bytes that this service reads", code="request_too_large")
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > most:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise too_large
    return bytes(body)


def _decompress(body: bytes, encoding: str, most: int) -> bytes:
    """The body without its encoding, decompressed no further than `most` bytes."""
    zlib_header = len(body) > 1 and body[0] & 15 == zlib.DEFLATED and int.from_bytes(body[:2], "big") % 31 == 0
    bits = _GZIP_BITS if encoding == "gzip" else _ZLIB_BITS if zlib_header else _RAW_BITS  # some clients send it raw
    stream = zlib.decompressobj(bits)
    try:
        plain = stream.decompress(body, most + 1)
    except zlib.error:
        raise BadRequest(f"the body is not {encoding}, which its Content-Encoding states") from None
    if len(plain) > most:
        raise TooLarge(
            f"the body decompresses to more than the {most} bytes that this service reads", code="request_too_large"
        )
    if not stream.eof or stream.unused_data:
        raise BadRequest(f"the body is not one whole {encoding} stream, which its Content-Encoding states")
    return plain


def _decode(body: bytes) -> Any:
    if not body:
        raise BadRequest("the body is empty: send a JSON object")
    try:
        text = body.decode("utf-8-sig")  # a byte order mark has no meaning in UTF-8
    except UnicodeDecodeError as error:
        message = f"the body is not JSON in UTF-8: byte {body[error.start]:#04x} at {error.start}"
        raise BadRequest(message) from None
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # JSON strings may contain half of a surrogate pair, text may not
            _require_whole_characters(value)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    return value


def _require_whole_characters(value: Any) -> None:
    """Raise BadRequest that names the first string with half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
        return
    except UnicodeEncodeError:
        pass
    # Paths are linked, (path above, key), and written for one string only: all of them would not fit in memory.
    pending: list[tuple[Any, Any]] = [((), value)]
    while pending:
        path, item = pending.pop()
        if isinstance(item, str):
            if half := next((character for character in item if "\ud800" <= character <= "\udfff"), None):
                where = _written(path)
                raise BadRequest(
                    f"{where or 'the body'} has {ascii(half)[1:-1]}, half of a character: surrogates come in pairs",
                    param=where or None,
                )
        elif isinstance(item, dict):
            for key in reversed(item):
                pending += [((path, key), item[key]), ((path, key), key)]
        elif isinstance(item, list):
            pending += [((path, index), item[index]) for index in reversed(range(len(item)))]


def _written(path: Any) -> str:
    keys = []
    while path:
        path, key = path
        keys.append(str(key))
    return ".".join(reversed(keys))
