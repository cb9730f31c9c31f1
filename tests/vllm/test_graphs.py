"""CUDA graphs, as far as a CPU can tell: which one vLLM dispatches, and what it would read when it is replayed.

A graph is replayed as a forward of its padded size over the same buffers, on the objects of vLLM's Model Runner V2.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBuffers

from actors.engine import vllm_runner
from actors.engine.loader import ModelSource
from actors.engine.step_engine import StepEngine
from actors.engine.vllm_runner import GRAPHS, STEP_SESSIONS, VllmRunner, vllm_engine
from actors.engine.vllm_worker import Step, StepBuffers, dispatched, fill
from tests.support.fake_cuda import TRACE, Watch
from tests.vllm.models import SERVED, qwen3, saved
from tests.vllm.test_engine import CACHE, Script

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = [1, 2, 4, *range(8, 513, 8)]  # tokens of the captured graphs, about as vLLM chooses them
NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL
STEP = Step(
    ids=np.array([11, 12, 13], np.int32),
    positions=np.array([33, 0, 1]),
    starts=np.array([0, 1, 3], np.int32),
    lengths=np.array([34, 2], np.int32),
    blocks=np.array([[4, 2], [7, 0]], np.int32),
    keep=np.array([0, 2]),
)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Callable[[VllmConfig, str], ModelCudaGraphManager]:
    """Makes vLLM's manager of graphs for a back end with this support of graphs, as if it had captured them."""
    monkeypatch.setattr(type(current_platform), "_global_graph_pool", "of no GPU")
    alone = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr("vllm.v1.worker.gpu.cudagraph_utils.get_pp_group", lambda: alone)

    def manager(config: VllmConfig, support: str) -> ModelCudaGraphManager:
        config, made = copy(config), CompilationConfig(mode=CompilationMode.VLLM_COMPILE, **GRAPHS)
        made.cudagraph_capture_sizes, made.max_cudagraph_capture_size = SIZES, SIZES[-1]
        made.set_splitting_ops_for_v1("naive")
        mode = made.resolve_cudagraph_mode_and_sizes(AttentionCGSupport[support], "some", use_v2_model_runner=True)
        config.compilation_config = made
        graphs = ModelCudaGraphManager(config, torch.device("cpu"), mode, decode_query_len=1)
        graphs._graphs_captured = True
        return graphs

    return manager


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], StepEngine[VllmRunner]]]:
    """Loads engines on Model Runner V2. vLLM refuses it without Triton, which no step needs."""
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    made: list[StepEngine[VllmRunner]] = []

    def loaded(path: Path) -> StepEngine[VllmRunner]:
        made.append(vllm_engine(ModelSource(str(path), dtype="float32", device="cpu"), CACHE))
        return made[-1]

    yield loaded
    for engine in made:
        engine.runner.stop()


def replayed_by_forwards(worker: Any, manager: Any) -> Counter[str]:
    """Give a worker the manager, with forwards in place of graphs. Returns how often each mode ran, and was padded."""
    seen: Counter[str] = Counter()
    metadata = worker.thinklogit_metadata
    latest: list[Any] = []

    def remember(step: Step, batch: Any) -> Any:
        seen[batch.cg_mode.name] += 1
        seen["padded"] += batch.cg_mode == FULL and batch.num_reqs > len(step.lengths)
        latest[:] = [metadata(step, batch)]
        return latest[0]

    worker.thinklogit_metadata = remember
    manager.run_fullgraph = lambda batch: worker.thinklogit_forward(replace(batch, cg_mode=NONE), *latest)
    worker.model_runner.cudagraph_manager = manager
    return seen


@pytest.mark.parametrize(
    ("name", "support"), [*((name, "ALWAYS") for name in SERVED), ("gemma3", "UNIFORM_SINGLE_TOKEN_DECODE")]
)
def test_replayed_steps_give_the_rows_of_plain_forwards(
    name: str, support: str, tmp_path: Path, load: Any, captured: Any
) -> None:
    path = saved(SERVED[name](), tmp_path / name)
    engine = load(path)
    worker = engine.runner._core.model_executor.driver_worker.worker
    runner, buffers = worker.model_runner, worker.thinklogit_buffers
    assert buffers.inputs is runner.input_buffers
    assert buffers.tables is runner.block_tables.input_block_tables
    assert buffers.slots is runner.block_tables.slot_mappings
    seen = replayed_by_forwards(worker, captured(worker.vllm_config, support))
    assert Script(engine, path, seed=5).run(20) < 1e-3
    assert seen["padded"], seen
    assert bool(seen["PIECEWISE"]) == (support != "ALWAYS")
    before = seen["NONE"]
    engine.runner.plain_logits([5, 6, 7])
    assert seen["NONE"] == before + 1, "the reference of the check at load is not replayed"


