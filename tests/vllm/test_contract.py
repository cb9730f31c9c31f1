"""The parts of vLLM that `actors/engine/vllm_runner.py` uses, each by name: a new version shows here what has moved."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import import_module
from typing import Any

import pytest

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
    ("vllm.v1.worker.utils", "AttentionGroup.build_metadata", ("common_attn_metadata",)),
    ("vllm.forward_context", "set_forward_context", ("attn_metadata", "vllm_config", "num_tokens", "slot_mapping")),
    ("vllm.v1.worker.utils", "copy_kv_cache_blocks_inplace", ("kv_caches", "num_blocks", "kv_cache_block_copies")),
]
# module, dataclass, fields
READ = [
    (
        "vllm.v1.attention.backend",
        "CommonAttentionMetadata",
        "query_start_loc query_start_loc_cpu seq_lens seq_lens_cpu_upper_bound num_reqs num_actual_tokens "
        "max_query_len max_seq_len block_table_tensor slot_mapping positions is_prefilling",
    ),
    ("vllm.v1.kv_cache_interface", "KVCacheConfig", "num_blocks kv_cache_groups"),
    ("vllm.v1.kv_cache_interface", "KVCacheGroupSpec", "layer_names kv_cache_spec"),
    ("vllm.v1.kv_cache_interface", "AttentionSpec", "block_size"),
    (
        "vllm.engine.arg_utils",
        "EngineArgs",
        "model revision dtype load_format trust_remote_code max_model_len kv_cache_memory_bytes block_size "
        "max_num_seqs max_num_batched_tokens distributed_executor_backend worker_extension_cls skip_tokenizer_init "
        "disable_log_stats enforce_eager enable_prefix_caching async_scheduling gpu_memory_utilization "
        "tensor_parallel_size",
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


def test_runners_have_the_names_that_a_worker_reads() -> None:
    """They are set on instances: read from the source of both runners."""
    for module in ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"):
        source = inspect.getsource(import_module(module))
        for name in ("model", "kv_cache_config", "kv_caches", "attn_groups", "device"):
            assert re.search(rf"self\.{name}\b\s*[:=,]", source), f"{module}: {name}"


def test_the_platform_names_its_device() -> None:
    assert found("vllm.platforms", "current_platform").device_type in ("cpu", "cuda")
