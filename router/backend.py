"""What the HTTP side needs from the rest of the service, and the errors that a client may see."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

from actors.api.generation import CoordinatorEvent, Event, Generate, Rejected, Role


@dataclass(frozen=True, slots=True)
class Status:
    """missing: roles that no replica serves now. awaited: what they wait for, a sentence each."""

    missing: tuple[Role, ...] = ()
    awaited: tuple[str, ...] = ()


class Backend(Protocol):
    """Who decodes."""

    def generate(self, request: Generate) -> AsyncIterator[Event]:
        """Deltas and then one Finished, or one Rejected alone. Closing the iterator cancels the generation."""
        ...

    async def status(self) -> Status:
        """Whether every role is there."""
        ...


class Coordinators(Protocol):
    """Whoever decodes at the moment; any of them may go at any time."""

    def generate(self, request: Generate) -> AsyncIterator[CoordinatorEvent]:
        """Deltas and then one Finished or Moved, or one Rejected alone. Closing the iterator cancels the generation.

        Raises Unavailable when its coordinator is lost.
        """
        ...

    async def status(self) -> Status:
        """Whether every role is there."""
        ...

    async def ending(self) -> bool:
        """Whether the service is being shut down, so that nobody will come back."""
        ...


class ApiError(Exception):
    """An error for the client, as the OpenAI API states errors. param: the request's field that is wrong.

    retry_after_s: when trying again makes sense, if it does.
    """

    status = 500
    type = "server_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.retry_after_s = message, param, code, retry_after_s
        self.token_ids_so_far: list[list[int]] = []  # token ids of each choice, where generating had begun

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the response beside its body."""
        return {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}

    def body(self, request_id: str) -> dict[str, Any]:
        """The JSON body of the response, or of the event that ends a stream; with the tokens so far, if any."""
        error: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
            "request_id": request_id,
        }
        if self.token_ids_so_far:
            error["choices"] = [{"index": index, "token_ids": ids} for index, ids in enumerate(self.token_ids_so_far)]
        return {"error": error}


class BadRequest(ApiError):
    """A value of the request is wrong."""

    status = 400
    type = "invalid_request_error"


class Unauthorized(ApiError):
    """No API key, or one that is not known."""

    status = 401
    type = "invalid_request_error"

    @property
    def headers(self) -> dict[str, str]:
        """Which kind of key is wanted."""
        return {"WWW-Authenticate": "Bearer"}


class NotFound(ApiError):
    """No such model or address."""

    status = 404
    type = "invalid_request_error"


class TooLarge(ApiError):
    """The request is larger than the service takes."""

    status = 413
    type = "invalid_request_error"


class Overloaded(ApiError):
    """More requests wait than the service takes; try again later."""

    status = 429
    type = "rate_limit_error"


class Unavailable(ApiError):
    """A role is away, so the request cannot be answered now."""

    status = 503
    type = "service_unavailable_error"


class DeadlinePassed(ApiError):
    """The request took longer than the service's deadline for one request."""

    status = 504
    type = "timeout_error"


def rejection(rejected: Rejected) -> ApiError:
    """What a client is told when the service did not take its request on."""
    kinds: dict[str, type[ApiError]] = {"overloaded": Overloaded, "unavailable": Unavailable, "invalid": BadRequest}
    return kinds[rejected.code](rejected.message, code=rejected.code, retry_after_s=rejected.retry_after_s)
