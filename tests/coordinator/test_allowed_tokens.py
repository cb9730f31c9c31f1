"""Allowed ids and bad words, from request to answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

from actors.api.generation import Role
from actors.api.guidance import Guidance
from actors.replica.engine_thread import Engine
from tests.support.local_service import decode, local_service, trio_config
from tests.support.trio import GREEDY, LONG, TEXT, request, tokens


async def test_allowed_and_banned_ids_change_only_the_tokens_they_must(
    trio_engines: Mapping[Role, Engine],
) -> None:
    async with local_service(trio_config(), trio_engines) as service:
        (coordinator,) = service.coordinators
        for guidance in (Guidance(1.0), Guidance(0.0)):
            plain = request(service.tokenizers, TEXT, guidance=guidance)
            (answered,) = tokens([await decode(coordinator, plain)])

            same = replace(GREEDY, allowed_token_ids=tuple(set(answered)), bad_words=((answered[1], answered[0]),))
            assert tokens([await decode(coordinator, replace(plain, sampling=same))]) == [answered]

            few = replace(LONG, allowed_token_ids=tuple(answered[:2]), max_tokens=20)
            (answer,) = tokens([await decode(coordinator, replace(plain, sampling=few))])
            assert len(answer) == 20
            assert set(answer) <= set(answered[:2])

            banned = replace(GREEDY, bad_words=((answered[1], answered[2]),))
            (answer,) = tokens([await decode(coordinator, replace(plain, sampling=banned))])
            assert answer[:2] == answered[:2]
            assert (answered[1], answered[2]) not in pairwise(answer)
