"""Finds the extends of a frame that can never succeed, so that each is refused alone, before it joins a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.replica.answers import ids_in_range, sampling_of
from actors.wire.columns import Draft, ExtendItem
from actors.wire.messages import WHOLE, Extend
from actors.wire.replies import answer_bytes

MAX_DRAFTS = 8

Check = tuple[NDArray[Any], Callable[[ExtendItem], str]]  # [items], true if an item is invalid, and the reason


class ExtendValidator:
    """Checks the items of `Extend` messages, all but what the engine itself checks.

    width: logits in a row. max_position: most tokens of a session. answer_limit: most bytes of an item's answer.
    """

    def __init__(self, width: int, max_position: int, answer_limit: int) -> None:
        self._width, self._max_position, self._answer_limit = width, max_position, answer_limit

    def invalid(self, message: Extend, items: Sequence[ExtendItem]) -> dict[int, str]:
        """By the index of each item that can never succeed, the reason."""
        reasons: dict[int, str] = {}
        for invalid, reason in self._checks(message, items):
            for place in np.flatnonzero(invalid).tolist():
                reasons.setdefault(place, reason(items[place]))
        for place in message.drafting["item"].tolist():
            draft = items[place].draft
            if draft is not None and (why := _invalid_draft(items[place].rows, draft)):
                reasons.setdefault(place, why)
        return reasons

    def _checks(self, message: Extend, items: Sequence[ExtendItem]) -> Iterator[Check]:
        table, width, most = message.items, self._width, self._max_position
        k, ends, rows = table["k"], table["position"].astype(np.int64) + table["tokens"], table["rows"].astype(np.int64)
        if len(message.drafting):
            rows[message.drafting["item"]] += message.drafting["drafts"]
        sizes = answer_bytes(rows, np.minimum(k, width), table["required_ids"], width)
        yield k < WHOLE, lambda item: f"k = {item.k}"
        if not ids_in_range(message.required_ids, width):
            invalid = np.array([not ids_in_range(item.required_ids, width) for item in items])
            yield invalid, lambda item: f"required ids must lie in [0, {width})"
        yield ends > most, lambda item: f"{item.end} tokens are more than the {most} of this model"
        yield (
            ~(table["temperature"] > 0),
            lambda item: f"temperature {item.temperature:g} of a tempered logsumexp is not above 0",
        )
        yield (
            sizes > self._answer_limit,
            lambda item: f"{item.rows} rows of k = {item.k} do not fit a frame: request fewer rows at once",
        )


def _invalid_draft(rows: int, draft: Draft) -> str | None:
    """The reason why a draft can never be made, or None."""
    if rows != 1:
        return f"drafts follow one row, not {rows}"
    if not 1 <= draft.drafts <= MAX_DRAFTS:
        return f"{draft.drafts} drafts are requested, 1 to {MAX_DRAFTS} are allowed"
    if draft.position < 0:
        return f"position {draft.position} of a draft is negative"
    try:
        sampling_of(draft)
    except ValueError as error:
        return str(error)
    return None
