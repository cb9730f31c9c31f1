"""Decisions of many windows at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from actors.api.sampling_params import Sampling
from actors.config import Exchange
from actors.coordinator.frames import FrameShape, RowFrame, RowKeys
from actors.coordinator.states import RowStage
from actors.coordinator.verification import Verifier
from actors.decoding.candidates import BlockLayout
from actors.decoding.decision import spec_columns
from actors.decoding.kernels import SESSION
from actors.decoding.vocabulary import NO_REQUIRED_LOGITS


def frame_of(*likeliest: int) -> RowFrame[Any]:
    """A frame of greedy rows of one model with eight ids; each row's likeliest id is given."""
    count = len(likeliest)
    sessions, numbers, every = np.zeros(count, SESSION), np.zeros((1, count), np.int64), np.arange(count)
    sessions["spec"] = spec_columns([(0, 0.0, Sampling(temperature=0.0), 1, 0)])
    required = {"target": NO_REQUIRED_LOGITS}
    layout = BlockLayout(cast(Any, required), {"target": 8})
    shape = FrameShape(cast(Any, required), False, False, False, 8, False, ("target",), layout)
    keys = RowKeys(sessions, numbers, numbers, numbers.astype(np.uint64))
    frame: RowFrame[Any] = RowFrame([None] * count, shape, keys, RowStage.EXTENDING)
    ids, logits = np.tile(np.arange(8), (count, 1)), np.zeros((count, 8))
    logits[every, list(likeliest)] = 5.0
    frame.block.store("target", every, ids, logits, np.zeros((count, 0)), np.full(count, 6.0), np.full(count, 6.0))
    frame.block.merge(every)
    return frame


def window_of(*rows: tuple[RowFrame[Any], int]) -> Any:
    session = SimpleNamespace(history_free=True, listed=None, grammar=None, decides=lambda ahead: True)
    active = SimpleNamespace(session=session, alpha=lambda ahead: 0.0)
    window = SimpleNamespace(active=active, guided=False, next=0, rows=[])
    for frame, at in rows:
        window.rows.append(CompleteRow(window, frame, at))
    return window


class CompleteRow:
    """A row that can be decided."""

    complete = True

    def __init__(self, window: Any, frame: RowFrame[Any], at: int) -> None:
        self.window, self.frame, self.at = window, frame, at


def test_rows_of_a_window_keep_their_order_when_one_has_moved_to_a_wider_frame() -> None:
    narrow, wide = frame_of(1, 2, 3), frame_of(4)
    first, second = window_of((narrow, 0)), window_of((wide, 0), (narrow, 2))
    found = Verifier(Exchange()).verify([first, second])
    assert [[one.rows.tokens[one.number] for one in each] for each in found] == [[1], [4, 3]]
