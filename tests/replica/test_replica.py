"""A model replica over sockets, with an engine that a test can hold, fail and inspect."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from actors.replica.replica import ReplicaUnhealthy
from actors.wire.errors import RemoteFailure
from actors.wire.link import Limits
from actors.wire.messages import EXTEND_ITEM, LOOKUP_ITEM, WHOLE, Extend, Lookup, Message, Refusal, Rows, Welcome
from tests.support.coordinators import WIDTH, Coordinator, No, Reply, rows_of, stage, within
from tests.support.deadlines import HANG_S

PROMPT = list(range(1, 41))  # 40 tokens: three chunks of 16, 16 and 8


async def test_an_extend_is_answered_with_the_rows_of_its_last_tokens() -> None:
    async with stage() as s:
        c = await s.coordinator()
        answer = await rows_of(c.ask(7, [1, 2, 3], rows=2, k=4, required_ids=[5, 60]))
        held = s.engine.rows(7)
        assert held is not None
        expected = held.slices(4)
        assert answer.ids.tolist() == expected.ids.tolist()
        assert answer.logits.tolist() == expected.logits.tolist()
        assert answer.logsumexp == expected.logsumexp.tolist()
        assert answer.required.tolist() == held.whole()[:, [5, 60]].tolist()


async def test_k_may_be_zero_the_whole_row_or_more_than_the_row_has() -> None:
    async with stage() as s:
        c = await s.coordinator()
        with s.engine.held():
            replies = [c.ask(session, [1], k=k) for session, k in ((1, 0), (2, WHOLE), (3, 10_000), (4, 4))]
            replies.append(c.ask(5, [1, 2], rows=0, k=4))
        none, whole, wide, four, no_rows = [await rows_of(reply) for reply in replies]
        assert none.ids.shape == (1, 0)
        assert whole.ids.shape == (1, 0)
        assert whole.logits.shape == wide.logits.shape == (1, WIDTH)
        assert wide.ids.tolist() == [list(range(WIDTH))]
        assert wide.logits.tolist() == whole.logits.tolist()
        assert four.ids[0].tolist() == sorted(np.argsort(-whole.logits[0], kind="stable")[:4])
        assert none.logsumexp == whole.logsumexp == wide.logsumexp == four.logsumexp
        assert no_rows.logsumexp == []


async def test_waiting_extends_of_all_coordinators_share_one_forward() -> None:
    async with stage() as s:
        a, b = await s.coordinator("a"), await s.coordinator("b")
        with s.engine.held():
            first = a.ask(1, [1])
            await s.engine.entered()
            replies = [a.ask(2, [1]), a.ask(3, [1], k=8), b.ask(4, [1]), b.ask(5, [1])]
            await a.received()
            await b.received()
        for reply in (first, *replies):
            await rows_of(reply)
        assert s.engine.batches == [{1: 1}, {2: 1, 3: 1, 4: 1, 5: 1}]
        assert [len(frame.items) for frame in b.frames if isinstance(frame, Rows)] == [2]
        assert [len(frame.items) for frame in a.frames if isinstance(frame, Rows)] == [1, 2]


async def test_each_coordinator_gets_its_own_rows_and_values_of_a_shared_forward() -> None:
    async with stage() as s:
        a, b = await s.coordinator("a"), await s.coordinator("b")
        with s.engine.held():
            opener = a.ask(9, [1])
            await s.engine.entered()
            replies = {
                1: a.ask(1, [1], required_ids=[5]),
                2: b.ask(2, [2, 3], rows=2, required_ids=[7, 9]),
                3: a.ask(3, [4, 5, 6], rows=3),
                4: a.ask(4, [7], rows=0),
                5: b.ask(5, [8], k=6),
            }
            lookups = {1: a.look_up(1, [1], [3, 4]), 2: b.look_up(2, [2, 3], [5]), 3: a.look_up(3, [4, 5, 6], [])}
            await a.received()
            await b.received()
        await rows_of(opener)
        required = {1: [5], 2: [7, 9]}
        for session, reply in replies.items():
            answer, held = await rows_of(reply), s.engine.rows(session)
            assert held is not None
            expected = held.slices(6 if session == 5 else 4)
            assert answer.logsumexp == expected.logsumexp.tolist()
            if held.size:
                assert answer.ids.tolist() == expected.ids.tolist()
                assert answer.logits.tolist() == expected.logits.tolist()
                assert answer.required.tolist() == held.whole()[:, required.get(session, [])].tolist()
        for session, ids in ((1, [3, 4]), (2, [5]), (3, [])):
            held = s.engine.rows(session)
            assert held is not None
            assert await within(lookups[session]) == held.whole()[-1, ids].tolist()
        assert len(s.engine.batches) == 2


async def test_extends_of_one_session_run_in_order_one_per_forward() -> None:
    async with stage() as s:
        c = await s.coordinator()
        with s.engine.held():
            replies = [c.ask(1, [1]), c.ask(1, [2], before=[1]), c.ask(1, [3], before=[1, 2])]
            await c.received()
        for reply in replies:
            await rows_of(reply)
        assert s.engine.batches == [{1: 1}] * 3


async def test_a_long_prompt_is_computed_in_chunks_while_others_decode() -> None:
    async with stage() as s:
        c = await s.coordinator()
        with s.engine.held():
            opener = c.ask(9, [1])
            await s.engine.entered()
            prompt = c.ask(1, PROMPT, rows=2)
            steps = [c.ask(2, [1]), c.ask(2, [2], before=[1]), c.ask(2, [3], before=[1, 2])]
            await c.received()
        for reply in (opener, *steps):
            await rows_of(reply)
        answer = await rows_of(prompt)
        assert s.engine.batches == [{9: 1}, {1: 16, 2: 1}, {1: 16, 2: 1}, {1: 8, 2: 1}]
        assert len(answer.logsumexp) == 2
        whole = await rows_of(c.ask(3, PROMPT[:8], rows=1))
        assert whole.ids.shape == (1, 4)
        again = await rows_of(c.ask(1, PROMPT[-1:], before=PROMPT[:-1]))
        assert again.logits[0].tolist() == answer.logits[1].tolist()


async def test_the_oldest_prompt_gets_the_prefill_budget_the_next_the_rest() -> None:
    async with stage() as s:
        c = await s.coordinator()
        with s.engine.held():
            opener = c.ask(9, [1])
            await s.engine.entered()
            young, old = c.ask(1, PROMPT[:20], age=5), c.ask(2, PROMPT[20:], age=3)
            await c.received()
        for reply in (opener, young, old):
            await rows_of(reply)
        assert s.engine.batches[1:] == [{2: 16}, {2: 4, 1: 12}, {1: 8}]


async def test_rows_that_belong_together_are_computed_in_one_forward() -> None:
    async with stage() as s:
        c = await s.coordinator()
        answer = await rows_of(c.ask(1, PROMPT, rows=30, k=1))
        assert len(answer.logsumexp) == 30
        assert s.engine.batches == [{1: 10}, {1: 30}]


async def test_a_lookup_of_a_held_row_is_answered_during_a_forward() -> None:
    async with stage() as s:
        c = await s.coordinator()
        await rows_of(c.ask(1, [1, 2], rows=2))
        with s.engine.held():
            other = c.ask(2, [1])
            await s.engine.entered()
            held = s.engine.rows(1)
            assert held is not None
            assert await within(c.look_up(1, [1], [3, 4])) == held.whole()[0, [3, 4]].tolist()
            assert await within(c.look_up(1, [1, 2], [9])) == held.whole()[1, [9]].tolist()
            widened = await rows_of(c.widen(1, [1, 2], 32))
            assert widened.ids.tolist() == held.slices(32, [1]).ids.tolist()
            whole = await rows_of(c.widen(1, [1, 2], WHOLE))
            assert whole.logits.tolist() == held.whole([1]).tolist()
            assert not other.done()
        await rows_of(other)


async def test_rows_have_the_logsumexp_at_the_temperature_of_their_item() -> None:
    async with stage() as s:
        c = await s.coordinator()
        extended = await rows_of(c.ask(1, [1, 2], rows=2, temperature=0.5))
        held = s.engine.rows(1)
        assert held is not None
        exact = np.logaddexp.reduce(held.whole().astype(np.float64) / 0.5, axis=1)
        np.testing.assert_allclose(extended.tempered, exact, rtol=1e-6)
        plain = await rows_of(c.ask(3, [1]))
        assert plain.tempered == plain.logsumexp
        for temperature in (0.0, -1.0, float("nan")):
            assert await c.ask(2, [1], temperature=temperature) == No(Refusal.BAD_ITEM)


async def test_a_lookup_waits_for_its_row_and_is_answered_after_the_rows() -> None:
    async with stage() as s:
        c = await s.coordinator()
        with s.engine.held():
            opener = c.ask(9, [1])
            await s.engine.entered()
            queued = c.ask(1, [1, 2])
            lookup = c.look_up(1, [1, 2], [7])
            await c.received()
            assert not lookup.done()
        value = await within(lookup)
        assert queued.done()
        held = s.engine.rows(1)
        assert held is not None
        assert value == held.whole()[0, [7]].tolist()
        await rows_of(opener)
        assert s.replica.stats().lookups_waited == 1


async def test_a_lookup_of_a_row_that_is_not_computed_is_refused_at_once() -> None:
    async with stage() as s:
        c = await s.coordinator()
        await rows_of(c.ask(1, [1, 2]))
        with s.engine.held():
            step = c.ask(1, [3], before=[1, 2])
            await s.engine.entered()
            disconnected = No(Refusal.ROW_GONE)
            assert await within(c.look_up(1, [1], [5])) == disconnected
            assert await within(c.look_up(8, [1], [5])) == disconnected
            assert await within(c.look_up(1, [1, 2, 3, 4], [5])) == disconnected
            other_token = c.look_up(1, [1, 2, 4], [5])  # its position is being computed, with another token
            await c.received()
        assert await within(other_token) == disconnected
        await rows_of(step)
        assert await within(c.look_up(1, [1, 2, 3], [WIDTH])) == No(Refusal.BAD_ITEM)
        assert await within(c.widen(1, [1, 2, 3], -2)) == No(Refusal.BAD_ITEM)


async def test_a_rejected_drafts_row_is_not_mistaken_for_its_successor() -> None:
    async with stage() as s:
        c = await s.coordinator()
        await rows_of(c.ask(1, [1, 2, 3], rows=3))
        await rows_of(c.ask(1, [9], before=[1, 2]))
        assert await within(c.look_up(1, [1, 2, 3], [5])) == No(Refusal.ROW_GONE)
        assert isinstance(await within(c.look_up(1, [1, 2, 9], [5])), list)


async def test_a_lookup_of_invalid_ids_is_refused_alone_in_its_frame() -> None:
    async with stage() as s:
        c = await s.coordinator()
        with s.engine.held():
            row = c.ask(1, [1])
            good, bad = c.look_up(1, [1], [5]), c.look_up(1, [1], [WIDTH])
            assert await within(bad) == No(Refusal.BAD_ITEM)
            assert not good.done()
        assert isinstance(await within(good), list)
        await rows_of(row)
        (one, refused), (other, value) = c._expect(), c._expect()
        items = np.array([(call_id, 1, c.hash_of([1]), 1, 0, 1) for call_id in (one, other)], LOOKUP_ITEM)
        c.connection.send(Lookup(items, np.array([WIDTH, 5])))
        assert await within(refused) == No(Refusal.BAD_ITEM)
        assert await within(value) == await within(good)


async def test_a_lookup_that_waits_too_long_is_refused() -> None:
    async with stage(row_wait_s=0.02) as s:
        c = await s.coordinator()
        with s.engine.held():
            slow = c.ask(1, [1])
            lookup = c.look_up(1, [1], [5])
            assert await within(lookup) == No(Refusal.ROW_GONE)
            assert not slow.done()
        await rows_of(slow)


async def test_a_cache_with_fewer_or_other_tokens_is_a_miss() -> None:
    async with stage() as s:
        c = await s.coordinator()
        await rows_of(c.ask(1, [1, 2]))
        assert await within(c.ask(1, [5], before=[1, 2, 3, 4])) == No(Refusal.KV_MISS, 2)
        assert await within(c.ask(1, [5], before=[1, 7])) == No(Refusal.KV_MISS, 0)
        assert len((await rows_of(c.ask(1, [7, 5], before=[1]))).logsumexp) == 1


async def test_a_full_cache_refuses_with_a_time_to_retry() -> None:
    async with stage(cache_tokens=10) as s:
        c = await s.coordinator()
        await rows_of(c.ask(1, list(range(8))))
        refused = await within(c.ask(2, [1, 2, 3]))
        assert isinstance(refused, No)
        assert refused.code is Refusal.FULL
        assert refused.detail > 0
        c.release(1)
        await rows_of(c.ask(2, [1, 2, 3]))


@pytest.mark.parametrize(
    "ask",
    [
        lambda c: c.ask(1, [WIDTH]),
        lambda c: c.ask(1, [-1]),
        lambda c: c.ask(1, []),
        lambda c: c.ask(1, [1], rows=2),
        lambda c: c.ask(1, [1], k=-2),
        lambda c: c.ask(1, [1], required_ids=[WIDTH]),
        lambda c: c.ask(1, [1], required_ids=[-1]),
        lambda c: c.ask(1, [1] * 501),
    ],
    ids=["token too large", "token negative", "no tokens", "rows", "k", "know too large", "know negative", "too long"],
)
async def test_a_bad_item_is_refused_alone(
    ask: Callable[[Coordinator], asyncio.Future[Reply]],
) -> None:
    async with stage() as s:
        c = await s.coordinator()
        bad, good = ask(c), c.ask(2, [1])
        assert await within(bad) == No(Refusal.BAD_ITEM)
        await rows_of(good)
        await rows_of(c.ask(1, [1]))


async def test_rows_over_the_frame_limit_are_refused_and_others_are_split() -> None:
    async with stage(limits=Limits(frame=8 << 10)) as s:
        c = await s.coordinator()
        assert await within(c.ask(1, PROMPT, rows=40, k=WHOLE)) == No(Refusal.BAD_ITEM)
        with s.engine.held():
            opener = c.ask(9, [1])
            await s.engine.entered()
            replies = [c.ask(session, [1], k=WHOLE) for session in range(1, 41)]
            await c.received()
        await rows_of(opener)
        for reply in replies:
            assert (await rows_of(reply)).logits.shape == (1, WIDTH)
        assert len(s.engine.batches) == 2


@pytest.mark.parametrize(
    "frame",
    [
        Extend(np.array([(1, 1, 0, 0, 1, 0, 2, 1, 4, 0, 0, 1)], EXTEND_ITEM), np.array([1])),
        Extend(np.array([(1, 1, 0, 0, 1, 0, -1, 1, 4, 0, 0, 1)], EXTEND_ITEM)),
        Extend(np.array([(1, 1, 0, 0, 1, 0, 1, -1, 4, 0, 0, 1)], EXTEND_ITEM), np.array([1])),
        Extend(np.array([(1, 1, 0, 0, 1, 0, 1, 1, 4, 1, 0, 1)], EXTEND_ITEM), np.array([1])),
        Extend(np.array([(1, 1, 0, 0, 1, 0, 1, 1, 4, 0, -1, 1)], EXTEND_ITEM), np.array([1])),
        Lookup(np.array([(1, 1, 0, 1, 0, 3)], LOOKUP_ITEM), np.array([1, 2])),
        Lookup(np.array([(1, 1, 0, 1, 0, 2**31 - 1), (1, 1, 0, 1, 0, 2**31 - 1), (1, 1, 0, 1, 0, 2)], LOOKUP_ITEM)),
        Welcome("guider", "", 1, 1, 1, 1, False, ""),
    ],
    ids=[
        "fewer tokens",
        "negative tokens",
        "negative rows",
        "fewer know",
        "negative keep",
        "fewer ids",
        "overflow",
        "not for a model",
    ],
)
async def test_a_frame_with_wrong_counts_closes_only_its_connection(frame: Message) -> None:
    async with stage() as s:
        good, bad = await s.coordinator("good"), await s.coordinator("bad")
        bad.connection.send(frame)
        reason = await asyncio.wait_for(bad.ended, HANG_S)
        assert isinstance(reason, RemoteFailure)
        assert reason.code == "protocol"
        await rows_of(good.ask(1, [1]))


async def test_a_lower_epoch_is_superseded_and_a_higher_one_takes_over() -> None:
    async with stage() as s:
        old, new = await s.coordinator("old"), await s.coordinator("new")
        await rows_of(old.ask(1, [1, 2]))
        with s.engine.held():
            opener = new.ask(9, [1])
            await s.engine.entered()
            queued, waiting = old.ask(1, [3], before=[1, 2]), old.look_up(1, [1, 2, 3], [5])
            await old.received()
            taken = new.ask(1, [4], before=[1, 2], epoch=2)
            assert await within(queued) == No(Refusal.SUPERSEDED, 2)
            assert await within(waiting) == No(Refusal.SUPERSEDED, 2)
        await rows_of(opener)
        await rows_of(taken)
        assert await within(old.ask(1, [3], before=[1, 2])) == No(Refusal.SUPERSEDED, 2)
        assert await within(old.look_up(1, [1, 2, 4], [5])) == No(Refusal.SUPERSEDED, 2)
        old.release(1)
        await old.connection.close()
        await rows_of(new.ask(1, [5], before=[1, 2, 4], epoch=2))


async def test_a_running_extend_of_a_session_taken_over_gives_no_rows() -> None:
    async with stage() as s:
        old, new = await s.coordinator("old"), await s.coordinator("new")
        with s.engine.held():
            running = old.ask(1, [1, 2])
            await s.engine.entered()
            taken = new.ask(1, [1, 2, 3], epoch=2)
            assert await within(running) == No(Refusal.SUPERSEDED, 2)
        assert len((await rows_of(taken)).logsumexp) == 1
        assert not any(isinstance(frame, Rows) for frame in old.frames)


async def test_an_owner_that_reconnects_continues_its_sessions() -> None:
    async with stage() as s:
        first, second = await s.coordinator(), await s.coordinator()
        await rows_of(first.ask(1, [1, 2]))
        await rows_of(second.ask(1, [3], before=[1, 2], call_id=50))
        await first.connection.close()
        await rows_of(second.ask(1, [4], before=[1, 2, 3], call_id=51))


async def test_a_late_duplicate_is_dropped_silently() -> None:
    async with stage() as s:
        c = await s.coordinator()
        await rows_of(c.ask(1, [1], call_id=10))
        await rows_of(c.ask(1, [2], before=[1], call_id=11))
        late = c.ask(1, [1], call_id=10)
        await c.received()
        assert not late.done()
        await rows_of(c.ask(1, [3], before=[1, 2], call_id=12))
        assert len(s.engine.batches) == 3


async def test_a_lost_connection_frees_only_its_sessions() -> None:
    async with stage() as s:
        lost, stays = await s.coordinator("lost"), await s.coordinator("stays")
        await rows_of(stays.ask(5, [1]))
        await rows_of(lost.ask(1, [1]))
        with s.engine.held():
            lost.ask(2, [1])
            await s.engine.entered()
            lost.ask(3, [1])  # queued: never computed
            await lost.received()
            await lost.connection.close()
            while s.replica.load().sessions > 1:
                await stays.received()
        await rows_of(stays.ask(5, [2], before=[1]))
        assert sorted(s.engine.closed) == [1, 2, 3]
        assert (s.replica.load().sessions, s.replica.load().cache_used) == (1, 2)
        assert all(3 not in batch for batch in s.engine.batches)


async def test_released_sessions_are_closed_without_another_extend() -> None:
    async with stage() as s:
        c = await s.coordinator()
        await rows_of(c.ask(1, [1]))
        with s.engine.held():
            running = c.ask(2, [1])
            await s.engine.entered()
            lookup = c.look_up(2, [1], [5])
            c.release(2)
            assert await within(lookup) == No(Refusal.ROW_GONE)
        assert await within(running) == No(Refusal.ROW_GONE)
        c.release(1)
        await rows_of(c.ask(3, [1]))
        assert sorted(s.engine.closed) == [1, 2]
        assert s.replica.load().cache_used == 1


async def test_a_replica_that_stops_leaves_no_cache() -> None:
    async with stage() as s:
        c = await s.coordinator()
        for session in (1, 2):
            await rows_of(c.ask(session, [1]))
        assert s.engine.cache_stats().tokens_used == 2
    assert sorted(s.engine.closed) == [1, 2]
    assert s.engine.cache_stats().tokens_used == 0


async def test_a_failed_forward_fails_only_its_items() -> None:
    async with stage() as s:
        c = await s.coordinator()
        await rows_of(c.ask(1, [1]))
        await rows_of(c.ask(2, [1]))
        with s.engine.held():
            failing = c.ask(1, [2], before=[1])
            await s.engine.entered()
            lookup, next_one = c.look_up(1, [1, 2], [5]), c.ask(2, [2], before=[1])
            await c.received()
            s.engine.failure = RuntimeError("out of memory")
        assert await within(failing) == No(Refusal.FAILED)
        assert await within(lookup) == No(Refusal.FAILED)
        await rows_of(next_one)
        assert await within(c.ask(1, [3], before=[1, 2])) == No(Refusal.KV_MISS, 0)
        await rows_of(c.ask(1, [1, 2, 3]))
        assert s.replica.stats().failures == 1
        s.replica.check_health()


async def test_a_prompt_that_fails_in_its_second_chunk_is_refused_as_a_whole() -> None:
    async with stage() as s:
        c = await s.coordinator()
        with s.engine.held():
            prompt = c.ask(1, PROMPT)
            await s.engine.entered()
        with s.engine.held():
            await s.engine.entered()
            s.engine.failure = RuntimeError("out of memory")
        assert await within(prompt) == No(Refusal.FAILED)
        await rows_of(c.ask(1, PROMPT))


async def test_a_forward_that_hangs_makes_the_replica_unhealthy() -> None:
    async with stage(forward_timeout_s=0.0) as s:
        c = await s.coordinator()
        with s.engine.held():
            reply = c.ask(1, [1])
            await s.engine.entered()
            with pytest.raises(ReplicaUnhealthy, match="running for more"):
                s.replica.check_health()
        await rows_of(reply)


async def test_a_loop_that_ends_closes_connections_and_is_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stage() as s:
        c = await s.coordinator()
        monkeypatch.setattr("actors.replica.replica.choose", lambda waiting, budget, shared: 1 / 0)
        c.ask(1, [1])
        assert await asyncio.wait_for(c.ended, HANG_S) is not None
        with pytest.raises(ReplicaUnhealthy, match="ZeroDivisionError"):
            s.replica.check_health()


async def test_load_and_stats_count_what_happened() -> None:
    async with stage() as s:
        c = await s.coordinator()
        await rows_of(c.ask(1, PROMPT))
        await within(c.look_up(1, PROMPT, [1]))
        load, stats = s.replica.load(), s.replica.stats()
        assert (load.sessions, load.waiting, load.cache_used, load.cache_free) == (1, 0, 40, 960)
        assert (stats.forwards, stats.items, stats.tokens, stats.lookups) == (3, 3, 40, 1)
        assert stats.bytes_received == c.connection.bytes_sent
        assert stats.bytes_sent == c.connection.bytes_received
        await c.connection.close()
