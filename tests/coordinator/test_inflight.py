"""Calls in flight: ids, batches, and what is left of a batch when some of its calls are forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from actors.api.generation import Role
from actors.api.sampling_params import Sampling
from actors.coordinator.frames import FrameShape, RowFrame, RowKeys
from actors.coordinator.inflight import Calls, ExtendCalls, InflightCalls, Lookups, RowCalls
from actors.coordinator.states import RowStage
from actors.coordinator.table import SESSION, SessionTable
from actors.decoding.candidates import BlockLayout
from actors.decoding.decision import spec_columns
from actors.decoding.kernels import SPEC
from actors.decoding.vocabulary import NO_REQUIRED_LOGITS, RequiredLogits
from actors.wire.messages import ProtocolError


class Asker:
    """The part of a window that its calls touch."""

    def __init__(self) -> None:
        self.awaited: dict[Role, tuple[Any, int] | None] = {}


def windows(count: int) -> list[Asker]:
    return [Asker() for _ in range(count)]


def frame_of(rows: int) -> RowFrame[str]:
    """A frame of rows of one model, whose owners are letters."""
    sessions = np.zeros(rows, SESSION)
    numbers = np.zeros((1, rows), np.int64)
    keys = RowKeys(sessions, numbers, numbers, numbers.astype(np.uint64))
    required: Mapping[Role, RequiredLogits] = {"target": NO_REQUIRED_LOGITS}
    shape = FrameShape(required, False, False, False, 4, ("target",), BlockLayout(required, {"target": 4}))
    return RowFrame("abcdefgh"[:rows], shape, keys, RowStage.EXTENDING)


def found(calls: InflightCalls, *ids: int) -> list[tuple[int, Calls, int, int]]:
    return list(calls.find(np.array(ids, np.uint64)))


def test_ids_are_split_into_runs_of_one_batch_and_unknown_ones_left_out() -> None:
    calls = InflightCalls()
    first, second = ExtendCalls("target", windows(3)), ExtendCalls("guider", windows(2))
    assert calls.extend(first) == 1
    assert calls.unawaited_id() == 4
    assert calls.extend(second) == 5
    assert found(calls, 1, 2, 3, 4, 5, 6) == [(0, first, 0, 3), (4, second, 0, 2)]
    assert found(calls, 6, 2, 9, 1) == [(0, second, 1, 2), (1, first, 1, 2), (3, first, 0, 1)]
    assert found(calls, 7, 8) == found(calls) == []


def test_a_batch_is_forgotten_with_its_last_call() -> None:
    calls, members = InflightCalls(), windows(3)
    batch = ExtendCalls("target", members)
    calls.extend(batch)
    calls.forget_extend(members[1], "target")
    assert batch.among(0, 3) == [0, 2]
    calls.end(batch, slice(0, 3))
    assert found(calls, 1, 2, 3) == []


def test_a_reply_for_an_earlier_batch_passes_over_those_that_ended() -> None:
    calls = InflightCalls()
    batches = [ExtendCalls[Any]("target", windows(2)) for _ in range(3)]
    for batch in batches:
        calls.extend(batch)
    calls.end(batches[1], slice(0, 2))
    assert found(calls, 1, 2, 3, 4, 5, 6) == [(0, batches[0], 0, 2), (4, batches[2], 0, 2)]


def test_forgotten_lookups_of_a_row_store_nothing_and_other_rows_go_on() -> None:
    calls, frame, stored = InflightCalls(), frame_of(3), []

    def store(rows: Any, counts: Any, places: Any, values: Any) -> None:
        stored.append((rows.tolist(), counts.tolist(), places.tolist(), values.tolist()))

    rows = np.array([0, 2])
    batch = Lookups("target", frame, rows, np.array([2, 1]), np.array([5, 7, 6]), store)
    frame.ask("target", rows)
    calls.ask(batch)
    calls.forget_rows(frame, 0)
    assert batch.among(0, 2) == [1]
    batch.take(np.array([9.0]), 1, 2)
    calls.end(batch, slice(0, 2))
    assert stored == [([2], [1], [6], [9.0])]
    assert frame.lookups[0].tolist() == [1, 0, 0]
    assert not frame.calls


def test_lookups_with_another_number_of_logits_are_refused() -> None:
    frame, rows = frame_of(2), np.array([0, 1])
    batch = Lookups("target", frame, rows, np.array([2, 1]), np.array([5, 7, 6]), lambda *stored: None)
    for first, end, count in ((0, 2, 2), (0, 2, 4), (1, 2, 2)):
        with pytest.raises(ProtocolError, match="another number of logits"):
            batch.take(np.zeros(count), first, end)


def test_widenings_of_other_roles_survive_when_one_role_starts_again() -> None:
    calls, frame = InflightCalls(), frame_of(2)
    guider, target = (RowCalls(role, frame, np.array([1])) for role in ("guider", "target"))
    calls.ask(guider)
    calls.ask(target)
    calls.forget_rows(frame, 1, widenings_to="target")
    assert frame.calls == [guider]
    calls.forget_rows(frame, 1)
    assert not frame.calls


@pytest.mark.parametrize("many", [1, 64, 200])
def test_sessions_keep_their_slots_when_the_table_grows_and_freed_ones_are_used_again(many: int) -> None:
    table = SessionTable()
    spec: NDArray[Any] = spec_columns([(0, 0.0, Sampling(temperature=0.5), 3, 0)])
    slots = [table.add(1_000 + number, number, 1, spec) for number in range(many)]
    assert len(set(slots)) == many
    assert table.rows["key"][slots].tolist() == [1_000 + number for number in range(many)]
    assert table.rows["spec"][slots].dtype == SPEC
    assert set(table.rows["spec"]["temperature"][slots]) == {0.5}
    table.remove(slots[0])
    assert table.add(7, 7, 1, spec) == slots[0]
