"""Replies of a model that do not fit the requests are refused: kernels read and write without checking bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.api.generation import ROLES
from actors.preflight import load_tokenizers
from actors.wire.messages import Message, ProtocolError, Rows, Values
from benchmarks.lockstep import Lockstep, StandIn
from benchmarks.synthetic_models import guided_request, wide_config
from benchmarks.synthetic_rows import Tail, TailEngine, TailStream

WIDTH = 4_000
Change = Callable[[Message], Message]


def more_rows(message: Message) -> Message:
    """Each item claims one row more, which the columns have."""
    if not isinstance(message, Rows):
        return message
    items = message.items.copy()
    items["rows"] += 1
    columns = "logsumexp", "tempered", "ids", "pages", "logits"
    twice: dict[str, Any] = {name: np.tile(getattr(message, name), 2) for name in columns}
    return replace(message, items=items, **twice)


def narrower_slices(message: Message) -> Message:
    """Each row has one id less."""
    if not isinstance(message, Rows) or not len(message.ids):
        return message
    items = message.items.copy()
    items["k"] -= 1
    return replace(message, items=items, ids=message.ids[:-1], logits=message.logits[:-1])


def other_required_logits(message: Message) -> Message:
    """Each row has a required logit that nobody asked for."""
    if not isinstance(message, Rows):
        return message
    items = message.items.copy()
    items["required_ids"] += 1
    return replace(message, items=items, required=np.append(message.required, np.float32(0)))


def fewer_logits(message: Message) -> Message:
    """A lookup is answered with one logit less."""
    if not isinstance(message, Values):
        return message
    items = message.items.copy()
    items["values"] -= 1
    return replace(message, items=items, values=message.values[:-1])


def no_wider_slice(message: Message) -> Message:
    """A request for a wider slice is answered without any row."""
    if not isinstance(message, Rows) or message.items["k"].max() <= 128:
        return message
    items = message.items.copy()
    items["rows"] = 0
    columns = "logsumexp", "tempered", "ids", "pages", "logits"
    none: dict[str, Any] = {name: getattr(message, name)[:0] for name in columns}
    return replace(message, items=items, **none)


@pytest.mark.parametrize("change", [more_rows, narrower_slices, other_required_logits, fewer_logits, no_wider_slice])
def test_a_reply_that_was_not_requested_like_this_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    config = wide_config(tmp_path, WIDTH, exchange={"audit_every": 0, "max_unseen_mass": 1e-9})
    stream = TailStream(Tail(2.2), WIDTH)
    lockstep = Lockstep(config, load_tokenizers(config), {role: TailEngine(stream, role) for role in ROLES})
    active = lockstep.open(guided_request("r", [1, 2, 3], 8, 0.6))
    lockstep.commit(active, lockstep.step(active))  # as it should be
    answer = StandIn.answer

    def changed(self: StandIn, messages: Sequence[Message]) -> list[Any]:
        return [change(reply) for reply in answer(self, messages)]

    monkeypatch.setattr(StandIn, "answer", changed)
    with pytest.raises(ProtocolError, match="sent"):
        lockstep.step(active)
