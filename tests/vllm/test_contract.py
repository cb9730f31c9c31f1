"""The parts of vLLM that `actors/engine/vllm_runner.py` lists, each by name: in a new version, what has moved."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import import_module
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")

# module, attribute, names among its parameters (of a class: of its construction)
CALLED = [
    ("vllm.engine.arg_utils", "EngineArgs.create_engine_config", ()),
    ("vllm.v1.engine.core", "EngineCore", ("vllm_config", "executor_class", "log_stats")),
    ("vllm.v1.engine.core", "EngineCore.shutdown", ()),
    ("vllm.v1.executor.abstract", "Executor.get_class", ("vllm_config",)),
    ("vllm.v1.executor.abstract", "Executor.collective_rpc", ("method", "args")),
    ("vllm.v1.executor.uniproc_executor", "ExecutorWithExternalLauncher._distributed_args", ()),
    ("vllm.v1.executor.uniproc_executor", "ExecutorWithExternalLauncher._init_executor", ()),
    (
        "vllm.v1.worker.gpu.attn_utils",
        "build_attn_metadata",
        (
            *("attn_groups", "kv_cache_config", "num_reqs", "num_tokens", "query_start_loc_gpu", "query_start_loc_cpu"),
            *("max_query_len", "seq_lens", "seq_lens_cpu_upper_bound", "max_seq_len", "block_tables", "slot_mappings"),
            *("positions", "is_prefilling"),
        ),
    ),
    ("vllm.v1.worker.gpu.attn_utils", "build_slot_mappings_by_layer", ("slot_mappings", "kv_cache_config")),
    ("vllm.v1.worker.gpu.input_batch", "InputBuffers", ("max_num_reqs", "max_num_tokens", "device")),
    (
        "vllm.v1.worker.gpu.cudagraph_utils",
        "ModelCudaGraphManager.dispatch",
        ("num_reqs", "num_tokens", "uniform_token_count", "num_active_loras", "max_query_len"),
    ),
    ("vllm.v1.worker.gpu.cudagraph_utils", "ModelCudaGraphManager.run_fullgraph", ("desc",)),
    ("vllm.v1.worker.gpu.cudagraph_utils", "ModelCudaGraphManager.run_pw_graph", ("model", "model_inputs")),
    (
        "vllm.forward_context",
        "set_forward_context",
        (
            *("attn_metadata", "vllm_config", "num_tokens", "cudagraph_runtime_mode", "batch_descriptor"),
            *("slot_mapping", "is_padding"),
        ),
    ),
    ("vllm.v1.worker.utils", "copy_kv_cache_blocks_inplace", ("kv_caches", "num_blocks", "kv_cache_block_copies")),
]
# module, dataclass, fields
READ = [
    ("vllm.v1.worker.gpu.cudagraph_utils", "BatchExecutionDescriptor", "cg_mode num_tokens num_reqs"),
    ("vllm.config", "SchedulerConfig", "max_num_seqs max_num_batched_tokens"),
    ("vllm.v1.kv_cache_interface", "KVCacheConfig", "num_blocks kv_cache_groups"),
    ("vllm.v1.kv_cache_interface", "KVCacheGroupSpec", "kv_cache_spec"),
    ("vllm.v1.kv_cache_interface", "AttentionSpec", "block_size"),
    (
        "vllm.engine.arg_utils",
        "EngineArgs",
        "model revision dtype load_format trust_remote_code max_model_len kv_cache_memory_bytes block_size "
        "max_num_seqs max_num_batched_tokens distributed_executor_backend worker_extension_cls skip_tokenizer_init "
        "disable_log_stats enforce_eager compilation_config enable_prefix_caching async_scheduling "
        "gpu_memory_utilization tensor_parallel_size",
    ),
]


def found(module: str, path: str) -> Any:
    owner = import_module(module)
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner


@pytest.mark.parametrize(("module", "path", "parameters"), CALLED, ids=[path for _, path, _ in CALLED])
def test_what_is_called_takes_these_parameters(module: str, path: str, parameters: tuple[str, ...]) -> None:
    assert set(parameters) <= set(inspect.signature(found(module, path)).parameters)


@pytest.mark.parametrize(("module", "path", "fields"), READ, ids=[path for _, path, _ in READ])
def test_what_is_read_or_filled_has_these_fields(module: str, path: str, fields: str) -> None:
    assert set(fields.split()) <= {field.name for field in dataclasses.fields(found(module, path))}


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("vllm.v1.worker.gpu_model_runner", ""),
        ("vllm.v1.worker.gpu.model_runner", "input_buffers block_tables cudagraph_manager"),
    ],
)
def test_runners_have_the_names_that_a_worker_reads(module: str, names: str) -> None:
    """They are set on instances: read from the source. V1, on CPUs, has no buffers, which a step then makes itself."""
    source = inspect.getsource(import_module(module))
    for name in ("model", "kv_cache_config", "kv_caches", "attn_groups", "device", *names.split()):
        assert re.search(rf"self\.{name}\b\s*[:=,]", source), f"{module}: {name}"
    assert ("self.input_buffers" in source) == bool(names)


def test_the_buffers_of_a_step_have_these_shapes() -> None:
    inputs = found("vllm.v1.worker.gpu.input_batch", "InputBuffers")(2, 5, torch.device("cpu"))
    shapes = {
        "input_ids": (torch.int32, (5,)),
        "positions": (torch.int64, (5,)),
        "is_padding": (torch.bool, (5,)),
        "query_start_loc": (torch.int32, (3,)),
        "seq_lens": (torch.int32, (2,)),
    }
    assert {name: (getattr(inputs, name).dtype, getattr(inputs, name).shape) for name in shapes} == shapes
    source = inspect.getsource(found("vllm.v1.worker.gpu.block_table", "BlockTables"))  # needs pinned memory
    assert "self.input_block_tables: list[torch.Tensor] =" in source
    assert "self.slot_mappings =" in source


def test_values_and_settings_have_the_meaning_that_a_step_gives_them() -> None:
    modes = found("vllm.config", "CUDAGraphMode")
    assert {modes.NONE, modes.PIECEWISE, modes.FULL} == modes.valid_runtime_modes()
    assert found("vllm.v1.attention.backends.utils", "PAD_SLOT_ID") == -1
    assert found("vllm.forward_context", "BatchDescriptor")(num_tokens=3).num_tokens == 3
    assert "VLLM_USE_V2_MODEL_RUNNER" in found("vllm.envs", "environment_variables")


def test_the_platform_names_its_device() -> None:
    assert found("vllm.platforms", "current_platform").device_type in ("cpu", "cuda")
