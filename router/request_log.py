"""Request log: middleware that counts each request and logs it as one JSON line on the logger `router.request_log`.

The line contains no text of prompts or answers; `router.log_prompts` adds the prompts.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.api.generation import Delta, Event, Finished, Generate, Usage
from actors.config import KeysConfig
from actors.metrics import Recorder
from router.backend import Backend, Status, shorten
from router.request_id import ClientId
from router.trace_context import read_trace_id

log = logging.getLogger(__name__)

COUNTED_PREFIX = "/v1/"  # only requests below this address are counted: no probes
MAX_PATH = 300  # characters of a path in a line
CLIENT_CLOSED = 499  # status recorded for a client that disconnected before the answer's end; it is not sent


@dataclass(slots=True)
class RequestRecord:
    """Data about one request, collected while it is served; handlers find it in `scope["record"]`.

    key: name of the API key. model: a served name. tokens: count so far, by sequence. last_token_at: time of a
    sequence's newest token. error: code or type of the final error; stream_error_status: its status if the stream had
    begun. prompt: only if prompts are logged. trace_id: of the client's trace, "" without one.
    """

    recorder: Recorder
    request_id: ClientId
    method: str
    path: str
    trace_id: str = ""
    arrived: float = field(default_factory=time.time)  # seconds since the epoch
    began: float = field(default_factory=time.perf_counter)
    key: str | None = None
    model: str | None = None
    status: int | None = None
    prompt_tokens: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    last_token_at: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    first_token_s: float | None = None
    error: str | None = None
    stream_error_status: int | None = None
    prompt: Any = None

    def watch(self, backend: Backend) -> Backend:
        """Wrap `backend` so that this record counts the tokens of the request's sequences."""
        return _RecordingBackend(self, backend)

    def begin(self, sequence: str) -> None:
        """Register a sequence of this request."""
        self.tokens[sequence] = 0

    def add(self, sequence: str, event: Event) -> None:
        """Record an event of a sequence."""
        if isinstance(event, Delta) and event.tokens:
            self._count_tokens(sequence, len(event.tokens))
        elif isinstance(event, Finished):
            self.tokens[sequence], self.reasons[sequence] = event.usage.completion_tokens, event.reason

    def metrics(self, usages: Sequence[Usage]) -> dict[str, float | None] | None:
        """Times of the answer in milliseconds, and its speed; None for several sequences, which share no time.

        usages: of the finished sequences. A time is None if the answer has too few tokens for it.
        """
        if len(usages) != 1:
            return None
        (usage,), last_token_at = usages, next(iter(self.last_token_at.values()), None)
        took = None
        if self.first_token_s is not None and last_token_at is not None:
            took = last_token_at - self.began - self.first_token_s
        steps = usage.completion_tokens - 1
        return {
            "time_to_first_token_ms": None if self.first_token_s is None else _milliseconds(self.first_token_s),
            "generation_time_ms": None if took is None else _milliseconds(took),
            "queue_time_ms": _milliseconds(usage.queued_s),
            "mean_itl_ms": _milliseconds(took / steps) if took and steps > 0 else None,
            "tokens_per_second": round(usage.completion_tokens / took, 1) if took else None,
        }

    def end(self) -> None:
        """Count the finished request in the metrics."""
        if self.path.startswith(COUNTED_PREFIX) and self.method != "OPTIONS":
            status = next((each for each in (self.stream_error_status, self.status) if each is not None), CLIENT_CLOSED)
            self.recorder.counter("thinklogit_requests", *self._labels, str(status)).add()

    @property
    def _labels(self) -> tuple[str, str]:
        """Metric labels: model and key, "" if unknown."""
        return self.model or "", self.key or ""

    def _count_tokens(self, sequence: str, count: int) -> None:
        now, (model, key) = time.perf_counter(), self._labels
        if self.first_token_s is None:
            self.first_token_s = now - self.began
            self.recorder.counter("thinklogit_prompt_tokens", model, key).add(self.prompt_tokens)
        if sequence in self.last_token_at:
            took = self.recorder.histogram("thinklogit_inter_token_seconds", model)
            took.observe((now - self.last_token_at[sequence]) / count)
        else:
            self.recorder.histogram("thinklogit_first_token_seconds", model).observe(now - self.began)
        self.recorder.counter("thinklogit_completion_tokens", model, key).add(count)
        self.last_token_at[sequence] = now
        self.tokens[sequence] += count

    def line(self) -> str:
        """The request as a JSON object on one line; durations in milliseconds."""
        fields = {
            "time": datetime.fromtimestamp(self.arrived, UTC).isoformat(timespec="milliseconds"),
            "request_id": self.request_id.text,
            "key": self.key,
            "method": self.method,
            "path": shorten(self.path, MAX_PATH),
            "model": self.model,
            "status": self.status,
            "error": self.error,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": sum(self.tokens.values()),
            "duration_ms": _milliseconds(time.perf_counter() - self.began),
            "first_token_ms": None if self.first_token_s is None else _milliseconds(self.first_token_s),
            "finish_reasons": [self.reasons.get(sequence) for sequence in self.tokens],
        }
        optional = {"trace_id": self.trace_id or None, "prompt": self.prompt}
        return json.dumps(fields | {name: value for name, value in optional.items() if value is not None})


class _RecordingBackend:
    """A backend whose events are counted in a request's record."""

    def __init__(self, record: RequestRecord, backend: Backend) -> None:
        self._record, self._backend = record, backend

    async def generate(self, request: Generate) -> AsyncIterator[Event]:
        """See router.backend.Backend.generate."""
        self._record.begin(request.request_id)
        async with aclosing(cast("AsyncGenerator[Event, None]", self._backend.generate(request))) as events:
            async for event in events:
                self._record.add(request.request_id, event)
                yield event

    async def status(self) -> Status:
        """See router.backend.Backend.status."""
        return await self._backend.status()


class RequestLog:
    """Middleware that creates each request's record, counts it at the end and logs it unless its address is open."""

    def __init__(self, app: ASGIApp, keys: KeysConfig, recorder: Recorder) -> None:
        self.app, self._unlogged, self._recorder = app, keys.opens, recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its record in `scope["record"]`."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        of_request = scope["request_id"], scope["method"], request_path(scope), read_trace_id(scope)
        record = scope["record"] = RequestRecord(self._recorder, *of_request)

        async def send_and_record(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_record)
        except Exception:  # the server answers 500
            record.status, record.stream_error_status = record.status or 500, 500
            raise
        finally:
            record.end()
            if not self._unlogged(record.path):
                log.info("%s", record.line())


def request_path(scope: Scope) -> str:
    """The path of a request, without the prefix under which the service is mounted."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path or "/"


def _milliseconds(seconds: float) -> float:
    return round(1_000 * seconds, 1)
