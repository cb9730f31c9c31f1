"""The order in which extends and released sessions of one turn are sent to a replica."""

from __future__ import annotations

import numpy as np

from actors.coordinator.replica_pool import Outbox
from actors.wire.columns import NO_IDS, ExtendColumns
from actors.wire.messages import EXTEND_ITEM, Extend


def extend(session: int) -> ExtendColumns:
    items = np.zeros(1, EXTEND_ITEM)
    items["session"], items["tokens"] = session, 1
    return ExtendColumns(items, [5], NO_IDS, {})


def test_a_session_that_ends_after_it_was_extended_is_released_after_that() -> None:
    outbox = Outbox()
    outbox.extends = [extend(1), extend(2)]
    outbox.released = [3, 2]
    first, second = outbox.take(width=100)
    assert isinstance(first, Extend)
    assert isinstance(second, Extend)
    assert (first.items["session"].tolist(), first.released.tolist()) == ([1, 2], [3])
    assert (second.items["session"].tolist(), second.released.tolist()) == ([], [2])
    assert outbox.take(width=100) == []


def test_sessions_that_were_not_extended_are_released_with_the_extends_of_others() -> None:
    outbox = Outbox()
    outbox.extends, outbox.released = [extend(1)], [3]
    (only,) = outbox.take(width=100)
    assert isinstance(only, Extend)
    assert (only.items["session"].tolist(), only.released.tolist()) == ([1], [3])
