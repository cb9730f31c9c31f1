"""Buckets as plain calls, with the emulated operator, and with a fake of CUDA's capture, which needs a GPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from actors.engine.attention import Span
from actors.engine.flash import FlashAttention
from actors.engine.graphs import MAX_SEQUENCES, CapturedRunner, CaptureFailed, GraphBuckets, PlainRunner, bucket
from actors.engine.inputs import Batch, Layout
from actors.engine.native_runner import native_engine
from actors.engine.registry import BACKENDS, BackendEntry
from tests.support.tiny_models import Driver, qwen2, tokens, wide_heads
from tests.support.varlen import emulated_flash


@pytest.fixture(autouse=True)
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = BackendEntry(lambda: FlashAttention(emulated_flash), lambda device, dtype: True)
    monkeypatch.setitem(BACKENDS, "flash", entry)


def batch_of(*counts: int, length: int = 20) -> Batch:
    spans, first = [], 0
    for count in counts:
        spans.append(Span(first, count, 0, length))
        first += count
    return Batch([0] * first, [0] * first, [0] * first, spans, range(first))


@pytest.mark.parametrize(
    ("batch", "layout"),
    [
        (batch_of(1), Layout(1, 1, 1, 1, 1024)),
        (batch_of(1, 1, 1), Layout(4, 4, 4, 1, 1024)),
        (batch_of(2), Layout(4, 4, 1, 4, 1024)),
        (batch_of(5), Layout(8, 8, 1, 8, 1024)),
        (batch_of(8, *[1] * 30), Layout(64, 64, 32, 8, 1024)),
        (batch_of(1, length=1025), Layout(1, 1, 1, 1, 4096)),
        (batch_of(9), None),
        (batch_of(*[1] * (MAX_SEQUENCES + 1)), None),
        (batch_of(1, length=300_000), None),
        (batch_of(), None),
    ],
)
def test_a_batch_takes_the_smallest_bucket_that_holds_it(batch: Batch, layout: Layout | None) -> None:
    assert bucket(batch) == layout


def steps() -> Iterator[list[tuple[int, int]]]:
    """Sessions and their new tokens: prompts, decoding and verifications in changing batches."""
    yield [(1, 30), (2, 3), (3, 1)]
    yield [(1, 1), (2, 1), (3, 1)]
    yield [(1, 5), (2, 1), (3, 3)]
    yield [(3, 8), (4, 2)]
    yield [(1, 1)]
    yield [(2, 2), (4, 1), (1, 1), (3, 1), (5, 4)]
    yield [(5, 40), (1, 2)]


class Counting(PlainRunner):
    """A plain runner that overwrites its last output when it runs again, like a replayed graph."""

    layouts: list[Layout]
    last: torch.Tensor

    def run(self, layout: Layout, numbers: list[int], spans: Sequence[Span]) -> torch.Tensor:
        self.layouts.append(layout)
        output = super().run(layout, numbers, spans)
        if len(self.layouts) > 1:
            self.last.fill_(float("nan"))
        self.last = output
        return output


@torch.inference_mode()
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("backend", ["flash", "per_session", "gathered"])
def test_padded_buckets_give_the_rows_of_unpadded_steps(backend: str, window: int | None) -> None:
    plain = Driver(native_engine(wide_heads(window), 1024, backend="per_session"))
    padded = Driver(native_engine(wide_heads(window), 1024, backend=backend, graphs=True))
    runner = Counting(padded.engine.runner._compute, padded.engine.runner.device)
    runner.layouts = []
    padded.engine.runner.graphs = GraphBuckets(runner, padded.engine.runner.cache.trash)
    for number, step in enumerate(steps()):
        for run in (plain, padded):
            run.engine.extend([run.make(session, tokens(count, 10 * number + session)) for session, count in step])
        for session in plain.tokens:
            torch.testing.assert_close(padded.logits(session), plain.logits(session), rtol=1e-4, atol=1e-4)
    assert [(layout.sequences, layout.max_q) for layout in runner.layouts] == [(4, 1), (4, 8), (2, 8), (1, 1), (8, 4)]
    assert all(pool.isfinite().all() for pools in padded.engine.runner.cache_layers for pool in pools)
    padded.engine.check()


class Recorder:
    """A fake of CUDA's graphs: a replay repeats the captured call with its inputs and spans."""

    def __init__(self, compute: Any) -> None:
        self.compute = compute
        self.captures: list[Layout] = []
        self.replays = 0
        self.capturing: Recording | None = None
        self.runner: CapturedRunner | None = None

    def run(self, layout: Layout, flat: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        output: torch.Tensor = self.compute(layout, flat, spans)
        if self.capturing is not None:
            self.captures.append(layout)
            assert self.runner is not None
            shared = self.runner._outputs[layout.rows]
            self.capturing.redo = lambda: shared.copy_(self.compute(layout, flat, spans))
            output.zero_()  # a capture computes nothing
        return output

    @contextmanager
    def capture(self, graph: Recording, **options: Any) -> Iterator[None]:
        assert options == {"pool": "the pool", "capture_error_mode": "thread_local"}
        self.capturing = graph
        yield
        self.capturing = None


class Recording:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.redo: Any = None

    def replay(self) -> None:
        self.recorder.replays += 1
        self.redo()


@torch.inference_mode()
@pytest.mark.parametrize("most", [64, 2])
def test_a_graph_is_captured_once_a_bucket_and_replayed_on_new_inputs(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    plain = Driver(native_engine(wide_heads(6), 1024, backend="per_session"))
    replayed = Driver(native_engine(wide_heads(6), 1024, backend="flash"))
    engine = replayed.engine
    recorder = Recorder(engine.runner._compute)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Recording(recorder))
    monkeypatch.setattr(torch.cuda, "graph", recorder.capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the thread's")
    recorder.runner = CapturedRunner(recorder.run, engine.runner.device, most)
    engine.runner.graphs = GraphBuckets(recorder.runner, engine.runner.cache.trash)
    for number, step in enumerate([*steps(), *list(steps())[1:]]):
        for run in (plain, replayed):
            run.engine.extend([run.make(session, tokens(count, 10 * number + session)) for session, count in step])
        for session in plain.tokens:
            torch.testing.assert_close(replayed.logits(session), plain.logits(session), rtol=1e-4, atol=1e-4)
    if most == 64:
        assert len(set(recorder.captures)) == len(recorder.captures) == recorder.replays == 5
        rows = {layout.rows for layout in recorder.captures}
        assert sum(len(output) for output in recorder.runner._outputs.values()) == sum(rows) < 2 * max(rows)
    else:
        assert len(recorder.captures) == 10  # five buckets in turn, of which two are kept


def test_a_capture_that_raises_gives_its_graphs_and_its_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = ["the thread's"]

    @contextmanager
    def broken(graph: Any, **options: Any) -> Iterator[None]:
        streams.append("the capture's")  # as torch does: its exit raises before it goes back
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    engine = native_engine(wide_heads(), 256, backend="flash")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", broken)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    engine.runner.graphs = GraphBuckets(
        CapturedRunner(engine.runner._compute, engine.runner.device), engine.runner.cache.trash
    )
    run = Driver(engine)
    run.extend(1, [4])
    run.extend(1, [5])
    assert streams == ["the thread's", "the capture's", "the thread's"]
    assert engine.runner.graphs.runner is None
    torch.testing.assert_close(run.logits(1), engine.plain_logits([4, 5])[0][1:], rtol=1e-4, atol=1e-4)


def test_rows_of_a_bucket_lie_in_memory_of_their_own() -> None:
    engine = native_engine(wide_heads(), 256, backend="flash", graphs=True)
    run = Driver(engine)
    run.engine.extend([run.make(session, [session]) for session in (1, 2, 3)])
    rows = engine.rows(3)
    assert rows is not None
    assert rows.places[0].block.logits.untyped_storage().nbytes() == 3 * engine.width * 4


def test_a_failed_capture_leaves_plain_steps_and_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def run(self, layout: Layout, numbers: list[int], spans: Sequence[Span]) -> Any:
            raise CaptureFailed("no memory")

    engine = native_engine(wide_heads(), 256, backend="flash", graphs=True)
    engine.runner.graphs = GraphBuckets(Broken(), engine.runner.cache.trash)
    run = Driver(engine)
    with caplog.at_level(logging.WARNING, logger="actors.engine.graphs"):
        for token in (4, 5, 6):
            run.extend(1, [token])
    assert len(caplog.records) == 1
    torch.testing.assert_close(run.logits(1), engine.plain_logits([4, 5, 6])[0][2:], rtol=1e-4, atol=1e-4)


def test_a_cpu_uses_buckets_only_if_requested() -> None:
    assert native_engine(qwen2(), 64).runner.graphs is None
    assert native_engine(qwen2(), 64, batch_invariant=True).runner.graphs is None
    assert native_engine(qwen2(), 64, graphs=True).runner.graphs is not None
