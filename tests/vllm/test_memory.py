"""The memory that vLLM is given, with faked readings of a GPU, and turns of roles that share one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from actors.engine import devices, memory, vllm_runner
from actors.engine.devices import loading_alone
from actors.engine.errors import LoadError
from actors.engine.loader import ModelSource
from actors.engine.memory import GIB, USABLE, AutoCache, held_rows, reserve
from actors.engine.sizing import cache_bytes_per_token
from actors.engine.vllm_runner import BLOCK_TOKENS, _memory_options, load_runner, vllm_engine
from tests.vllm.models import SERVED, saved

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own, of every kind

TOTAL, WEIGHTS = 80 * GIB, 10 * GIB
AUTO = AutoCache(share=0.25, sessions=8, longest=600, chunk=256)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(SERVED["qwen3"](), tmp_path / "model")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A GPU of 80 GiB, as far as memory and turns go."""
    monkeypatch.setattr(vllm_runner, "current_platform", SimpleNamespace(device_type="cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (TOTAL // 2, TOTAL))
    monkeypatch.setattr(devices, "device_name", lambda device: "gpu-0")
    monkeypatch.setattr("actors.engine.devices.tempfile.gettempdir", lambda: str(tmp_path))


def options(model: Path, cache_tokens: int | AutoCache, **source: Any) -> tuple[int | None, dict[str, Any]]:
    config = AutoConfig.from_pretrained(model)
    return _memory_options(ModelSource(str(model), **source), config, "bfloat16", cache_tokens, WEIGHTS)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stated_cache_is_given_in_bytes_and_checked_at_start(model: Path, ranks: int) -> None:
    tokens, memory_of = options(model, 1 << 20, tensor_parallel=ranks)
    each = cache_bytes_per_token(AutoConfig.from_pretrained(model).to_dict(), "bfloat16")
    assert tokens == 1 << 20
    assert memory_of["kv_cache_memory_bytes"] == ((1 << 20) + 2 * BLOCK_TOKENS) * each // ranks
    assert memory_of["max_model_len"] == 1_024  # the model's context
    needed = WEIGHTS / ranks + memory_of["kv_cache_memory_bytes"] + (2 << 30)
    assert memory_of["gpu_memory_utilization"] == needed / TOTAL


@pytest.mark.usefixtures("gpu")
def test_a_measured_cache_is_left_to_vllm_within_the_roles_share_less_rows_and_reductions(model: Path) -> None:
    tokens, memory_of = options(model, AUTO)
    spare = reserve(512, held_rows(AUTO.sessions), AUTO, 0, graphs=False).total
    assert tokens is None
    assert memory_of == {
        "max_model_len": 600,
        "gpu_memory_utilization": (int(AUTO.share * USABLE * TOTAL) - spare) / TOTAL,
    }


@pytest.mark.usefixtures("gpu")
def test_a_share_without_room_for_weights_and_a_session_is_refused_in_gib(model: Path) -> None:
    with pytest.raises(LoadError, match=r"are left .*10\.00 of weights; 0\.75 context"):
        options(model, AutoCache(0.125, 8, 600, 256))


def test_on_a_cpu_a_measured_cache_is_a_number_before_vllm_starts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, memory_of = options(model, AUTO)
    assert tokens == AUTO.most
    assert "gpu_memory_utilization" not in memory_of
    monkeypatch.setattr(memory, "host_bytes", lambda: 1 << 20)
    with pytest.raises(LoadError, match=r"0\.125 of the 0\.00 GiB of this machine"):
        options(model, AUTO)


def test_an_engine_with_a_measured_cache_has_that_size(model: Path) -> None:
    engine = vllm_engine(ModelSource(str(model), device="cpu", dtype="float32"), AUTO)
    try:
        assert engine.cache_stats().tokens_total == AUTO.most
        assert engine.runner.positions == 1_024
    finally:
        engine.runner.stop()


def test_a_cache_that_vllm_measured_is_used_whole(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(model, 512)[1]
    monkeypatch.setattr(vllm_runner, "_memory_options", lambda *arguments: (None, given))
    runner = load_runner(ModelSource(str(model), device="cpu", dtype="bfloat16"), AUTO)
    try:
        assert runner.cache.total == 512 + BLOCK_TOKENS  # of the two blocks more, vLLM keeps one
    finally:
        runner.stop()


@pytest.mark.usefixtures("gpu")
def test_a_role_gives_up_at_its_deadline_while_another_loads_on_its_gpu(model: Path) -> None:
    with loading_alone(torch.device("cuda"), "another"), pytest.raises(LoadError, match=r"loading on gpu-0 for 0 s"):
        load_runner(ModelSource(str(model)), 512, wait_s=0)