@pytest.mark.parametrize(
    ("support", "others"), [("ALWAYS", FULL), ("UNIFORM_BATCH", PIECEWISE), ("UNIFORM_SINGLE_TOKEN_DECODE", PIECEWISE)]
)
def test_graphs_are_full_for_all_steps_or_for_one_token_a_session(
    support: str, others: CUDAGraphMode, captured: Any
) -> None:
    config = VllmConfig()
    config.scheduler_config.max_num_seqs = STEP_SESSIONS
    manager = captured(config, support)
    steps = {
        "one decode": ([1], FULL, 1),
        "decodes": ([1] * 9, FULL, 16),
        "a check": ([5], others, 8),
        "checks": ([5] * 9, others, 48),
        "a mix": ([1, 1, 5, 40], others, 48),
        "more than the largest graph": ([1, 600], NONE, 601),
        "most sessions": ([1] * STEP_SESSIONS, FULL, STEP_SESSIONS),
    }
    found = {name: dispatched(manager, np.array(counts, np.int32)) for name, (counts, _, _) in steps.items()}
    assert {name: (each.cg_mode, each.num_tokens) for name, each in found.items()} == {
        name: (mode, tokens) for name, (_, mode, tokens) in steps.items()
    }
    assert found["decodes"].num_reqs == 16
    assert all(each.num_reqs is None for each in found.values() if each.cg_mode == PIECEWISE)


def dirty_buffers(device: str) -> StepBuffers:
    """Of at most 4 sessions and 8 tokens in two groups, full of another step's numbers."""
    made = InputBuffers(4, 8, torch.device(device))
    for tensor in (made.input_ids, made.positions, made.query_start_loc, made.seq_lens):
        tensor.fill_(77)
    tables = [torch.full((4, 3), 77, dtype=torch.int32, device=device) for _ in range(2)]
    return StepBuffers(made, tables, torch.full((2, 8), 77, device=device), size=32)


def test_a_step_and_its_padding_are_written_as_graphs_read_them() -> None:
    made = dirty_buffers("cpu")
    keep = fill(made, STEP, sessions=3)
    inputs = made.inputs
    assert keep.tolist() == [0, 2]
    assert inputs.input_ids[:3].tolist() == [11, 12, 13]
    assert inputs.positions[:3].tolist() == [33, 0, 1]
    assert inputs.query_start_loc.tolist() == [0, 1, 3, 3, 3]
    assert inputs.seq_lens.tolist() == [34, 2, 0, 0]
    assert inputs.is_padding.tolist() == [False] * 3 + [True] * 5
    # block b of group g is block 2 b + g + 1 of vLLM's, and 0 is its null block
    assert [table[:2, :2].tolist() for table in made.tables] == [[[9, 5], [15, 1]], [[10, 6], [16, 2]]]
    assert [table[2].tolist() for table in made.tables] == [[0, 0, 0]] * 2
    assert made.slots.tolist() == [[5 * 32 + 1, 480, 481, *[-1] * 5], [6 * 32 + 1, 512, 513, *[-1] * 5]]


def test_a_step_is_uploaded_at_once() -> None:
    """On the meta device, which tells tensors of the host from those of a device as CUDA does."""
    made = dirty_buffers("meta")
    TRACE.clear()
    with Watch():  # type: ignore[no-untyped-call]
        fill(made, STEP, sessions=3)
    assert TRACE == ["forwards: copy"]


def test_on_a_gpu_vllm_is_told_to_capture_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    monkeypatch.setattr(vllm_runner, "current_platform", SimpleNamespace(device_type="cuda"))
    arguments = EngineArgs(model=str(saved(qwen3(), tmp_path / "model")), **vllm_runner._execution())
    assert arguments.compilation_config.cudagraph_mode == FULL
    assert not arguments.enforce_eager
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"
