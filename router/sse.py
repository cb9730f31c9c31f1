"""Streams an answer as server-sent events, and turns exceptions into errors for the client."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from actors.api.generation import Finished
from router.backend import ApiError, Backend, DeadlinePassed
from router.request_id import ClientId
from router.request_log import CLIENT_CLOSED
from router.request_planning import Plan
from router.responses import BodyFormat, StreamedChoice, plain_usage
from router.schema import StreamOptions
from router.streams import ClientGone, Generations, while_connected

log = logging.getLogger(__name__)

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)  # JSON has no NaN
KEEP_ALIVE = b": keep-alive\n\n"  # a comment, which clients of server-sent events ignore


class EventStream(Response):
    """An answer as server-sent events. The status waits for the first event, so that an early error has its own."""

    media_type = "text/event-stream"

    def __init__(
        self,
        backend: Backend,
        plan: Plan,
        body_format: BodyFormat,
        options: StreamOptions,
        deadline: float | None,
        idle_s: float,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._backend, self._plan, self._format = backend, plan, body_format
        self._options, self._deadline, self._idle_s = options, deadline, idle_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the end, an error or the client's disconnect."""
        try:
            await while_connected(receive, self._send_all(scope, _detect_disconnect(send)))
        except ClientGone:
            scope["record"].status = CLIENT_CLOSED
            log.info("%a: the client disconnected; its generations are cancelled", scope["request_id"].text)

    async def _send_all(self, scope: Scope, send: Send) -> None:
        request_id: ClientId = scope["request_id"]
        started = False
        try:
            with api_errors(request_id):
                async with asyncio.timeout_at(self._deadline), aclosing(self._events()) as events:
                    async for event in events:
                        if not started:
                            started = True
                            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                        await send({"type": "http.response.body", "body": event, "more_body": True})
        except ApiError as error:
            if not started:
                raise
            scope["record"].error, scope["record"].stream_error_status = error.code or error.type, error.status
            await send(
                {"type": "http.response.body", "body": _encode_event(error.body(request_id.text)), "more_body": True}
            )
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncGenerator[bytes, None]:
        streams: dict[int, StreamedChoice] = {}  # by choice that has begun
        ends: dict[int, Finished] = {}
        counts = [0] * len(self._plan.sequences)  # by choice: tokens
        prompts = [len(prompt) for prompt in self._plan.prompts]
        message = b""
        async with Generations(self._backend, self._plan.sequences, idle_s=self._idle_s) as generations:
            async for batch in generations.batches():
                ends |= batch.finished
                chunks = []
                for choice in sorted(batch.deltas.keys() | batch.finished.keys()):
                    delta, end = batch.deltas.get(choice), batch.finished.get(choice)
                    counts[choice] += len(delta.tokens) if delta else 0
                    first = choice not in streams
                    if first:
                        streams[choice] = self._format.begin(choice)
                    apart = streams[choice].parser is not None and delta is not None and end is not None
                    # OpenAI's client ends a tool call at the event behind it.
                    for part, its_end in ((delta, None), (None, end)) if apart else ((delta, end),):
                        chunk = self._format.chunk(choice, part, its_end, first, streams[choice])
                        if self._options.include_usage and self._options.continuous_usage_stats:
                            chunk |= {"usage": plain_usage(prompts[choice], counts[choice])}
                        chunks.append(chunk)
                        first = False
                message = b"".join(map(_encode_event, chunks)) or KEEP_ALIVE
                if len(ends) < len(self._plan.sequences):
                    yield message
        yield message + self._end(ends)  # nothing runs any more: a client may disconnect as soon as it reads the end

    def _end(self, ends: dict[int, Finished]) -> bytes:
        """The events after the last token: counts and metrics, if the request wants them, and the end of the stream."""
        usages = [ends[choice].usage for choice in sorted(ends)]
        last = self._format.last_chunk(usages, self._plan.prompt_tokens, self._options.include_usage)
        return (b"" if last is None else _encode_event(last)) + b"data: [DONE]\n\n"


def _detect_disconnect(send: Send) -> Send:
    async def send_or_raise(message: Message) -> None:
        try:
            await send(message)
        except OSError:  # raised by servers if the connection is closed
            raise ClientGone from None

    return send_or_raise


def _encode_event(body: dict[str, Any]) -> bytes:
    return f"data: {_ENCODER.encode(body)}\n\n".encode()


@contextmanager
def api_errors(request_id: ClientId) -> Iterator[None]:
    """Turn exceptions into an ApiError; the details of unexpected ones go to the log, not to the client."""
    try:
        yield
    except (ApiError, ClientGone):
        raise
    except TimeoutError as error:
        raise DeadlinePassed("the service's deadline for one request has passed: ask for fewer tokens") from error
    except ClientDisconnect:
        raise ClientGone from None
    except Exception as error:
        log.exception("%a failed", request_id.text)
        raise ApiError(f"something went wrong inside; the log has it under the request id {request_id.text}") from error
