"""Prompts with a common prefix are prefilled once, at a replica with an inspectable engine."""

from __future__ import annotations

from actors.wire.messages import Forked, Refusal, Rows
from tests.support.coordinators import No, rows_of, stage, within

HEAD = list(range(1, 33))  # two blocks
PROMPT = [*range(1, 41)]


async def test_identical_prompts_are_prefilled_once() -> None:
    async with stage(prefill_chunk=1_000) as s:
        c = await s.coordinator()
        with s.engine.held():
            opener = c.ask(9, [1])
            await s.engine.entered()
            replies = [c.ask(session, PROMPT, age=session) for session in range(1, 9)]
            await c.received()
        answers = [await rows_of(reply) for reply in (opener, *replies)][1:]
        assert s.engine.batches[1:] == [{1: 40}, dict.fromkeys(range(2, 9), 8)]
        assert all(answer.logits.tolist() == answers[0].logits.tolist() for answer in answers)
        assert (s.replica.stats().tokens, s.replica.stats().forked_tokens) == (1 + 40 + 7 * 8, 7 * 32)
        kinds = [type(frame) for frame in c.frames if isinstance(frame, Forked | Rows)]
        assert kinds == [Rows, Rows, Forked, Rows]  # of the opener, the first prompt, the others
        (forked,) = (frame for frame in c.frames if isinstance(frame, Forked))
        assert forked.items["tokens"].tolist() == [32] * 7


async def test_a_common_prefix_is_shared_and_different_rests_are_not() -> None:
    async with stage(prefill_chunk=1_000) as s:
        c = await s.coordinator()
        tails = {session: [session] * 10 for session in (1, 2, 3)}
        with s.engine.held():
            opener = c.ask(9, [1])
            await s.engine.entered()
            replies = [c.ask(session, HEAD + tail, age=session) for session, tail in tails.items()]
            await c.received()
        shared = [await rows_of(reply) for reply in (opener, *replies)][1:]
        assert s.engine.batches[1:] == [{1: 42}, {2: 10, 3: 10}]
        c.release(*tails)
        await c.received()
        assert shared[1].logits.tolist() == (await rows_of(c.ask(7, HEAD + tails[2]))).logits.tolist()
        later = await rows_of(c.ask(2, HEAD + tails[2]))  # a released cache is not forked
        assert later.logits.tolist() == shared[1].logits.tolist()


async def test_a_prefix_shorter_than_a_block_is_not_awaited() -> None:
    async with stage(prefill_chunk=1_000) as s:
        c = await s.coordinator()
        with s.engine.held():
            opener = c.ask(9, [1])
            await s.engine.entered()
            replies = [c.ask(session, HEAD[:15] + [50 + session] * 20) for session in (1, 2)]
            await c.received()
        for reply in (opener, *replies):
            await rows_of(reply)
        assert s.engine.batches[1:] == [{1: 35, 2: 35}]


async def test_requested_rows_are_computed_and_not_forked() -> None:
    async with stage(prefill_chunk=1_000) as s:
        c = await s.coordinator()
        await rows_of(c.ask(1, PROMPT))
        answer = await rows_of(c.ask(2, PROMPT, rows=20))
        assert len(answer.logsumexp) == 20
        assert s.engine.batches == [{1: 40}, {2: 24}]


async def test_a_younger_prompt_with_the_same_prefix_waits_and_others_do_not() -> None:
    async with stage(prefill_chunk=16) as s:
        c = await s.coordinator()
        with s.engine.held():
            opener = c.ask(9, [1])
            await s.engine.entered()
            replies = [c.ask(2, PROMPT, age=2), c.ask(1, PROMPT, age=1), c.ask(3, [7] * 20, age=3)]
            await c.received()
        for reply in (opener, *replies):
            await rows_of(reply)
        assert s.engine.batches[1:] == [{1: 16}, {1: 16}, {1: 8, 2: 8}, {3: 16}, {3: 4}]


async def test_the_younger_prompt_runs_alone_when_the_older_is_released() -> None:
    async with stage(prefill_chunk=16) as s:
        c = await s.coordinator()
        with s.engine.held():
            older, younger = c.ask(1, PROMPT, age=1), c.ask(2, PROMPT, age=2)
            await s.engine.entered()
            c.release(1)
            assert await within(older) == No(Refusal.ROW_GONE)
        await rows_of(younger)
        assert s.engine.batches == [{1: 16}, {2: 16}, {2: 8}]  # the first block was forked
        assert s.replica.load().sessions == 1


async def test_the_younger_prompt_runs_alone_when_the_older_fails() -> None:
    async with stage(prefill_chunk=16) as s:
        c = await s.coordinator()
        with s.engine.held():
            older, younger = c.ask(1, PROMPT, age=1), c.ask(2, PROMPT, age=2)
            await s.engine.entered()
            s.engine.failure = RuntimeError("out of memory")
        assert await within(older) == No(Refusal.FAILED)
        await rows_of(younger)
        assert s.engine.batches == [{1: 16}, {2: 16}, {2: 16}, {2: 8}]


async def test_the_younger_prompt_runs_alone_when_the_olders_cache_is_lost() -> None:
    async with stage(prefill_chunk=16) as s:
        c = await s.coordinator()
        with s.engine.held():
            older, younger = c.ask(1, PROMPT, age=1), c.ask(2, PROMPT, age=2)
            await s.engine.entered()
        with s.engine.held():
            await s.engine.entered()
            s.engine.close(1)
        assert await within(older) == No(Refusal.KV_MISS, 0)
        await rows_of(younger)
        assert s.engine.batches == [{1: 16}, {1: 16}, {2: 16}, {2: 16}, {2: 8}]


async def test_without_room_for_a_fork_a_prompt_is_computed_or_refused() -> None:
    async with stage(cache_tokens=60, prefill_chunk=1_000) as s:
        c = await s.coordinator()
        await rows_of(c.ask(1, PROMPT))
        refused = await within(c.ask(2, PROMPT))
        assert isinstance(refused, No)
        assert refused.code is Refusal.FULL
        c.release(1)
        await rows_of(c.ask(2, PROMPT))
        assert s.replica.stats().forked_tokens == 0


async def test_a_session_reopened_under_its_key_holds_nothing() -> None:
    async with stage(prefill_chunk=1_000) as s:
        c = await s.coordinator()
        await rows_of(c.ask(1, PROMPT))
        with s.engine.held():
            other = c.ask(9, [1])
            await s.engine.entered()
            c.release(1)
            again = c.ask(1, PROMPT)
            await c.received()
        await rows_of(other)
        await rows_of(again)
        assert s.engine.batches[-1] in ({1: 40}, {1: 8})
