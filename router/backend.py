"""The interface between the HTTP side and the coordinators, and the errors that clients receive."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

from actors.api.generation import CoordinatorEvent, Event, Generate, Rejected, Role

MAX_MESSAGE, MAX_PARAM = 1_000, 200  # characters of an error


@dataclass(frozen=True, slots=True)
class Status:
    """State of the roles. missing: without a connected replica. awaited: one sentence each on what they wait for."""

    missing: tuple[Role, ...] = ()
    awaited: tuple[str, ...] = ()


class Backend(Protocol):
    """Decodes requests; hides the loss of coordinators."""

    def generate(self, request: Generate) -> AsyncIterator[Event]:
        """Deltas and then one Finished, or one Rejected alone. Closing the iterator cancels the generation."""
        ...

    async def status(self) -> Status:
        """The roles' state."""
        ...


class Coordinators(Protocol):
    """The coordinators that run at the moment; any of them may be lost at any time."""

    def generate(self, request: Generate) -> AsyncIterator[CoordinatorEvent]:
        """Deltas and then one Finished or Moved, or one Rejected alone. Closing the iterator cancels the generation.

        Raises Unavailable if the coordinator is lost.
        """
        ...

    async def status(self) -> Status:
        """The roles' state."""
        ...

    async def ending(self) -> bool:
        """True if the service is being shut down, so that no coordinator will return."""
        ...


def shorten(text: str, most: int) -> str:
    """`text` in at most about `most` characters, without its middle, and without halves of surrogate pairs."""
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}...({len(text):,} characters)...{text[-most // 4 :]}"


class ApiError(Exception):
    """An error response in OpenAI's form. param: the request's field at fault.

    Both are shortened: they may repeat text of the client.
    retry_after_s: seconds after which a retry makes sense; None if it does not.
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
        self.message = shorten(message, MAX_MESSAGE)
        self.param = None if param is None else shorten(param, MAX_PARAM)
        self.code, self.retry_after_s = code, retry_after_s
        self.token_ids_so_far: list[list[int]] = []  # token ids by choice; empty if no token was generated

    @property
    def headers(self) -> dict[str, str]:
        """Additional headers of the response."""
        return {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}

    def body(self, request_id: str) -> dict[str, Any]:
        """The JSON body of the response, or of a stream's last event; includes the tokens generated so far."""
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
    """The API key is missing or unknown."""

    status = 401
    type = "invalid_request_error"

    @property
    def headers(self) -> dict[str, str]:
        """The authentication scheme that the service expects."""
        return {"WWW-Authenticate": "Bearer"}


class NotFound(ApiError):
    """There is no such model or address."""

    status = 404
    type = "invalid_request_error"


class TooLarge(ApiError):
    """The request exceeds a size limit of the service."""

    status = 413
    type = "invalid_request_error"


class UnsupportedMedia(ApiError):
    """The body is of a type or an encoding that the service does not read."""

    status = 415
    type = "invalid_request_error"


class Overloaded(ApiError):
    """The admission queue is full, or a key exceeds its limits."""

    status = 429
    type = "rate_limit_error"


class Unavailable(ApiError):
    """A role is not connected, so the request cannot be answered now."""

    status = 503
    type = "service_unavailable_error"


class DeadlinePassed(ApiError):
    """The request exceeded `deadlines.request_s`."""

    status = 504
    type = "timeout_error"


def rejection(rejected: Rejected) -> ApiError:
    """The client's error for a request that a coordinator rejected."""
    kinds: dict[str, type[ApiError]] = {"overloaded": Overloaded, "unavailable": Unavailable, "invalid": BadRequest}
    return kinds[rejected.code](rejected.message, code=rejected.code, retry_after_s=rejected.retry_after_s)
