"""The recorder, and the metrics of replicas and coordinators while they decode."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from actors.api.generation import ROLES, Role
from actors.api.guidance import Guidance
from actors.coordinator.stats import CoordinatorMeter
from actors.metrics import METRICS, Histogram, Recorder, Series
from actors.replica.engine_thread import Engine
from actors.replica.stats import ReplicaMeter
from tests.support.coordinators import stage, within
from tests.support.local_service import LocalService, decode, local_service, trio_config
from tests.support.trio import LONG, TEXT, decode_all, finished, mixed_requests, request
from tests.support.watched import Trio, until, watched

Found = dict[tuple[str, ...], float]


def found(*recorders: Recorder) -> Found:
    """Every value, by the metric's name and the values of its labels. A histogram's value is its count."""

    def value(series: Series) -> float:
        return sum(series.counts) if isinstance(series, Histogram) else series.value

    return {(m.name, *labels): value(series) for recorder in recorders for m, labels, series in recorder}


def measured(service: LocalService) -> Found:
    return found(*(c.measured() for c in service.coordinators), *(r.measured() for r in service.replicas.values()))


def test_a_value_on_a_bound_belongs_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value, times in ((0.5, 1), (1.0, 2), (1.1, 1), (7.0, 3)):
        histogram.observe(value, times)
    assert (histogram.counts, histogram.sum) == ([3, 1, 3], 0.5 + 2.0 + 1.1 + 21.0)


def test_a_series_is_one_for_each_value_of_its_labels() -> None:
    recorder = Recorder()
    recorder.counter("thinklogit_refusals", "guider", "full").add()
    recorder.counter("thinklogit_refusals", "guider", "full").add(2)
    recorder.counter("thinklogit_refusals", "target", "full").add()
    assert found(recorder) == {
        ("thinklogit_refusals", "guider", "full"): 3,
        ("thinklogit_refusals", "target", "full"): 1,
    }


@pytest.mark.parametrize(("kind", "labels"), [("counter", ("guider",)), ("gauge", ("guider", "full"))])
def test_a_metric_that_is_not_in_the_table_is_not_recorded(kind: str, labels: tuple[str, ...]) -> None:
    with pytest.raises(AssertionError, match="thinklogit_refusals"):
        getattr(Recorder(), kind)("thinklogit_refusals", *labels)
    with pytest.raises(KeyError):
        getattr(Recorder(), kind)("thinklogit_unheard_of")


def test_the_table_follows_the_conventions_of_prometheus() -> None:
    for name, metric in METRICS.items():
        assert name.startswith("thinklogit_")
        assert not name.endswith(("_total", "_bucket", "_sum", "_count")), "an exporter adds these"
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert len(set(metric.labels)) == len(metric.labels)


async def test_decoding_is_measured_where_it_happens(trio_engines: Mapping[Role, Engine]) -> None:
    with watched(trio_engines) as trio:
        async with local_service(trio_config(), trio.engines) as service:
            answers = await decode_all(service.coordinators[0], mixed_requests(service, 4))
            seen, usages = measured(service), [finished(answer).usage for answer in answers]
            assert seen["thinklogit_drafted_tokens",] == sum(usage.drafted_tokens for usage in usages) > 0
            assert seen["thinklogit_accepted_tokens",] == sum(usage.accepted_tokens for usage in usages) > 0
            assert seen["thinklogit_widened_rows",] == sum(usage.widened_rows for usage in usages)
            assert seen["thinklogit_decided_tokens",] == sum(usage.completion_tokens for usage in usages)
            assert seen["thinklogit_guided_rows",] == sum(usage.guided_tokens for usage in usages) > 0
            mass = sum(usage.uncovered_mass * usage.guided_tokens for usage in usages)
            assert seen["thinklogit_uncovered_mass",] == pytest.approx(mass)
            for role in ROLES:
                phases = ("prefill", "extend", "draft")
                forwards = sum(seen.get(("thinklogit_steps", role, phase), 0) for phase in phases)
                assert forwards == service.replicas[role].stats().forwards == trio.watched[role].forwards
                assert seen["thinklogit_forward_tokens", role] == service.replicas[role].stats().tokens
            assert seen["thinklogit_steps", "guider", "draft"] > 0
            assert ("thinklogit_steps", "target", "draft") not in seen
            assert seen["thinklogit_steps", "guider_base", "lookup"] > 0
            assert 0 < seen["thinklogit_step_seconds", "coordinator", "turn"] == service.coordinators[0].load().turns_s


async def test_prompts_count_as_prefills_and_several_sessions_as_one_batch() -> None:
    async with stage() as s:
        c = await s.coordinator()
        with s.engine.held():
            first = c.ask(1, list(range(2, 14)))
            await s.engine.entered()
            others = [c.ask(session, [5]) for session in (2, 3, 4)]
        for reply in (first, *others):
            await within(reply)
        seen = found(s.replica.measured())
        assert (seen["thinklogit_steps", "guider", "prefill"], seen["thinklogit_steps", "guider", "extend"]) == (1, 1)
        assert seen["thinklogit_batched_sessions", "guider", "extend"] == 3
        assert seen["thinklogit_cache_tokens", "guider"] == 1_000
        assert seen["thinklogit_cache_used_ratio", "guider"] == s.engine.cache_stats().tokens_used / 1_000 > 0


async def test_a_forward_that_fails_is_counted() -> None:
    async with stage() as s:
        c = await s.coordinator()
        s.engine.failure = RuntimeError("out of memory")
        await within(c.ask(1, [5]))
        assert found(s.replica.measured())["thinklogit_failed_forwards", "guider"] == 1


async def test_a_lost_cache_is_counted_with_the_tokens_sent_again(
    trio_engines: Mapping[Role, Engine],
) -> None:
    with watched(trio_engines) as trio:
        async with local_service(trio_config(), trio.engines) as service:
            one = request(service.tokenizers, TEXT, sampling=replace(LONG, max_tokens=40))
            answer = asyncio.create_task(decode(service.coordinators[0], one))
            await until(lambda: trio.watched["guider_base"].forwards > 5)
            evict_once(trio, "guider_base")
            finished(await answer)
            seen = measured(service)
    assert seen["thinklogit_refusals", "guider_base", "kv_miss"] == 1
    assert seen["thinklogit_reprefills", "guider_base"] == 1
    assert seen["thinklogit_resent_tokens", "guider_base"] >= len(one.prompts["guider_base"])
    assert not any(key[:2] == ("thinklogit_reprefills", "target") for key in seen)


def evict_once(trio: Trio, role: Role) -> None:
    def disturb(engine: Any) -> None:
        engine.forget_everything()
        engine.disturb = lambda engine: None

    trio.disturb(disturb, role)


async def test_sessions_are_counted_by_state(trio_engines: Mapping[Role, Engine]) -> None:
    config = trio_config(coordinator={"max_sessions": 2})
    with watched(trio_engines) as trio:
        async with local_service(config, trio.engines) as service:
            coordinator = service.coordinators[0]
            requests = [
                request(service.tokenizers, TEXT, sampling=LONG, guidance=Guidance(1.0), seed=seed) for seed in range(5)
            ]
            tasks = [asyncio.create_task(decode(coordinator, one)) for one in requests]
            await until(lambda: coordinator.load().sessions == 2 and coordinator.load().waiting == 3)
            states = {key[1]: value for key, value in measured(service).items() if key[0] == "thinklogit_sessions"}
            assert states == {"running": 2, "waiting": 3, "parked": 0}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await until(lambda: coordinator.load().sessions == 0)
            assert measured(service)["thinklogit_sessions", "running"] == 0


def test_counting_a_step_takes_microseconds() -> None:
    """The smallest forward takes a millisecond. Counting may take a hundredth of it, in CPU time of this process."""
    model, coordinator = ReplicaMeter("target"), CoordinatorMeter()
    began = time.process_time()
    for _ in range(1_000):
        model.forward((), 0.01)
        model.looked_up(0.0001)
        coordinator.turn(0.001)
    assert (time.process_time() - began) / 1_000 < 10e-6
