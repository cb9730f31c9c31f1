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
from actors.coordinator.table import SessionTable
from actors.decoding.candidates import BlockLayout
from actors.decoding.decision import spec_columns
from actors.decoding.kernels import SESSION, SPEC
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
    shape = FrameShape(required, False, False, False, 4, False, ("target",), BlockLayout(required, {"target": 4}))
    return RowFrame("abcdefgh"[:rows], shape, keys, RowStage.EXTENDING)


def found(calls: InflightCalls, *ids: int) -> list[tuple[Calls, list[int], list[int]]]:
    return [(batch, numbers.tolist(), at.tolist()) for batch, numbers, at in calls.find(np.array(ids, np.uint64))]


def test_ids_are_found_by_batch_in_any_order_and_unknown_ones_left_out() -> None:
    calls = InflightCalls()
    first, second = ExtendCalls("target", windows(3)), ExtendCalls("guider", windows(2))
    assert calls.extend(first) == 1
    assert calls.unawaited_id() == 4
    assert calls.extend(second) == 5
    assert found(calls, 1, 2, 3, 4, 5, 6) == [(first, [0, 1, 2], [0, 1, 2]), (second, [0, 1], [4, 5])]
    assert found(calls, 6, 2, 9, 1) == [(first, [0, 1], [3, 1]), (second, [1], [0])]
    assert found(calls, 7, 8) == found(calls) == []


def test_a_call_that_is_answered_twice_in_one_message_is_refused() -> None:
    calls = InflightCalls()
    calls.extend(ExtendCalls("target", windows(3)))
    with pytest.raises(ProtocolError, match="twice"):
        found(calls, 2, 1, 2)


def test_a_batch_is_forgotten_with_its_last_call() -> None:
    calls, members = InflightCalls(), windows(3)
    batch = ExtendCalls("target", members)
    calls.extend(batch)
    calls.forget_extend(members[1], "target")
    assert found(calls, 3, 2, 1) == [(batch, [0, 2], [2, 0])]
    calls.end(batch, np.array([0, 2]))
    assert found(calls, 1, 2, 3) == []


def test_a_reply_for_an_earlier_batch_passes_over_those_that_ended() -> None:
    calls = InflightCalls()
    batches = [ExtendCalls[Any]("target", windows(2)) for _ in range(3)]
    for batch in batches:
        calls.extend(batch)
    calls.end(batches[1], np.array([0, 1]))
    assert found(calls, 1, 2, 3, 4, 5, 6) == [(batches[0], [0, 1], [0, 1]), (batches[2], [0, 1], [4, 5])]


def test_forgotten_lookups_of_a_row_store_nothing_and_other_rows_go_on() -> None:
    calls, frame, stored = InflightCalls(), frame_of(3), []

    def store(rows: Any, counts: Any, places: Any, values: Any) -> None:
        stored.append((rows.tolist(), counts.tolist(), places.tolist(), values.tolist()))

    rows = np.array([0, 2])
    batch = Lookups("target", frame, rows, np.array([2, 1]), np.array([5, 7, 6]), store)
    frame.ask("target", rows)
    calls.ask(batch)
    calls.forget_rows(frame, 0)
    ((_, numbers, items),) = calls.find(np.array([2, 1], np.uint64))
    batch.take(np.array([9.0, 4.0, 5.0]), np.array([1, 2]), numbers, items)
    calls.end(batch, numbers)
    assert stored == [([2], [1], [6], [9.0])]
    assert frame.lookups[0].tolist() == [1, 0, 0]
    assert not frame.calls


def test_lookups_are_stored_in_whatever_order_they_are_answered() -> None:
    frame, stored = frame_of(3), []
    rows, counts, places = np.array([0, 1, 2]), np.array([2, 1, 3]), np.arange(10, 16)
    batch = Lookups("target", frame, rows, counts, places, lambda *columns: stored.append(columns[2:]))
    for numbers, items in (([0, 2], [1, 0]), ([0, 1, 2], [2, 1, 0])):
        sent = counts[::-1] if len(items) == 3 else np.array([3, 2])
        values = np.concatenate([place * 1.0 for place in np.split(places, [2, 3])[::-1] if len(place) in sent])
        batch.take(values, sent, np.array(numbers), np.array(items))
    assert [(where.tolist(), what.tolist()) for where, what in stored] == [
        ([10, 11, 13, 14, 15], [10.0, 11.0, 13.0, 14.0, 15.0]),
        ([10, 11, 12, 13, 14, 15], [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]),
    ]


def test_lookups_with_another_number_of_logits_are_refused() -> None:
    frame, rows = frame_of(2), np.array([0, 1])
    batch = Lookups("target", frame, rows, np.array([2, 1]), np.array([5, 7, 6]), lambda *stored: None)
    for numbers, counts in (([0, 1], [2, 0]), ([0, 1], [1, 2]), ([1], [2]), ([0], [-1])):
        with pytest.raises(ProtocolError, match="another number of logits"):
            batch.take(np.zeros(max(sum(counts), 0)), np.array(counts), np.array(numbers), np.arange(len(numbers)))


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
