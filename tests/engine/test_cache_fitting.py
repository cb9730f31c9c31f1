"""`cache_tokens: auto` of the native engine, with faked readings of a GPU's memory."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from actors.engine import cache_fitting
from actors.engine.cache_fitting import fit_cache, largest_step
from actors.engine.errors import LoadError
from actors.engine.inputs import Batch
from actors.engine.loader import ModelSource, load_engine
from actors.engine.memory import CONTEXT_BYTES, GIB, USABLE, AutoCache, reserve
from actors.engine.native_runner import NativeRunner
from actors.engine.step_engine import StepEngine
from tests.support.local_service import WEIGHTS
from tests.support.tiny_models import Driver, qwen2, tokens

AUTO = AutoCache(share=0.5, sessions=3, longest=100, chunk=40)
ROWS = 256
STEP = 5 << 20  # faked bytes of the largest step


@dataclass
class Readings:
    """A GPU of which another process has a part. Its largest step allocates STEP bytes beside the logits."""

    total: int = 4 * GIB
    free: int = 3 * GIB
    held: int = GIB // 4
    peak: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, self.total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.held)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.held)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> NativeRunner:
    """On the CPU, though it says that it is on a GPU."""
    made = NativeRunner(qwen2(), AUTO.least)
    made.device = torch.device("cuda")
    return made


def fitted(runner: NativeRunner, readings: Readings, monkeypatch: pytest.MonkeyPatch) -> int:
    readings.install(monkeypatch)
    plain = runner.run

    def run(batch: Batch) -> torch.Tensor:
        logits = plain(batch)
        readings.peak = readings.held + STEP + logits.nbytes
        return logits

    monkeypatch.setattr(runner, "run", run)
    fit_cache(runner, AUTO, ROWS, "some/model")
    return runner.cache.total


def test_the_cache_is_the_share_less_weights_and_reserve(runner: NativeRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    share, spare = int(0.5 * USABLE * 4 * GIB), reserve(runner.width, ROWS, AUTO, STEP, graphs=False).total
    weights = share - spare - 200 * runner.cache.token_bytes
    assert fitted(runner, Readings(held=weights), monkeypatch) == 192 < AUTO.most


def test_it_is_never_more_than_what_is_free(runner: NativeRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    spare = reserve(runner.width, ROWS, AUTO, STEP, graphs=False).total
    free = spare - CONTEXT_BYTES + 200 * runner.cache.token_bytes  # the context is taken already
    assert fitted(runner, Readings(free=free), monkeypatch) == 192


def test_it_is_never_more_than_all_sessions_can_have(runner: NativeRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitted(runner, Readings(), monkeypatch) == AUTO.most == 3 * 128
    assert all(len(pool) == AUTO.most + 1 for pools in runner.cache_layers for pool in pools)


def test_too_little_memory_is_refused_with_every_figure(runner: NativeRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoadError) as refused:
        fitted(runner, Readings(held=2 * GIB), monkeypatch)
    for figure in ("1.96 GiB of 4.00", "2.00 of weights", "3.00 free", "0.75 context"):
        assert figure in str(refused.value)


def test_a_resized_engine_computes_as_before(runner: NativeRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted(runner, Readings(), monkeypatch)
    runner.device = torch.device("cpu")
    run = Driver(StepEngine(runner, ROWS))
    run.extend(1, tokens(9))
    torch.testing.assert_close(run.logits(1), runner.plain_logits(tokens(9))[0][-len(run.logits(1)) :])


def test_the_largest_step_reads_a_prompt_beside_checks_of_all_other_sessions() -> None:
    batch = largest_step(AUTO, trash=7, rows=ROWS)
    assert [(span.first, span.count, span.length) for span in batch.spans] == [(0, 40, 100), (40, 8, 33), (48, 8, 33)]
    assert len(batch.ids) == len(batch.positions) == AUTO.chunk + 8 * 2
    assert (batch.positions[0], batch.positions[39], batch.positions[-1]) == (60, 99, 32)
    assert set(batch.write) == {7}
    assert list(batch.keep) == list(range(39, 56))
    assert list(largest_step(AUTO, 7, rows=4).keep) == list(range(52, 56))


def test_on_a_cpu_the_cache_is_what_all_sessions_can_have_within_the_machines_share() -> None:
    source = ModelSource(str(WEIGHTS / "guider"), device="cpu", dtype="float32")
    assert load_engine(source, AUTO).cache_stats().tokens_total == AUTO.most


def test_a_measured_size_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger=cache_fitting.__name__):
        fit_cache(NativeRunner(qwen2(), AUTO.least), AUTO, ROWS, "some/model")
    assert f"some/model: cache_tokens: auto: {AUTO.most} tokens" in caplog.text
