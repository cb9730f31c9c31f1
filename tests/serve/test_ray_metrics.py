"""The export of metrics to Ray, as differences since the last publication; tests/router/test_app.py reads them back."""

from __future__ import annotations

import asyncio
from collections import Counter as Bag
from typing import Any

import pytest

from actors.metrics import COMMON, METRICS, Recorder
from actors.serve import ray_metrics
from actors.serve.ray_metrics import BATCH, Exporter

FIRST = "thinklogit_first_token_seconds"
Export = tuple[str, float, tuple[tuple[str, str], ...]]


class Ray:
    """A stand-in for ray.util.metrics that records what is exported."""

    def __init__(self) -> None:
        self.exported: list[Export] = []
        self.made: list[str] = []
        self.Counter = self.Gauge = self.Histogram = self._make

    def _make(self, name: str, description: str, *more: Any) -> Any:
        self.made.append(name)
        ray = self

        class Metric:
            def set_default_tags(self, tags: dict[str, str]) -> Metric:
                assert set(more[-1]) == {*COMMON, *METRICS[name].labels}
                assert tags == {"application": "app", "replica": "r1"}
                return self

            def inc(self, value: float, tags: dict[str, str]) -> None:
                assert value > 0, "Ray refuses others"
                ray.exported.append((name, value, tuple(tags.items())))

            set = observe = inc

        return Metric()

    def take(self) -> Bag[Export]:
        exported, self.exported = Bag(self.exported), []
        return exported


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    ray = Ray()
    monkeypatch.setattr(ray_metrics, "ray_metrics", ray)
    return ray


async def test_counter_exports_its_increase(ray: Ray) -> None:
    recorder, exporter = Recorder(), Exporter("app", "r1")
    counter = recorder.counter("thinklogit_refusals", "guider", "full")
    tags = (("role", "guider"), ("reason", "full"))
    for value, increase in ((0.0, None), (3.0, 3.0), (3.0, None), (5.5, 2.5)):
        counter.value = value
        await exporter.publish(recorder)
        assert ray.take() == Bag([("thinklogit_refusals", increase, tags)] if increase else [])
    assert ray.made == ["thinklogit_refusals"]


async def test_histogram_exports_new_values_in_their_buckets(ray: Ray) -> None:
    recorder, exporter = Recorder(), Exporter("app", "r1")
    histogram, bounds = recorder.histogram(FIRST, "demo"), METRICS[FIRST].buckets
    tags = (("model", "demo"),)
    histogram.observe(bounds[0] / 2, times=2)
    histogram.observe(bounds[-1] + 1)
    await exporter.publish(recorder)
    assert ray.take() == {(FIRST, bounds[0], tags): 2, (FIRST, 2 * bounds[-1], tags): 1}
    histogram.observe(bounds[1])
    await exporter.publish(recorder)
    assert ray.take() == {(FIRST, bounds[1], tags): 1}


async def test_gauge_is_exported_at_every_publication_since_ray_forgets_it(ray: Ray) -> None:
    recorder, exporter = Recorder(), Exporter("app", "r1")
    recorder.gauge("thinklogit_sessions", "running").value = 4
    for _ in range(2):
        await exporter.publish(recorder)
        assert ray.take() == {("thinklogit_sessions", 4, (("state", "running"),)): 1}


async def test_values_recorded_during_a_publication_are_exported_once(ray: Ray) -> None:
    recorder, exporter = Recorder(), Exporter("app", "r1")
    histogram = recorder.histogram(FIRST, "demo")
    histogram.observe(0.3, times=3 * BATCH)
    publishing = asyncio.create_task(exporter.publish(recorder))
    await asyncio.sleep(0)  # it exports some, and lets other tasks run
    assert sum(Bag(ray.exported).values()) == BATCH
    histogram.observe(0.3, times=5)
    recorder.counter("thinklogit_resumes").add()
    await publishing
    assert sum(ray.take().values()) == 3 * BATCH
    await exporter.publish(recorder)
    assert ray.take() == {(FIRST, 0.5, (("model", "demo"),)): 5, ("thinklogit_resumes", 1, ()): 1}
