"""Extends that continue with drafts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from actors.api.sampling_params import Sampling
from actors.decoding.decision import choose
from actors.wire.messages import DRAFT_ITEM, EXTEND_ITEM, Drafted, Extend, Message, Refusal, Rows
from tests.support.coordinators import WIDTH, Coordinator, No, Reply, rows_of, stage, within
from tests.support.deadlines import HANG_S

SEED = 2**63 + 5


async def drafts_of(c: Coordinator, reply: asyncio.Future[Reply]) -> list[int]:
    """The drafted tokens of a reply, which has the rows of all drafts."""
    answer = await rows_of(reply)
    drafted = c.drafted[max(c.drafted)]
    assert len(answer.logsumexp) == 1 + len(drafted)
    kinds = [type(frame) for frame in c.frames if isinstance(frame, Drafted | Rows)]
    assert kinds.index(Drafted) <= len(kinds) - 1 - kinds[::-1].index(Rows)
    return drafted


async def by_hand(
    c: Coordinator, session: int, before: Sequence[int], count: int, sampling: Sampling, position: int
) -> list[int]:
    """The tokens that a coordinator samples if it requests one row at a time."""
    text: list[int] = []
    for index in range(count):
        new = list(before) if not text else text[-1:]
        answer = await rows_of(c.ask(session, new, before=[*before, *text[:-1]] if text else (), k=WIDTH))
        chosen = choose(
            answer.ids,
            answer.logits.astype(np.float64),
            [sampling],
            np.array([SEED], np.uint64),
            np.array([position + index]),
        )
        text += chosen.tolist()
    return text


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.5, 0.75)])
@pytest.mark.parametrize("k", [0, WIDTH])
async def test_drafts_equal_tokens_sampled_one_at_a_time(temperature: float, top_p: float, k: int) -> None:
    async with stage() as s:
        c = await s.coordinator()
        expected = await by_hand(c, 1, [1, 2, 3], 8, Sampling(temperature=temperature, top_p=top_p), 40)
        reply = c.ask(2, [1, 2, 3], k=k, draft=(8, SEED, 40, temperature, top_p))
        assert await drafts_of(c, reply) == expected
        assert s.engine.batches[-9:] == [{2: 3}, *[{2: 1}] * 8]


async def test_all_rows_of_drafts_are_held_until_the_next_extend() -> None:
    async with stage() as s:
        c = await s.coordinator()
        drafted = await drafts_of(c, c.ask(1, [1, 2], k=0, required_ids=[7], draft=(3, SEED, 0, 1.0, 1.0)))
        text = [1, 2, *drafted]
        held = s.engine.rows(1)
        assert held is not None
        for row in range(4):
            assert await within(c.look_up(1, text[: 2 + row], [5, 9])) == held.whole()[row, [5, 9]].tolist()
            assert (await rows_of(c.widen(1, text[: 2 + row], 8))).ids.shape == (1, 8)
        await rows_of(c.ask(1, [9], before=text[:3]))
        assert await within(c.look_up(1, text[:3], [5])) == No(Refusal.ROW_GONE)


async def test_drafts_are_sent_before_their_last_row_and_its_lookup_waits() -> None:
    async with stage() as s:
        c = await s.coordinator()
        with s.engine.held():
            reply = c.ask(1, [1], k=0, draft=(1, SEED, 0, 0.0, 1.0))
            await s.engine.entered()
        with s.engine.held():
            await s.engine.entered()
            await c.received()
            (drafted,) = c.drafted.values()
            lookup = c.look_up(1, [1, *drafted], [5])
            await c.received()
            assert not lookup.done()
            assert not reply.done()
        assert isinstance(await within(lookup), list)
        assert len((await rows_of(reply)).logsumexp) == 2


async def test_other_sessions_decode_and_draft_between_drafted_tokens() -> None:
    async with stage() as s:
        c = await s.coordinator()
        with s.engine.held():
            first = c.ask(1, [1], k=0, draft=(3, SEED, 0, 0.0, 1.0))
            await s.engine.entered()
            others = [c.ask(2, [1], k=0, draft=(2, SEED, 0, 0.0, 1.0)), c.ask(3, list(range(20)))]
            await c.received()
        for reply in (first, *others):
            await rows_of(reply)
        assert s.engine.batches == [{1: 1}, {1: 1, 2: 1, 3: 16}, {1: 1, 2: 1, 3: 4}, {1: 1, 2: 1}]


async def test_a_newer_extend_ends_the_drafting() -> None:
    async with stage() as s:
        c = await s.coordinator()
        with s.engine.held():
            reply = c.ask(1, [1], k=0, draft=(8, SEED, 0, 0.0, 1.0))
            await s.engine.entered()
            newer = c.ask(1, [2], before=[1])
            await c.received()
        assert await drafts_of(c, reply) == []
        await rows_of(newer)


async def test_drafts_end_at_the_last_position_and_where_the_cache_is_full() -> None:
    async with stage(max_position=5) as s:
        c = await s.coordinator()
        assert len(await drafts_of(c, c.ask(1, [1, 2, 3], k=0, draft=(8, SEED, 0, 0.0, 1.0)))) == 2
    async with stage(cache_tokens=10) as s:
        c = await s.coordinator()
        await rows_of(c.ask(2, [1] * 4))
        assert len(await drafts_of(c, c.ask(1, [1, 2, 3], k=0, draft=(8, SEED, 0, 0.0, 1.0)))) == 3


async def test_a_draft_whose_forward_fails_is_refused_like_any_extend() -> None:
    async with stage() as s:
        c = await s.coordinator()
        with s.engine.held():
            reply = c.ask(1, [1], k=0, draft=(4, SEED, 0, 0.0, 1.0))
            await s.engine.entered()
        with s.engine.held():
            await s.engine.entered()
            s.engine.failure = RuntimeError("out of memory")
        assert await within(reply) == No(Refusal.FAILED)
        assert await within(c.ask(1, [3], before=[1])) == No(Refusal.KV_MISS, 0)


async def test_releasing_a_session_ends_its_drafting() -> None:
    async with stage() as s:
        c = await s.coordinator()
        with s.engine.held():
            reply = c.ask(1, [1], k=0, draft=(4, SEED, 0, 0.0, 1.0))
            await s.engine.entered()
            c.release(1)
            await c.received()
        assert await within(reply) == No(Refusal.ROW_GONE)
        await rows_of(c.ask(2, [1]))
        assert s.replica.load().cache_used == 1


@pytest.mark.parametrize(
    "ask",
    [
        lambda c: c.ask(1, [1, 2], rows=2, draft=(1, SEED, 0, 0.0, 1.0)),
        lambda c: c.ask(1, [1], draft=(0, SEED, 0, 0.0, 1.0)),
        lambda c: c.ask(1, [1], draft=(9, SEED, 0, 0.0, 1.0)),
        lambda c: c.ask(1, [1], draft=(1, SEED, -1, 0.0, 1.0)),
        lambda c: c.ask(1, [1], draft=(1, SEED, 0, float("nan"), 1.0)),
        lambda c: c.ask(1, [1], draft=(1, SEED, 0, -1.0, 1.0)),
        lambda c: c.ask(1, [1], draft=(1, SEED, 0, 0.0, 0.0)),
        lambda c: c.ask(1, [1], draft=(1, SEED, 0, 0.0, 1.5)),
    ],
)
async def test_an_impossible_draft_is_a_bad_item(ask: Callable[[Coordinator], asyncio.Future[Reply]]) -> None:
    async with stage() as s:
        c = await s.coordinator()
        assert await within(ask(c)) == No(Refusal.BAD_ITEM)
        await rows_of(c.ask(1, [1]))


@pytest.mark.parametrize("places", [[1], [0, 0]])
async def test_a_draft_without_item_or_a_second_of_one_closes_the_connection(places: list[int]) -> None:
    async with stage() as s:
        c = await s.coordinator()
        drafting = np.array([(place, 1, SEED, 0, 0.0, 1.0) for place in places], DRAFT_ITEM)
        item = np.array([(1, 1, 0, c.hash_of([]), 1, 0, 1, 1, 0, 0, 0, 1)], EXTEND_ITEM)
        frame: Message = Extend(item, np.array([1]), drafting=drafting)
        c.connection.send(frame)
        assert await asyncio.wait_for(c.ended, HANG_S) is not None
