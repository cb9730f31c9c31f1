"""The comparison of answers from an engine whose rounding depends on the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping

from actors.api.generation import Role
from actors.replica.engine_thread import Engine
from tests.support.local_service import decode, local_service, trio_config
from tests.support.near_ties import recorded, same
from tests.support.trio import SAMPLED, TEXT, request


async def test_answers_may_part_at_a_recorded_near_tie_alone(
    trio_engines: Mapping[Role, Engine],
) -> None:
    async with local_service(trio_config(), trio_engines) as service:
        one = request(service.tokenizers, TEXT, sampling=SAMPLED)
        with recorded() as ties:
            first, *rest = (await decode(service.coordinators[0], one)).tokens
            assert ties.decisions > len(rest) > 5
            assert not ties.pairs
        with recorded(limit=math.inf) as ties:
            assert (await decode(service.coordinators[0], one)).tokens == [first, *rest]
            second = next(token for pair in ties.pairs if first in pair for token in pair - {first})
            assert same([first, *rest], [second, *rest])
            assert not same([first, *rest], [-1, *rest])
            assert not same([first, *rest], [first, *rest[:-1]])
            assert ties.parted == 1
    assert not same([first, *rest], [second, *rest])
