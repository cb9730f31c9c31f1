"""Runs forwards on vLLM as a model executor: its models, kernels and cache; our sessions, blocks and rows.

vLLM's scheduler, sampler and request states are built and never used. Its request interface could not do this: sessions
go back after rejected drafts, and rows are looked up again.

Used of vLLM here and in `vllm_worker.py`, and nothing else (`tests/vllm/test_contract.py` has a test for each):

    [1] vllm.engine.arg_utils      EngineArgs(...).create_engine_config(): .compilation_config, .parallel_config,
                                   .scheduler_config.max_num_seqs, .max_num_batched_tokens,
                                   .model_config.max_model_len, .dtype, .get_vocab_size(), .device_config
    [2] vllm.v1.engine.core        EngineCore(config, executor_class, log_stats): loads the model, sizes and makes the
                                   cache, captures graphs; of it only .model_executor and .shutdown() are used
    [3] vllm.v1.executor           Executor.get_class(config), .collective_rpc(method, args=), and for ranks
                                   ExecutorWithExternalLauncher._distributed_args(), ._init_executor()
    [4] parallel_config.worker_extension_cls: a class that is mixed into the worker
    [5] worker.model_runner        .model, .kv_cache_config, .kv_caches, .attn_groups, .device;
                                   Model Runner V2 only: .input_buffers, .block_tables, .cudagraph_manager
    [6] vllm.v1.kv_cache_interface KVCacheConfig.num_blocks, .kv_cache_groups[i].kv_cache_spec.block_size; AttentionSpec
    [7] vllm.v1.worker.gpu.attn_utils
                                   build_attn_metadata(...), build_slot_mappings_by_layer(slots, kv_cache_config)
    [8] vllm.v1.worker.gpu.input_batch
                                   InputBuffers(sessions, tokens, device): .input_ids, .positions, .is_padding,
                                   .query_start_loc, .seq_lens
    [9] vllm.v1.worker.gpu.block_table
                                   BlockTables.input_block_tables, .slot_mappings
   [10] vllm.v1.worker.gpu.cudagraph_utils
                                   ModelCudaGraphManager.dispatch(...), .run_fullgraph(batch), .run_pw_graph(model,
                                   arguments); BatchExecutionDescriptor(cg_mode, num_tokens, num_reqs)
   [11] vllm.forward_context       set_forward_context(metadata, config, num_tokens=, cudagraph_runtime_mode=,
                                   batch_descriptor=, slot_mapping=, is_padding=); BatchDescriptor(num_tokens)
   [12] a model                    forward(input_ids, positions, intermediate_tensors, inputs_embeds),
                                   compute_logits(hidden) -> [R, V]
   [13] vllm.v1.worker.utils       copy_kv_cache_blocks_inplace(caches, num_blocks, pairs)
   [14] vllm.platforms             current_platform.device_type
   [15] vllm.config, vllm.v1.attention.backends.utils
                                   CUDAGraphMode.NONE, .PIECEWISE, .FULL; PAD_SLOT_ID
   [16] VLLM_USE_V2_MODEL_RUNNER and the other variables that are set below
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before vLLM is imported: on a CPU it keeps a worker in this process only so. Nothing is reported to anyone.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the roles of a service share the cores

import numpy as np
import torch
import torch.distributed as dist
import vllm
from pydantic import ValidationError
from torch import Tensor
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

from actors.config import VLLM_VERSION
from actors.engine.block_cache import BlockCache
from actors.engine.devices import LOAD_S, loading_alone
from actors.engine.digest import files_digest, non_finite_tensor
from actors.engine.errors import LoadError, StepFailed, first_line
from actors.engine.interface import Extend
from actors.engine.loader import ModelSource, Report, load_model, report_progress, stored_bytes, verified_config
from actors.engine.memory import GIB, USABLE, AutoCache, fitting_tokens, held_rows, host_tokens, reserve
from actors.engine.rows import row_budget
from actors.engine.selfcheck import verify_engine
from actors.engine.sizing import cache_bytes_per_token, context_length, row_width, text_config
from actors.engine.step_engine import StepEngine
from actors.engine.vllm_worker import CacheShape, Step, StepWorker
from actors.engine.weight_files import cached_folder, weight_files

log = logging.getLogger(__name__)

BLOCK_TOKENS = 32  # of a block of the cache; the CPU's kernels take no smaller one
STEP_SESSIONS, STEP_TOKENS = 256, 4_096  # most of one forward: vLLM sizes its buffers by them
_CHECKED = -(1 << 40)  # session of `plain_logits`, which no user has
_SHARED = Path("/dev/shm")  # noqa: S108 - Linux' folder of shared memory, which vLLM uses on CPUs
_START_BYTES = 2 << 30  # that vLLM takes beside weights and cache, about
# One graph for any mix of sessions. Where the attention back end cannot have that, vLLM makes it FULL_AND_PIECEWISE:
# whole graphs for one token a session, and graphs of what is between attentions for the rest.
GRAPHS = {"cudagraph_mode": "FULL"}


def vllm_engine(
    source: ModelSource, cache_tokens: int | AutoCache, report: Report | None = None, max_held_rows: int | None = None
) -> StepEngine[VllmRunner]:
    """Load a model on vLLM, and compare its steps with one of vLLM's own prompts. Raises LoadError if any of it fails.

    The arguments are those of `actors.engine.loader.load_engine`.
    """
    began, size = time.monotonic(), stored_bytes(source)
    runner = load_runner(source, cache_tokens, report)
    engine = StepEngine(runner, row_budget(runner.width, runner.device, max_held_rows))
    report_progress(report, source, began, "check", size)
    try:
        verify_engine(engine, source.path)
    except LoadError:
        engine.runner.stop()
        raise
    except StepFailed as error:  # such as heads of a width that its kernels do not have
        engine.runner.stop()
        why = f"vLLM cannot run it: {str(error.__cause__).splitlines()[0]}"
        raise LoadError(source.path, why, "Set engine: native.") from error
    report_progress(report, source, began, "ready", size)
    return engine


def load_runner(
    source: ModelSource,
    cache_tokens: int | AutoCache,
    report: Report | None = None,
    *,
    rank: int = 0,
    wait_s: float = LOAD_S,
) -> VllmRunner:
    """Load a model on vLLM. Raises LoadError.

    rank: of this process among `source.tensor_parallel`, which have joined a process group and load together.
    wait_s: for other roles that load on the same GPU.
    """
    began = time.monotonic()
    _refuse_settings(source)
    report_progress(report, source, began, "config", 0)
    config = verified_config(source)
    size = stored_bytes(source)
    report_progress(report, source, began, "weights", size)
    options = _options(source, config)
    tokens, memory = _memory_options(source, config, options["dtype"], cache_tokens, size)
    options |= memory
    if source.tensor_parallel > 1:
        _name_ranks(rank)
        options |= {"tensor_parallel_size": source.tensor_parallel, "distributed_executor_backend": "external_launcher"}
    with contextlib.ExitStack() as stack:
        path = source.path
        if source.adapter is not None:
            report_progress(report, source, began, "adapter", 0)
            path = stack.enter_context(_merged(source))
        if source.tensor_parallel == 1:  # ranks have their GPUs for themselves
            stack.enter_context(loading_alone(torch.device(current_platform.device_type), source.path, wait_s))
        runner = VllmRunner(path, tokens, options)
        if tokens is None:
            log.info("%s: cache_tokens: auto: %d tokens, measured by vLLM", source.path, runner.cache.total)
        # a hub model is in the cache only now
        folder = Path(path) if Path(path).is_dir() else cached_folder(path, source.revision)
        files = [] if folder is None or source.load_format == "dummy" else weight_files(folder)
        runner.digest = files_digest(config.to_dict(), files, f"vllm {vllm.__version__} {runner.dtype}")
        runner.files = [] if source.adapter is not None else files
    report_progress(report, source, began, "loaded", size)
    return runner


@contextlib.contextmanager
def _merged(source: ModelSource) -> Iterator[str]:
    """A folder with the model and its adapter as one checkpoint. Raises LoadError."""
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(tempfile.TemporaryDirectory(prefix="merged-"))
            load_model(replace(source, device="cpu")).model.save_pretrained(path)
        except OSError as error:  # such as a full disk
            out = f"Set TMPDIR to a folder with {stored_bytes(source) / 1e9:.1f} GB of room."
            raise LoadError(f"adapter of {source.path}", f"the merged model cannot be written: {error}", out) from error
        yield path


def _name_ranks(rank: int) -> None:
    """Agree on a name of this group of ranks, under which they share memory on a CPU. All ranks call this together."""
    name = _of_all_ranks(secrets.token_bytes(8))[0].hex()
    os.environ |= {"RANK": str(rank), "VLLM_DIST_IDENT": f"thinklogit-{name}"}
    os.environ.setdefault("LOCAL_RANK", str(rank))


def _of_all_ranks(own: bytes) -> list[bytes]:
    """The bytes of every rank, in order. Without a group: one's own. All ranks call this together."""
    if not dist.is_initialized():
        return [own]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = torch.tensor(list(own), dtype=torch.uint8, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return [bytes(each.tolist()) for each in every]


def _refuse_settings(source: ModelSource) -> None:
    if not vllm.__version__.startswith(f"{VLLM_VERSION}."):
        why = f"vLLM {vllm.__version__} is installed, whose internals are not known"
        raise LoadError("engine: vllm", why, f"Install {VLLM_VERSION}: `make venv-vllm`.")
    for name, out in (
        ("device_map", "Leave it unset: vLLM places a model on one device."),
        ("quantization", "Leave it unset: vLLM reads the quantization that the checkpoint names."),
    ):
        if getattr(source, name) is not None:
            raise LoadError(source.path, f"{name} is not for engine: vllm", out)
    kind = current_platform.device_type
    if source.device not in ("auto", kind):
        why = f"device: {source.device}, but the vLLM that is installed is built for {kind}"
        raise LoadError(source.path, why, "Install the other build, or set num_gpus and device for this one.")


def _options(source: ModelSource, config: Any) -> dict[str, Any]:
    """The arguments of vLLM's engine for a model, but for its memory. config: transformers'."""
    stated = config.to_dict()
    if text_config(stated).get("kv_lora_rank"):
        why = "on vLLM its multi-head latent attention gives other logits than transformers"
        raise LoadError(source.path, why, "Set engine: native.")
    if source.adapter is not None and stated.get("quantization_config"):
        why = "an adapter cannot be merged into its quantised weights"
        raise LoadError(source.path, why, "Set engine: native, or take a checkpoint that is not quantised.")
    dtype = source.dtype
    if dtype == "auto":  # vLLM's own would be 16 bit for a checkpoint in float32
        dtype = str(config.get_text_config().dtype or torch.float32).removeprefix("torch.")
    options: dict[str, Any] = {
        "dtype": dtype,
        "load_format": source.load_format,
        "trust_remote_code": source.trust_remote_code,
        "hf_overrides": {"head_dtype": "float32"},  # rounded logits lose what guidance adds up: see heads.py
    }
    if source.adapter is None:
        options["revision"] = source.revision
    return options


def _execution() -> dict[str, Any]:
    """The arguments of vLLM's engine for how it runs a step: by CUDA graphs, or layer by layer on a CPU."""
    if current_platform.device_type != "cuda":
        return {"enforce_eager": True}
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"  # otherwise vLLM may take V1, whose graphs a step cannot replay
    return {"compilation_config": GRAPHS}


def _memory_options(
    source: ModelSource, config: Any, dtype: str, cache_tokens: int | AutoCache, size: int
) -> tuple[int | None, dict[str, Any]]:
    """Tokens of the cache, None where vLLM is to measure them, and the arguments of its engine about memory.

    size: bytes of the weights. Raises LoadError if the role's share of the memory has no room for the longest session.
    """
    stated, ranks, on_gpu = config.to_dict(), source.tensor_parallel, current_platform.device_type == "cuda"
    total = torch.cuda.mem_get_info()[1] if on_gpu else 0
    bytes_per_token = cache_bytes_per_token(stated, dtype) * _padding(text_config(stated).get("layer_types") or ())
    if isinstance(cache_tokens, AutoCache) and on_gpu:
        auto = cache_tokens  # vLLM counts its weights, its largest step and its graphs
        spare = reserve(row_width(stated), held_rows(auto.sessions), auto, 0, graphs=False)
        room = int(auto.share * USABLE * total) - spare.total
        why = f"{auto.share * USABLE:.3g} of {total / GIB:.2f} GiB, {size / ranks / GIB:.2f} of weights; {spare}"
        fitting_tokens(source.path, int(room - size / ranks), math.ceil(bytes_per_token / ranks), auto, why)
        longest = min(auto.longest, context_length(stated) or auto.longest)
        return None, {"max_model_len": longest, "gpu_memory_utilization": room / total}
    if isinstance(cache_tokens, AutoCache):
        cache_tokens = host_tokens(source.path, math.ceil(bytes_per_token), cache_tokens)
    blocks = -(-cache_tokens // BLOCK_TOKENS) + 2  # vLLM keeps one
    cache_bytes = math.ceil(blocks * BLOCK_TOKENS * bytes_per_token / ranks)
    longest = min(cache_tokens, context_length(stated) or cache_tokens)
    memory: dict[str, Any] = {"max_model_len": longest, "kv_cache_memory_bytes": cache_bytes}
    if on_gpu:
        wanted = size / ranks + cache_bytes + _START_BYTES
        memory["gpu_memory_utilization"] = min(0.95, wanted / total)  # checked at start
    return cache_tokens, memory


def _reason(error: Exception) -> str:
    """What vLLM says is wrong. The first line of a ValidationError only counts the errors."""
    if isinstance(error, ValidationError):
        return "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
    return first_line(error)


def _padding(layer_types: Sequence[str]) -> float:
    """Layers that vLLM's cache has room for, over those of the model: it fills up groups of unlike layers.

    Example: 52 sliding layers and 10 full ones are groups of 10, the last of which has 2: 70 over 62.
    """
    counts = Counter(layer_types).values()
    if not counts:
        return 1.0
    size = min(counts)
    return sum(-(-count // size) * size for count in counts) / sum(counts)


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Leave a module out of `sys.modules` meanwhile.

    On CPUs vLLM looks at every attribute of every module, and fails at llvmlite's, one of which answers to any name.
    """
    module = sys.modules.pop(name, None)
    try:
        yield
    finally:
        if module is not None:
            sys.modules[name] = module


class RankExecutor(ExecutorWithExternalLauncher):  # type: ignore[misc]  # vLLM is not here where types are checked
    """Runs one rank of a group that has been joined already: vLLM's own would listen on all addresses."""

    def _distributed_args(self) -> tuple[str, int, int]:
        """The address of the group, of which only the name behind the colon is used; rank, local rank."""
        return f"ranks:{os.environ['VLLM_DIST_IDENT']}", int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])

    def _init_executor(self) -> None:
        super()._init_executor()
        dist.barrier()
        for file in _SHARED.glob(f"{os.environ['VLLM_DIST_IDENT']}*"):  # which all have mapped: a kill leaves nothing
            file.unlink(missing_ok=True)


class VllmRunner:
    """One model on vLLM. Implements `actors.engine.runner.Runner`.

    path: a checkpoint. cache_tokens: of all sessions together, at most; None for all that vLLM finds room for. options:
    of vLLM's engine. Raises LoadError for a model that vLLM or this module cannot run.
    """

    batch_invariant = False

    def __init__(self, path: str, cache_tokens: int | None, options: Mapping[str, Any]) -> None:
        arguments: dict[str, Any] = {
            "model": path,
            "enable_prefix_caching": False,  # its scheduler is not used
            "async_scheduling": False,
            "block_size": BLOCK_TOKENS,
            "max_num_seqs": STEP_SESSIONS,
            "max_num_batched_tokens": STEP_TOKENS,
            "distributed_executor_backend": "uni",
            "worker_extension_cls": f"{StepWorker.__module__}.{StepWorker.__name__}",
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            **_execution(),
        }
        try:
            config = EngineArgs(**(arguments | dict(options))).create_engine_config()
            with _hidden("llvmlite.binding.ffi"):
                kind = RankExecutor if config.parallel_config.world_size > 1 else Executor.get_class(config)
                self._core = EngineCore(config, kind, log_stats=False)
            self._call = self._core.model_executor.collective_rpc
            shapes: list[CacheShape] = self._call("thinklogit_shape")
        except LoadError:
            raise
        except Exception as error:  # of any model's code
            if options.get("tensor_parallel_size", 1) > 1:
                out = "Set another tensor_parallel, or look at its ranks' logs."
            else:
                out = "Set engine: native." if cache_tokens else "Lower max_position, or set engine: native."
            raise LoadError(path, f"vLLM cannot load it: {_reason(error)}", out) from error
        (shape,) = shapes
        blocks = {int.from_bytes(each, "little") for each in _of_all_ranks(shape.blocks.to_bytes(8, "little"))}
        if len(blocks) > 1:
            why = f"its ranks have caches of {min(blocks)} to {max(blocks)} blocks"
            raise LoadError(path, why, "Run its ranks on GPUs of one kind, with nothing else on them.")
        self.width = self.vocabulary = shape.width
        self.digest, self.files = 0, list[Path]()  # set by `load_runner`
        self.positions: int | None = config.model_config.max_model_len
        self.devices: Sequence[str] = (shape.device,)
        self.device = torch.device(config.device_config.device)
        self.dtype: torch.dtype = config.model_config.dtype
        there = (shape.blocks - 1) // shape.groups
        wanted = there if cache_tokens is None else -(-cache_tokens // shape.size)
        if there < wanted:
            why = f"vLLM made a cache of {there * shape.size} tokens in the bytes of {cache_tokens}"
            raise LoadError(path, why, "Set engine: native, or cache_tokens to what it made.")
        self.cache = BlockCache(wanted, shape.size)

    def forward(self, admitted: Sequence[Extend], graphs: bool = True) -> Tensor:
        """See Runner.forward. What exceeds one step of vLLM takes several. graphs: CUDA graphs are replayed."""
        if pairs := self.cache.copies():
            self._call("thinklogit_copy", args=(pairs,))
            self.cache.copied()
        parts: dict[int, list[Tensor]] = {extend.session: [] for extend in admitted}
        for pieces in _steps(admitted):
            logits: Tensor | None = self._call("thinklogit_step", args=(self._step(pieces), graphs))[0]
            if logits is None:
                continue
            for piece, rows in zip(pieces, torch.split(logits, [piece.rows for piece in pieces]), strict=True):
                parts[piece.session].append(rows)
        found = [rows for extend in admitted for rows in parts[extend.session] if len(rows)]
        return torch.cat(found) if found else torch.zeros(0, self.width, device=self.device)

    def padded(self, count: int) -> int:
        return count

    def plain_logits(self, tokens: Sequence[int]) -> list[Tensor]:
        """See Runner.plain_logits. In vLLM, as the only session of a step, from fresh blocks and without graphs."""
        reserved = self.cache.reserve(_CHECKED, 0, len(tokens))
        assert reserved, "a model that is being loaded has an empty cache"
        try:
            return [self.forward([Extend(_CHECKED, 0, 0, tokens, len(tokens), 0)], graphs=False)]
        finally:
            self.cache.drop(_CHECKED)

    def non_finite_weight(self) -> str | None:
        """See Runner.non_finite_weight. Of the checkpoint's files; None for a merged adapter, whose files are gone."""
        return non_finite_tensor(self.files)

    def stop(self) -> None:
        """End the workers and free the memory."""
        self._core.shutdown()

    def _step(self, pieces: Sequence[Extend]) -> Step:
        counts = np.array([len(piece.tokens) for piece in pieces], np.int32)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        first = np.array([piece.position for piece in pieces], np.int64)
        tables = [self.cache.blocks(piece.session) for piece in pieces]
        blocks = np.zeros((len(tables), max(map(len, tables))), np.int32)
        for row, table in zip(blocks, tables, strict=True):
            row[: len(table)] = table
        return Step(
            ids=np.fromiter((token for piece in pieces for token in piece.tokens), np.int32, starts[-1]),
            positions=np.arange(starts[-1]) + np.repeat(first - starts[:-1], counts),
            starts=starts,
            lengths=(first + counts).astype(np.int32),
            blocks=blocks,
            keep=np.concatenate([np.arange(s - p.rows, s) for s, p in zip(starts[1:], pieces, strict=True)]),
        )


def _steps(admitted: Sequence[Extend]) -> Iterator[list[Extend]]:
    """The extends in steps of at most STEP_SESSIONS sessions and STEP_TOKENS tokens, shortest first in each.

    A longer extend is split; its parts are in different steps. Back ends that treat decodes and prompts apart want the
    short ones in front.
    """
    step: list[Extend] = []
    room = STEP_TOKENS
    for extend in sorted(admitted, key=lambda extend: len(extend.tokens)):
        for piece in _pieces(extend):
            if len(step) == STEP_SESSIONS or len(piece.tokens) > room or (step and step[-1].session == piece.session):
                yield step
                step, room = [], STEP_TOKENS
            step.append(piece)
            room -= len(piece.tokens)
    yield step


def _pieces(extend: Extend) -> Iterator[Extend]:
    """An extend in parts of at most STEP_TOKENS tokens."""
    for at in range(0, len(extend.tokens), STEP_TOKENS):
        tokens = extend.tokens[at : at + STEP_TOKENS]
        after = len(extend.tokens) - at - len(tokens)  # tokens behind this part
        rows = min(max(extend.rows - after, 0), len(tokens))
        yield extend._replace(position=extend.position + at, tokens=tokens, rows=rows)
