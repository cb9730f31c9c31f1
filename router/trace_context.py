"""Reads the trace that a client's `traceparent` header names (W3C Trace Context)."""

from __future__ import annotations

import re

from starlette.types import Scope

HEADER = b"traceparent"
# Version, trace id, parent id, flags. Later versions may append fields.
_FORM = re.compile(
    rb"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<parent>[0-9a-f]{16})-[0-9a-f]{2}(?P<more>-.*)?"
)
_INVALID_VERSION, _FIRST_VERSION = b"ff", b"00"


def read_trace_id(scope: Scope) -> str:
    """The trace id of a request, 32 hexadecimal digits; "" without a valid header, which the standard ignores."""
    given = [value.strip() for name, value in scope["headers"] if name.lower() == HEADER]
    found = _FORM.fullmatch(given[0]) if len(given) == 1 else None
    if found is None or found["version"] == _INVALID_VERSION:
        return ""
    if found["version"] == _FIRST_VERSION and found["more"] is not None:
        return ""
    if not found["trace"].strip(b"0") or not found["parent"].strip(b"0"):
        return ""
    return found["trace"].decode()
